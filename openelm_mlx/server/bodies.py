"""The bodies of requests, as OpenAI's clients send them.

Ranges and descriptions are those of the options.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.server import strict
from openelm_mlx.server.strict import EACH, Strict

MOST = 128  # answers to a prompt, prompts of a body, texts to stop at
LARGEST_ID = 2**31 - 1

Token = Annotated[int, Field(ge=0, le=LARGEST_ID)]
Tokens = Annotated[list[Token], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MOST)]


def text_or_list(value: Any) -> str:
    """Tell which of the two kinds a value is to be read as; the tag begins with "as "."""
    return "as list" if isinstance(value, list) else "as text"


def kind_of_prompt(value: Any) -> str:
    """Tell which of its four kinds a prompt is."""
    if not isinstance(value, list):
        return "as text"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "as lists of ids"
    return "as texts" if isinstance(first, str) else "as ids"


TextOrTexts = Annotated[
    Annotated[str, Tag("as text")] | Annotated[Texts, Tag("as list")], Discriminator(text_or_list)
]
CompletionPrompt = Annotated[
    Annotated[str, Field(min_length=1), Tag("as text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST), Tag("as texts")]
    | Annotated[Tokens, Tag("as ids")]
    | Annotated[
        list[Tokens], Field(fail_fast=True, min_length=1, max_length=MOST), Tag("as lists of ids")
    ],
    Discriminator(kind_of_prompt),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Id = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]  # one spelling for one token


def like(options: type, name: str, **more: Any) -> Any:
    """Return a field that may be left out, with the range and the help text of an option."""
    known = next(item.metadata for item in fields(options) if item.name == name)
    low, high = known.get("range", (None, math.inf))
    limits = {"ge": low, "le": None if high == math.inf else high}
    return Field(None, description=known["help"], **(limits | more))


def likewise(options: type, name: str) -> Any:
    """Return a field that may be left out, with the help text of an option."""
    return like(options, name, ge=None, le=None)


class StreamOptions(Strict):
    """The options of a stream."""

    NEUTRAL = {"include_obfuscation": (False,)}

    include_usage: bool | None = Field(
        None, description="send the numbers of tokens in a last chunk"
    )


class TextPart(Strict):
    """A part of a message; there is none but text."""

    NEUTRAL = {"prompt_cache_breakpoint": ()}

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a conversation."""

    NEUTRAL = strict.MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("as text")]
        | Annotated[list[TextPart], Field(fail_fast=True), Tag("as list")],
        Discriminator(text_or_list),
    ]

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class JsonSchema(Strict):
    """A JSON schema that an answer follows; its name and description are not shown to the model."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="the schema is followed strictly in any case")


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Strict):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class SamplingBody(Strict):
    """The fields that every kind of answer has."""

    model: str | None = Field(None, description="a name of /v1/models; the first one by default")
    temperature: float | None = like(SamplingOptions, "temperature")
    top_p: float | None = like(SamplingOptions, "top_p")
    top_k: int | None = like(SamplingOptions, "top_k")
    min_p: float | None = like(SamplingOptions, "min_p")
    xtc_probability: float | None = like(SamplingOptions, "xtc_probability")
    xtc_threshold: float | None = like(SamplingOptions, "xtc_threshold")
    repetition_penalty: float | None = like(SamplingOptions, "repetition_penalty")
    presence_penalty: float | None = like(SamplingOptions, "presence_penalty")
    frequency_penalty: float | None = like(SamplingOptions, "frequency_penalty")
    penalty_window: int | None = like(SamplingOptions, "penalty_window")
    logit_bias: Annotated[dict[Id, Bias], EACH] | None = likewise(SamplingOptions, "logit_bias")
    seed: int | None = Field(
        None,
        ge=0,
        le=2**63 - 1,
        description="same seed, same tokens: answer i of n draws with stream i of the seed; "
        "unset draws a new one",
    )
    prompt_lookup: int | None = like(GenerationOptions, "prompt_lookup")
    stream: bool | None = Field(None, description="send the answer as it comes")
    user: str | None = Field(None, description="a name of yours, written into the log")

    @property
    def restricted(self) -> bool:
        """True if the answer may have to follow a grammar, which takes a while to make."""
        names = ("response_format", "regex", "choices", "text")
        return any(getattr(self, name, None) is not None for name in names)


class GenerationBody(SamplingBody):
    """The fields of chat and completions."""

    n: int | None = Field(None, ge=1, le=MOST, description="the number of answers")
    stop: TextOrTexts | None = Field(None, description="stop before one of these texts")
    stop_token_ids: list[Token] | None = Field(
        None, max_length=MOST, description="stop at these ids as at the end of text"
    )
    ignore_eos: bool | None = likewise(GenerationOptions, "ignore_eos")
    stream_options: StreamOptions | None = Field(None, description="only with stream")
    response_format: ResponseFormat | None = Field(
        None, description="the format that the answer has: text, a JSON object, a JSON schema"
    )
    regex: str | None = likewise(GenerationOptions, "regex")
    choices: Annotated[list[str], Field(fail_fast=True)] | None = like(
        GenerationOptions, "choices", ge=None, le=None, min_length=1
    )


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions.

    Sampling options that are left out are the model's own (generation_config.json), as
    `openelm chat` takes them.
    """

    NEUTRAL = strict.CHAT

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1, description="perhaps a system message, then user and assistant in turns"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="stop after this many tokens; unset is what the context holds"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="the newer name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="report the log probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="with logprobs: of this many likeliest tokens too"
    )


class CompletionBody(GenerationBody):
    """The body of /v1/completions.

    Sampling options that are left out are greedy, without penalties, as `openelm generate` has
    them.
    """

    NEUTRAL = strict.COMPLETION

    prompt: CompletionPrompt = Field(
        description="a text, a list of token ids, or a list of either; each gets n answers"
    )
    max_tokens: int | None = Field(
        None, ge=0, description="stop after this many tokens; 16 if unset"
    )
    echo: bool | None = Field(
        None,
        description="begin the answer with the prompt; with logprobs, with those of its tokens",
    )
    logprobs: int | None = Field(
        None, ge=0, le=20, description="report log probabilities, of this many likeliest tokens too"
    )
