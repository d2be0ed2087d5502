"""From a body to what the engine is asked: prompts, options, and how the answer is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.prompts import Prompt, prompt_tokens
from openelm_mlx.errors import ContextError, OptionError, PromptError
from openelm_mlx.server.bodies import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    Message,
    SamplingBody,
    SchemaFormat,
    TextFormat,
)
from openelm_mlx.server.errors import ApiError, api_error
from openelm_mlx.server.other_bodies import FlatSchemaFormat, Item, ResponseBody

ANY_OBJECT = json.dumps({"type": "object"})
COMPLETION_TOKENS = 16  # OpenAI's default for completions
OVERFLOW = "context_length_exceeded"


@dataclass(frozen=True)
class Asked:
    """The work that one body asks for: `n` answers to each prompt.

    `max_tokens` is None where an answer may fill the context. `limit` names the field by which the
    client has set it, so that a context it does not fit into is an error.
    """

    field: str  # that has the prompts
    prompts: tuple[Prompt, ...]
    sampling: Mapping[str, Any]  # fields of SamplingOptions that were given
    options: GenerationOptions
    max_tokens: int | None
    limit: str | None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    lookup: int | None = None  # of drafts from the text itself; None is the server's own
    adapter: str | None = None
    user: str | None = None  # for the log

    @property
    def scores_prompts(self) -> bool:
        """True if the log probabilities of the prompts' tokens are asked for."""
        return self.echo and self.options.logprobs is not None

    def sampling_for(self, defaults: SamplingOptions) -> SamplingOptions:
        """Return the options of sampling: those given, in a chat over a model's `defaults`."""
        return replace(SamplingOptions() if self.field == "prompt" else defaults, **self.sampling)

    def requests(
        self, prepared: Sequence[tuple[list[int], int]], defaults: SamplingOptions, seed: int
    ) -> Iterator[tuple[list[int], SamplingOptions, GenerationOptions]]:
        """Yield the ids and the options of each choice; those of one prompt have streams of a seed.

        `prepared` is what the function `prepared` returns, and `seed` stands in for one that was
        not given. Nothing is yielded where no token is asked for.
        """
        sampling = self.sampling_for(defaults)
        if sampling.seed is None:
            sampling = replace(sampling, seed=seed)
        for tokens, most in prepared if self.max_tokens != 0 else ():
            own: Any = {"adapter": self.adapter, "prompt_lookup": self.lookup or 0}
            options = replace(self.options, max_tokens=most, **own)
            for stream in range(self.n):
                yield tokens, replace(sampling, stream=stream) if stream else sampling, options


def asked_of_chat(body: ChatBody) -> Asked:
    """Return what a body of /v1/chat/completions asks. Raises `ApiError`."""
    limits = {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(set(given.values())) > 1:
        raise refused("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs is given without logprobs; give both", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    limit, most = next(iter(given.items()), (None, None))
    return asked(body, "messages", (messages_of(body.messages),), limit, most, logprobs)


def asked_of_completion(body: CompletionBody) -> Asked:
    """Return what a body of /v1/completions asks. Raises `ApiError`."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    prompts = tuple(prompt) if several else (prompt,)
    limit = None if body.max_tokens is None else "max_tokens"
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    made = asked(body, "prompt", prompts, limit, most, body.logprobs)
    return replace(made, echo=bool(body.echo))


def asked_of_response(body: ResponseBody) -> Asked:
    """Return what a body of /v1/responses asks. Raises `ApiError`."""
    if isinstance(body.input, str):
        messages = [{"role": "user", "content": body.input}]
    else:
        messages = messages_of(body.input)
    if body.instructions is not None:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    wanted = body.top_logprobs or (0 if body.include else None)
    known = {
        "json_schema": schema_of(body.text.format if body.text else None),
        "logprobs": wanted,
    }
    return Asked(
        "input",
        (messages,),
        sampling_fields(body),
        made(known, "text.format"),
        body.max_output_tokens,
        None if body.max_output_tokens is None else "max_output_tokens",
        stream=bool(body.stream),
        lookup=body.prompt_lookup,
        user=body.user,
    )


def asked(
    body: GenerationBody,
    field: str,
    prompts: tuple[Prompt, ...],
    limit: str | None,
    most: int | None,
    logprobs: int | None,
) -> Asked:
    """Return what chat and completions have in common."""
    known: dict[str, Any] = {
        "stop": (body.stop,) if isinstance(body.stop, str) else body.stop,
        "stop_tokens": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "json_schema": schema_of(body.response_format),
        "regex": body.regex,
        "choices": body.choices,
        "logprobs": logprobs,
    }
    usage = body.stream_options
    if usage is not None and not body.stream:
        raise refused("stream_options is given without stream; leave it out", "stream_options")
    return Asked(
        field,
        prompts,
        sampling_fields(body),
        made(known),
        most,
        limit,
        body.n or 1,
        bool(body.stream),
        usage is not None and bool(usage.include_usage),
        lookup=body.prompt_lookup,
        user=body.user,
    )


def made(known: Mapping[str, Any], schema: str = "response_format") -> GenerationOptions:
    """Return the options that a body gives; `schema` is the field that has a JSON schema.

    Raises `ApiError` that names the field at fault.
    """
    try:
        return GenerationOptions(**{name: one for name, one in known.items() if one is not None})
    except OptionError as error:
        raise api_error(error, schema) from None


def messages_of(messages: Sequence[Message | Item]) -> list[dict[str, str]]:
    """Return messages as the engine takes them; a developer's are the system's."""
    roles = {"developer": "system"}
    return [{"role": roles.get(one.role, one.role), "content": one.text} for one in messages]


def sampling_fields(body: SamplingBody) -> dict[str, Any]:
    """Return the options of sampling that a body gives."""
    names = {item.name for item in fields(SamplingOptions)} - {"stream"}  # that is another thing
    given = {name: getattr(body, name) for name in names & type(body).model_fields.keys()}
    return {name: value for name, value in given.items() if value is not None}


def schema_of(wanted: Any) -> str | None:
    """Return the JSON schema that an answer has to follow, None for plain text."""
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    if isinstance(wanted, SchemaFormat):
        return json.dumps(wanted.json_schema.schema_)
    return json.dumps(wanted.schema_) if isinstance(wanted, FlatSchemaFormat) else ANY_OBJECT


def prepared(engine: Engine, wanted: Asked) -> list[tuple[list[int], int]]:
    """Return the ids of each prompt, and how many tokens may follow.

    Raises `ApiError` for a prompt that is wrong, or if the context does not hold it and the answer,
    and `OptionError` for an option of sampling that does nothing beside the others.
    """
    wanted.sampling_for(engine.chat_sampling)
    return [tokens_of(engine, prompt, wanted) for prompt in wanted.prompts]


def tokens_of(engine: Engine, prompt: Prompt, wanted: Asked) -> tuple[list[int], int]:
    """Return the ids of one of the prompts, and how many tokens may follow. Raises `ApiError`."""
    context = engine.config.max_context_length
    try:
        tokens = prompt_tokens(engine, prompt)
    except PromptError as error:
        code = OVERFLOW if isinstance(error, ContextError) else None
        raise refused(str(error), wanted.field, code) from None
    space = context - len(tokens) + 1
    if wanted.limit and wanted.max_tokens and wanted.max_tokens >= space:
        what = f"the prompt has {len(tokens)} tokens and the answer may have {wanted.max_tokens}"
        raise refused(
            f"{what}; the context holds {context} together. "
            f"Lower {wanted.limit} or shorten the prompt",
            wanted.limit,
            OVERFLOW,
        )
    return tokens, space if wanted.max_tokens is None else min(wanted.max_tokens, space)


def refused(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the error of a body that cannot be honoured."""
    return ApiError(400, message, param=param, code=code)
