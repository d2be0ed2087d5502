"""The bodies of /v1/responses, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openelm_mlx.server import strict
from openelm_mlx.server.bodies import (
    Message,
    ObjectFormat,
    SamplingBody,
    TextFormat,
    Token,
    text_or_list,
)
from openelm_mlx.server.strict import EACH, Strict

LOGPROBS = "message.output_text.logprobs"
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], EACH
]


class Part(Strict):
    """A part of an item: text that was asked or answered."""

    NEUTRAL = {"annotations": ([],), "logprobs": ([],), "prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text"]
    text: str


class Item(Strict):
    """A message of the conversation so far."""

    NEUTRAL = {"phase": ("final_answer",), "type": ("message",)}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("as text")]
        | Annotated[list[Part], Field(fail_fast=True), Tag("as list")],
        Discriminator(text_or_list),
    ]
    id: str | None = Field(None, description="nothing is stored, so this names nothing")
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class FlatSchemaFormat(Strict):
    """JSON that follows a schema; name and description are not shown to the model."""

    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="the schema is followed strictly in any case")


class TextConfig(Strict):
    """The format of an answer."""

    NEUTRAL = {"verbosity": ("medium",)}

    format: (
        Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None
    ) = None


class ResponseStreamOptions(Strict):
    """The options of a stream; there is none that is supported."""

    NEUTRAL = {"include_obfuscation": (False,)}


class ResponseBody(SamplingBody):
    """The body of /v1/responses: text in, text out, and nothing is stored.

    Sampling options that are left out are the model's own (generation_config.json), as
    `openelm chat` takes them.
    """

    NEUTRAL = strict.RESPONSE

    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("as text")]
        | Annotated[list[Item], Field(fail_fast=True, min_length=1), Tag("as list")],
        Discriminator(text_or_list),
    ] = Field(description="a question, or the messages of a conversation")
    instructions: str | None = Field(None, description="the system message")
    max_output_tokens: int | None = Field(
        None, ge=1, description="stop after this many tokens; unset is what the context holds"
    )
    text: TextConfig | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(fail_fast=True)] | None
    ) = Field(None, description="report the log probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="report log probabilities, of this many likeliest tokens too"
    )
    metadata: Metadata | None = Field(None, max_length=16, description="sent back with the answer")
    stream_options: ResponseStreamOptions | None = None


class TokenizeBody(Strict):
    """The body of /tokenize: a text, or the messages of a conversation."""

    model: str | None = Field(None, description="a name of /v1/models; the first one by default")
    prompt: str | None = Field(None, min_length=1, description="a text")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        None, min_length=1, description="a conversation, as the model is asked to answer it"
    )
    add_special_tokens: bool | None = Field(
        None, description="begin the ids of a text with BOS, as the model is fed; so it is if unset"
    )


class DetokenizeBody(Strict):
    """The body of /detokenize."""

    model: str | None = Field(None, description="a name of /v1/models; the first one by default")
    tokens: Annotated[list[Token], Field(fail_fast=True)] = Field(description="ids of tokens")
