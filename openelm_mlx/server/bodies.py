"""The bodies of requests, as OpenAI's clients send them.

A field that would be ignored is refused by name, unless it has the value that changes nothing:
clients send `"tools": null`. Ranges and descriptions are those of the options.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from openelm_mlx.engine.options import GenerationOptions, SamplingOptions

# fields that are not supported, with the values that ask for nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "conversation": (None,),
    "background": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include": (None, []),
    "max_tool_calls": (None,),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "previous_response_id": (None,),
    "prompt_cache_key": (None,),
    "reasoning": (None, {}),
    "reasoning_effort": (None, "none"),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "truncation": (None, "disabled"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}
# of a message that a client sends back as it came
NEUTRAL_OF_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "name": (None,),
    "refusal": (None,),
    "tool_calls": (None, []),
}


def like(options: type, name: str) -> Any:
    """Return a field that may be left out, with the range and the help text of an option."""
    known = next(item.metadata for item in fields(options) if item.name == name)
    low, high = known.get("range", (None, math.inf))
    return Field(None, ge=low, le=None if high == math.inf else high, description=known["help"])


def without_neutral(data: Any, neutral: Mapping[str, tuple[Any, ...]]) -> Any:
    """Return an object without the unsupported fields that ask for nothing."""
    if not isinstance(data, dict):
        return data
    kept = {}
    for name, value in data.items():
        if not any(value == one and type(value) is type(one) for one in neutral.get(name, ())):
            kept[name] = value
    return kept


class Strict(BaseModel):
    """An object whose fields have exactly their types, and that has no others."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = Field(False, description="send the numbers of tokens in a last chunk")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return without_neutral(data, {"include_obfuscation": (None, False)})


class TextPart(Strict):
    type: Literal["text", "input_text", "output_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return without_neutral(data, {"annotations": (None, []), "logprobs": (None, [])})


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL_OF_MESSAGES)

    @property
    def text(self) -> str:
        parts = self.content
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]


class SchemaFormat(Strict):
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
    logit_bias: dict[str, float] | None = like(SamplingOptions, "logit_bias")
    seed: int | None = like(SamplingOptions, "seed")
    stream: bool | None = Field(None, description="send the answer as it comes")
    user: str | None = Field(None, description="a name of yours, written into the log")

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        return without_neutral(data, NEUTRAL)


class GenerationBody(SamplingBody):
    """The fields of chat and completions."""

    max_tokens: int | None = like(GenerationOptions, "max_tokens")
    n: int | None = Field(None, ge=1, le=128, description="the number of answers")
    stop: str | list[str] | None = Field(None, description="stop before one of these texts")
    stop_token_ids: list[int] | None = like(GenerationOptions, "stop_tokens")
    ignore_eos: bool | None = like(GenerationOptions, "ignore_eos")
    prompt_lookup: int | None = like(GenerationOptions, "prompt_lookup")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = like(GenerationOptions, "regex")
    choices: list[str] | None = like(GenerationOptions, "choices")

    @property
    def restricted(self) -> bool:
        """True if the answer has to follow a grammar, which takes a while to make."""
        return any(wish is not None for wish in (self.response_format, self.regex, self.choices))


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = like(GenerationOptions, "max_tokens")
    logprobs: bool | None = Field(None, description="report the log probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="with logprobs: of this many likeliest tokens too"
    )


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = Field(None, description="begin the answer with the prompt")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="report log probabilities, of this many likeliest tokens too"
    )
