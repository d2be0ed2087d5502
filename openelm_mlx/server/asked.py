"""From a body to what the engine is asked: prompts, options, and how the answer is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.prompts import Prompt, prompt_tokens
from openelm_mlx.server.bodies import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    SamplingBody,
    SchemaFormat,
    TextFormat,
)
from openelm_mlx.server.errors import ApiError

ANY_OBJECT = json.dumps({"type": "object"})
COMPLETION_TOKENS = 16  # OpenAI's default for completions


@dataclass(frozen=True)
class Asked:
    """What one body asks for: `n` answers to each prompt.

    `max_tokens` is None where an answer may fill the context. `whole_budget` says that the client
    has set it, so that a context it does not fit into is an error.
    """

    prompts: tuple[Prompt, ...]
    sampling: Mapping[str, Any]  # fields of SamplingOptions that were given
    options: GenerationOptions
    max_tokens: int | None
    given: bool  # the client has given max_tokens
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    lookup: int | None = None  # of drafts from the text itself; None is the server's own
    adapter: str | None = None

    def sampling_for(self, defaults: SamplingOptions) -> SamplingOptions:
        """Return the options of sampling: those given, over a model's defaults."""
        return replace(defaults, **self.sampling)

    def requests(
        self, prepared: Sequence[tuple[list[int], int]], defaults: SamplingOptions, seed: int
    ) -> Iterator[tuple[list[int], SamplingOptions, GenerationOptions]]:
        """Yield the ids and the options of each choice; those of one prompt have streams of a seed.

        `prepared` has what `tokens_of` returns for each prompt, and `seed` stands in for one that
        was not given.
        """
        sampling = self.sampling_for(defaults)
        if sampling.seed is None:
            sampling = replace(sampling, seed=seed)
        for tokens, most in prepared:
            own: Any = {"adapter": self.adapter, "prompt_lookup": self.lookup or 0}
            options = replace(self.options, max_tokens=most, **own)
            for stream in range(self.n):
                yield tokens, replace(sampling, stream=stream), options


def asked_of_chat(body: ChatBody) -> Asked:
    """Return what a body of /v1/chat/completions asks. Raises `ApiError` and `OptionError`."""
    limits = {"max_tokens": body.max_tokens, "max_completion_tokens": body.max_completion_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    if len(set(given.values())) > 1:
        raise refused("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise refused("top_logprobs is given without logprobs; give both", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    roles = {"developer": "system"}
    messages = [
        {"role": roles.get(one.role, one.role), "content": one.text} for one in body.messages
    ]
    return asked(body, (messages,), next(iter(given.values()), None), logprobs)


def asked_of_completion(body: CompletionBody) -> Asked:
    """Return what a body of /v1/completions asks. Raises `ApiError` and `OptionError`."""
    prompt: Any = body.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts = tuple(prompt) if several else (prompt,)
    made = asked(body, prompts, body.max_tokens, body.logprobs)
    limit = COMPLETION_TOKENS if made.max_tokens is None else made.max_tokens
    return replace(made, max_tokens=limit, echo=bool(body.echo))


def asked(
    body: GenerationBody, prompts: tuple[Prompt, ...], limit: int | None, logprobs: int | None
) -> Asked:
    """Return what chat and completions have in common."""
    options: dict[str, Any] = {
        "stop": (body.stop,) if isinstance(body.stop, str) else body.stop,
        "stop_tokens": body.stop_token_ids,
        "ignore_eos": body.ignore_eos,
        "json_schema": schema_of(body.response_format),
        "regex": body.regex,
        "choices": body.choices,
        "logprobs": logprobs,
    }
    known = {name: value for name, value in options.items() if value is not None}
    usage = body.stream_options
    if usage is not None and not body.stream:
        raise refused("stream_options is given without stream; leave it out", "stream_options")
    return Asked(
        prompts,
        sampling_fields(body),
        GenerationOptions(**known),
        limit,
        limit is not None,
        body.n or 1,
        bool(body.stream),
        usage is not None and usage.include_usage,
        lookup=body.prompt_lookup,
    )


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
    return ANY_OBJECT


def tokens_of(engine: Engine, prompt: Prompt, wanted: Asked) -> tuple[list[int], int]:
    """Return the ids of a prompt, and how many tokens may follow.

    Raises `ApiError` if the context does not hold both, and `PromptError`.
    """
    context = engine.config.max_context_length
    tokens = prompt_tokens(engine, prompt)
    space = context - len(tokens) + 1
    if wanted.given and wanted.max_tokens is not None and wanted.max_tokens >= space:
        what = f"the prompt has {len(tokens)} tokens and the answer may have {wanted.max_tokens}"
        raise refused(
            f"{what}; the context holds {context} together. Lower max_tokens or shorten the prompt",
            "max_tokens",
            "context_length_exceeded",
        )
    return tokens, space if wanted.max_tokens is None else min(wanted.max_tokens, space)


def refused(message: str, param: str | None, code: str | None = None) -> ApiError:
    """Return the error of a body that cannot be honoured."""
    return ApiError(400, message, param=param, code=code)
