"""Many prompts at once, each with its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from openelm_mlx.engine.options import (
    EngineOptions,
    GenerationOptions,
    SamplingOptions,
    with_overrides,
)
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.prompts import Prompt
from openelm_mlx.engine.request import Event
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.engine.stats import GenerationStats
from openelm_mlx.errors import OpenELMError, OptionError, PromptError
from openelm_mlx.fields import explained, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openelm_mlx.engine.drafts import Draft, ModelDraft
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import Settings

ALL = 1 << 30  # prompt tokens beside a step: nobody waits for a single token of a batch
ENGINE = {item.name for item in fields(EngineOptions)}


@dataclass(frozen=True)
class BatchResult:
    """What one prompt of a batch gave; `error` is set instead where it could not be run."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: GenerationStats | None
    error: OpenELMError | None = None


@explained(SamplingOptions, GenerationOptions, EngineOptions)
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
    """Continue many prompts, up to `slots` of them at a time; results in the order of the prompts.

    >>> texts = [result.text for result in batch_generate(engine, ["Once upon", "A dog"], max_tokens=32)]

    `sampling` and `options` are one for all or one each; `settings` are options by their names and
    hold for all. `prompt_cache` and `draft` are those of `stream_generate`. A prompt that cannot be
    run gives a result with `error` and does not disturb the others. Raises `OptionError` for
    options that are wrong for all, and `PromptError` where `prompts` is one text.
    """
    if isinstance(prompts, (str, bytes)):
        raise PromptError(
            "prompts is one text; give a list of prompts, also for a single one: [text]"
        )
    if not hasattr(prompts, "__getitem__") or not hasattr(prompts, "__len__"):
        raise PromptError(f"prompts is {shown(prompts)}; give a list of prompts")
    each_sampling = spread("sampling", sampling, len(prompts))
    each_options = spread("options", options, len(prompts))
    shared: Any = {name: value for name, value in settings.items() if name in ENGINE}
    own: Any = {name: value for name, value in settings.items() if name not in ENGINE}
    with_overrides((SamplingOptions, GenerationOptions), (None, None), own)  # wrong for all?
    shared |= {"draft": draft, "prompt_cache": prompt_cache, "max_waiting": max(len(prompts), 1)}
    batch = BatchEngine(engine, slots, engine_options, admission=ALL, **shared)
    numbers: list[int | OpenELMError] = []
    found: dict[int, list[Event]] = {}
    try:
        for prompt, one, other in zip(prompts, each_sampling, each_options, strict=True):
            try:
                numbers.append(batch.submit(prompt, one, other, **own))
            except OpenELMError as error:
                numbers.append(error)
        while batch.busy:
            for number, event in batch.step():
                found.setdefault(number, []).append(event)
    finally:
        batch.close()
    return [result_of(number, found) for number in numbers]


def result_of(number: int | OpenELMError, found: dict[int, list[Event]]) -> BatchResult:
    if isinstance(number, OpenELMError):
        return BatchResult("", (), None, None, number)
    events, last = found[number], found[number][-1]
    tokens = tuple(event.token for event in events)
    return BatchResult("".join(e.text for e in events), tokens, last.finish_reason, last.stats)


def spread(name: str, given: Any, count: int) -> list[Any]:
    """One for each prompt. Raises `OptionError` when there are too many or too few."""
    if given is None or isinstance(given, (SamplingOptions, GenerationOptions)):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        raise OptionError(f"{name} is {shown(given)}; give one for all, or a list of one each")
    if len(given) != count:
        raise OptionError(
            f"{name} has {len(given)} entries for {count} prompts; give one for all, or one each"
        )
    return list(given)
