"""The schemas of answers for /openapi.json: what answers.py, completions.py, responses.py make."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Reason = Literal["stop", "length"]


class Reply(BaseModel):
    """An object with exactly these members."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(Reply):
    """The error: `param` names the field at fault, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """The answer to a request that was not answered as asked."""

    error: Error


class ModelReply(Reply):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int = Field(description="tokens of prompt and answer together")
    loaded: bool = Field(description="else it is loaded when a request names it")
    instruct: bool = Field(description="the model was trained to answer conversations")


class ModelsReply(Reply):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelReply]


class PromptDetails(Reply):
    """Details of the tokens of prompts."""

    cached_tokens: int = Field(description="found in the cache")


class Usage(Reply):
    """The numbers of tokens; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(Reply):
    """A token with its natural log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token with its log probability, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class ChatMessage(Reply):
    """The message that answers."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """One of the answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class ChatReply(Reply):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(Reply):
    """The new part of a message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(Reply):
    """The new part of one of the answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Reason | None


class ChatChunk(Reply):
    """An event of a stream of /v1/chat/completions; after the last one comes `[DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = Field(None, description="in the last chunk, if asked for")


class CompletionLogprobs(Reply):
    """The tokens of a text, each with where it begins in it; null where nothing comes before."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    """One of the texts; in a stream, what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None


class CompletionReply(Reply):
    """The answer of /v1/completions, and an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class OutputText(Reply):
    """The text that answers."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Reply):
    """The message that answers."""

    id: str
    type: Literal["message"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"]
    content: list[OutputText]


class InputDetails(Reply):
    """Details of the tokens of the input."""

    cached_tokens: int = Field(description="found in the cache")
    cache_write_tokens: int


class OutputDetails(Reply):
    """Details of the tokens of the answer."""

    reasoning_tokens: int


class ResponseUsage(Reply):
    """The numbers of tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(Reply):
    """The reason why an answer was cut."""

    reason: Literal["max_output_tokens"]


class ResponseReply(Reply):
    """The answer of /v1/responses, with what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: dict[str, str] | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: Literal[False]
    previous_response_id: None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Literal["none"]
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class TokensReply(Reply):
    """The ids of a text or a conversation."""

    tokens: list[int]
    count: int
    context_length: int


class TextReply(Reply):
    """The text of ids."""

    prompt: str


class HealthReply(Reply):
    """The state of the server: requests are answered once it is `ok`."""

    status: Literal["ok", "loading"]
