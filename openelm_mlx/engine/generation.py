"""The map of the engine: a prompt goes in, events come out.

    prompt -> token ids         prompts.py
    ids -> a queued request     scheduler.py
    prompt -> a prefilled row   admission.py, with what the prefix cache holds (prompt_cache.py)
    row -> the next token       decode.py: one step for all rows; speculative.py: drafts for it
    token -> event              request.py

Everything that generates runs on a scheduler; here it has one row.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

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
from openelm_mlx.fields import explained

if TYPE_CHECKING:
    from typing_extensions import Unpack  # only type checkers import it; nothing to install

    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.drafts import Draft, ModelDraft
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import Settings


@explained(SamplingOptions, GenerationOptions, EngineOptions)
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
    events = stream_generate(
        engine,
        prompt,
        sampling,
        options,
        engine_options=engine_options,
        prompt_cache=prompt_cache,
        draft=draft,
        progress=progress,
        **settings,
    )
    return "".join(event.text for event in events)


@explained(SamplingOptions, GenerationOptions, EngineOptions)
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

    `settings` are options by name; they replace those in the option objects.

    A `prompt` is text, token ids or a list of messages `{"role": ..., "content": ...}`. The text of
    all events is what the tokens add to the prompt's text, its leading space included; only an
    answer in the Instruct format starts without.

    `prompt_cache` is reused as far as something it holds agrees with the prompt, and holds prompt
    and answer afterwards. A prompt of text goes on from the tokens it holds where their text is the
    beginning of the prompt's. `draft` (a smaller engine with the same tokenizer, a `ModelDraft` of
    one, which keeps its cache between calls, or your own `drafts.Draft`) and the option
    `prompt_lookup` speed up decoding without changing what is drawn. `progress(done, total)` is
    called after each prefilled chunk. `position_offset` is how many tokens of the text, at its
    beginning, are no longer in the prompt: random numbers are those of the whole text. Closing the
    iterator stops at once and leaves nothing in flight. Raises `PromptError` (empty, too long, no
    text nor ids), `OptionError` and `CacheError` before any work.
    """
    sampling, options, engine_options = with_overrides(
        (SamplingOptions, GenerationOptions, EngineOptions),
        (sampling, options, engine_options),
        settings,
    )
    scheduler = BatchEngine(engine, 1, engine_options, draft=draft, prompt_cache=prompt_cache)
    scheduler.submit(
        prompt,
        sampling,
        options,
        position_offset=position_offset,
        progress=progress,
        continued=True,
    )
    return _events(scheduler)


def _events(scheduler: BatchEngine) -> Generator[Event, None, None]:
    """Yield what each step gives, until the request has ended or the reader closes the iterator."""
    try:
        while scheduler.busy:
            for _, event in scheduler.step():
                yield event
    finally:
        scheduler.close()
