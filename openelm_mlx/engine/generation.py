"""The map of the engine: a prompt goes in, events come out.

    prompt -> token ids         prompts.py, tokenizer.py
    ids -> queued request       scheduler.py
    request -> prefilled row    admission.py, from the longest prefix that prompt_cache.py has
    row -> next token           lane.py runs the rows; decode.py steps all; sampling.py draws
        drafted beforehand      speculation.py, draft_model.py
        restricted by           grammar.py
    token -> event              request.py

A single prompt is a batch of one row, so both run on the same scheduler. The functions of this file
are the public ways in; `Conversation` (conversation.py) and `Engine.stream` (loading.py) call them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from openelm_mlx.engine.options import (
    KINDS,
    EngineOptions,
    GenerationOptions,
    SamplingOptions,
    with_overrides,
)
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.prompts import Prompt
from openelm_mlx.engine.request import Event
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import OpenELMError, OptionError, PromptError
from openelm_mlx.fields import explained, shown

if TYPE_CHECKING:
    from typing import Unpack

    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.draft_model import ModelDraft
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import Settings
    from openelm_mlx.engine.request import GenerationStats
    from openelm_mlx.engine.speculation import Draft

UNLIMITED = 1 << 30  # prompt tokens per step: the results of a list are read once all are done
ENGINE_SETTINGS = {item.name for item in fields(EngineOptions)}


@explained(*KINDS)
def generate(
    engine: Engine,
    prompt: Prompt,
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    engine_options: EngineOptions | None = None,
    prompt_cache: PromptCache | None = None,
    draft: Engine | ModelDraft | Draft | None = None,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> str:
    """Return the text that follows `prompt`. Arguments and errors are those of `stream_generate`.

    >>> engine = load("openelm-tiny")
    >>> text = generate(engine, "Once upon a time", max_tokens=64, temperature=0.7, seed=1)

    `settings` are options by name; they replace those in the option objects.
    """
    others: Any = {"engine_options": engine_options, "prompt_cache": prompt_cache}
    others |= {"draft": draft, "progress": progress, **settings}
    events = stream_generate(engine, prompt, sampling, options, **others)
    return "".join(event.text for event in events)


@explained(*KINDS)
def stream_generate(
    engine: Engine,
    prompt: Prompt,
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    engine_options: EngineOptions | None = None,
    prompt_cache: PromptCache | None = None,
    draft: Engine | ModelDraft | Draft | None = None,
    progress: Progress | None = None,
    position_offset: int = 0,
    **settings: Unpack[Settings],
) -> Generator[Event, None, None]:
    """Yield one `Event` per token.

    >>> for event in stream_generate(engine, "Once upon a time", max_tokens=64):
    ...     print(event.text, end="", flush=True)

    A `prompt` is text, token ids or a list of messages `{"role": ..., "content": ...}`. The texts
    of all events together are what the tokens add to the prompt's text, with their leading space;
    only an answer in the Instruct format starts without one. `settings` are options by name; they
    replace those in the option objects.

    The longest beginning of the prompt that is in `prompt_cache` is not prefilled again; afterwards
    the cache has prompt and answer. A prompt that is text also continues stored tokens that spell
    its beginning in another way than the tokenizer would. `draft` is a smaller engine with the same
    tokenizer, a `ModelDraft` of one, which keeps its cache between calls, or your own
    `speculation.Draft`; it and the option `prompt_lookup` speed up decoding and do not change what
    is drawn. `progress(done, total)` is called after each prefilled chunk with numbers of tokens.
    `position_offset` is how many tokens were cut from the beginning of the text: positions for
    random numbers count them, so a seed gives what it gives for the entire text.

    Closing the iterator stops at once and leaves nothing running. Raises `PromptError` (the prompt
    is empty, too long, or neither text nor ids nor messages), `OptionError` and `CacheError` before
    any work.
    """
    given = (sampling, options, engine_options)
    sampling, options, engine_options = with_overrides(KINDS, given, settings)
    scheduler = BatchEngine(engine, 1, engine_options, draft=draft, prompt_cache=prompt_cache)
    about: Any = {"position_offset": position_offset, "progress": progress}
    scheduler.submit(prompt, sampling, options, continued=True, **about)
    return _events(scheduler)


def _events(scheduler: BatchEngine) -> Generator[Event, None, None]:
    """Yield the events of each step until the request ends or the reader closes the iterator."""
    try:
        while scheduler.busy:
            for _, event in scheduler.step():
                yield event
    finally:
        scheduler.close()


@dataclass(frozen=True)
class BatchResult:
    """The result of one prompt of a list; only `error` is set if the prompt could not be run."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: GenerationStats | None
    error: OpenELMError | None = None


@explained(*KINDS)
def batch_generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingOptions | Sequence[SamplingOptions] | None = None,
    options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    *,
    slots: int = 16,
    engine_options: EngineOptions | None = None,
    prompt_cache: PromptCache | None = None,
    draft: Engine | ModelDraft | Draft | None = None,
    **settings: Unpack[Settings],
) -> list[BatchResult]:
    """Continue many prompts, up to `slots` of them at a time; return the results in their order.

    >>> results = batch_generate(engine, ["Once upon", "A dog"], max_tokens=32)
    >>> texts = [result.text for result in results]

    `sampling` and `options` are one object for all prompts, or a list with one for each; `settings`
    are options by name and apply to all. `prompt_cache` and `draft` are those of `stream_generate`.
    A prompt that cannot be run gives a result with `error`, and the others are run. Raises
    `OptionError` for options that are wrong for all, and `PromptError` if `prompts` is one text.
    """
    if isinstance(prompts, (str, bytes)):
        what = "prompts is one text"
        raise PromptError(f"{what}; give a list of prompts, also for a single one: [text]")
    if not hasattr(prompts, "__getitem__") or not hasattr(prompts, "__len__"):
        raise PromptError(f"prompts is {shown(prompts)}; give a list of prompts")
    each_sampling = spread("sampling", sampling, len(prompts))
    each_options = spread("options", options, len(prompts))
    shared: Any = {name: value for name, value in settings.items() if name in ENGINE_SETTINGS}
    own: Any = {name: value for name, value in settings.items() if name not in ENGINE_SETTINGS}
    # here, because what is wrong for all prompts is not an error of each of them
    with_overrides((SamplingOptions, GenerationOptions), (None, None), own)
    shared |= {"draft": draft, "prompt_cache": prompt_cache, "max_waiting": max(len(prompts), 1)}
    batch = BatchEngine(engine, slots, engine_options, admission=UNLIMITED, **shared)
    submitted: list[int | OpenELMError] = []  # the number of each request, or why it was refused
    events: dict[int, list[Event]] = {}
    try:
        for prompt, one, other in zip(prompts, each_sampling, each_options, strict=True):
            try:
                submitted.append(batch.submit(prompt, one, other, **own))
            except OpenELMError as error:
                submitted.append(error)
        while batch.busy:
            for number, event in batch.step():
                events.setdefault(number, []).append(event)
    finally:
        batch.close()
    return [
        BatchResult("", (), None, None, number)
        if isinstance(number, OpenELMError)
        else result_of(events[number])
        for number in submitted
    ]


def result_of(events: list[Event]) -> BatchResult:
    """Return the result of a prompt from its events."""
    text, tokens = "".join(event.text for event in events), tuple(event.token for event in events)
    return BatchResult(text, tokens, events[-1].finish_reason, events[-1].stats)


def spread(name: str, given: Any, count: int) -> list[Any]:
    """Return one options object for each prompt. Raises `OptionError` for too many or too few."""
    if given is None or isinstance(given, (SamplingOptions, GenerationOptions)):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        raise OptionError(f"{name} is {shown(given)}; give one for all, or a list of one each")
    if len(given) != count:
        what = f"{name} has {len(given)} entries for {count} prompts"
        raise OptionError(f"{what}; give one for all, or one each")
    return list(given)
