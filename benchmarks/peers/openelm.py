"""This engine behind the seam of timing.py: its public `stream_generate`, timed where a user's loop
would stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import fields
from time import perf_counter
from typing import Any

from openelm_mlx import GenerationStats, PromptCache, __version__
from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.device import mx
from openelm_mlx.engine.generation import stream_generate
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions

SHARED = {
    item.name for item in fields(EngineOptions)
}  # what all requests of a batch have in common
NEW_TOKENS = 8  # of a prompt whose beginning is in the cache already

# R. L. Stevenson, Treasure Island (1883), the opening; its first 36 tokens are the prompt of
# CoreNet's mlx_examples/open_elm/inference.py, with which arXiv:2404.14619 measured.
TEXT = (
    "Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down the whole "
    "particulars about Treasure Island, from the beginning to the end, keeping nothing back but the bearings of the "
    "island, and that only because there is still treasure not yet lifted, I take up my pen in the year of grace 17 "
    "and go back to the time when my father kept the Admiral Benbow inn and the brown old seaman with the sabre cut "
    "first took up his lodging under our roof. I remember him as if it were yesterday, as he came plodding to the inn "
    "door, his sea-chest following behind him in a hand-barrow; a tall, strong, heavy, nut-brown man, his tarry "
    "pigtail falling over the shoulder of his soiled blue coat, his hands ragged and scarred, with black, broken "
    "nails, and the sabre cut across one cheek, a dirty, livid white. I remember him looking round the cover and "
    "whistling to himself as he did so, and then breaking out in that old sea-song that he sang so often afterwards. "
)


class OurSession:
    """A loaded engine with the settings of one case; several sessions may share an engine.

    `settings` are fields of `GenerationOptions` and `EngineOptions`, `draft` is a smaller engine
    that drafts. With `batch_size` above 1, the other sequences of the batch are the prompt's words
    rotated: as long, but not the same.
    """

    engine = "openelm-mlx"
    version = __version__

    def __init__(
        self,
        engine: Engine,
        load_seconds: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        draft: Engine | None = None,
    ) -> None:
        self.model: Engine = engine
        self.load_seconds = load_seconds
        self.settings: dict[str, Any] = dict(settings or {})
        self.batch_size, self.draft = batch_size, draft
        self.tokens_per_pass: float | None = None
        self._held: PromptCache | None = None
        self._turn = 0

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        return self._batch(prompt, tokens) if self.batch_size > 1 else self._single(prompt, tokens)

    def generate_reused(self, prompt: list[int]) -> float | None:
        """Seconds to the first token where all of `prompt` but its last 8 tokens is in the cache
        already.

        None where that cannot be: batches, windows that have moved on, and prompts too short to
        speak of.
        """
        kept, fresh = prompt[:-NEW_TOKENS], prompt[-NEW_TOKENS:]
        if self.batch_size > 1 or "kv_window" in self.settings or len(kept) < NEW_TOKENS:
            return None
        self._turn += 1  # other tokens each time, or the cache would hold these too
        fresh = [3 + (token + self._turn) % (self.model.vocab - 3) for token in fresh]
        if self._held is None or self._held.tokens[: len(kept)] != kept:
            self._held = PromptCache()
            self._single([*kept, *fresh[::-1]], 1, self._held)
        return self._single([*kept, *fresh], 1, self._held).first

    def _single(self, prompt: list[int], tokens: int, cache: PromptCache | None = None) -> Timed:
        found: list[int] = []
        seconds: list[float] = []
        others = self._others()
        stats = None
        start = perf_counter()
        with closing(
            stream_generate(
                self.model,
                prompt,
                prompt_cache=cache,
                draft=self.draft,
                max_tokens=tokens,
                ignore_eos=True,
                **self.settings,
            )
        ) as events:
            for event in events:
                seconds.append(perf_counter() - start)
                found.append(event.token)
                stats = event.stats or stats
        self._count_passes(stats)
        peak = None if stats is None else stats.peak_memory_bytes - others
        return Timed(tuple(found), tuple(seconds), peak)

    def _count_passes(self, stats: GenerationStats | None) -> None:
        if stats is not None and (self.draft or self.settings.get("prompt_lookup")):
            self.tokens_per_pass = (
                stats.tokens_per_pass or 1.0
            )  # 0: nothing was drafted, each pass gave its one token

    def _others(self) -> int:
        """Bytes in use beside this model's weights: those of engines loaded for comparison are not
        its own.
        """
        return max(
            0, mx.get_active_memory() - self.model.nbytes - (self.draft.nbytes if self.draft else 0)
        )

    def _batch(self, prompt: list[int], tokens: int) -> Timed:
        """All prompts are read in the first step, and every later one gives each sequence a token,
        or several that were drafted. What is taken down is the first sequence's, at the times when
        all tokens of a step are known.
        """
        from openelm_mlx.engine.generation import UNLIMITED, BatchEngine

        shared = {name: value for name, value in self.settings.items() if name in SHARED}
        own = {name: value for name, value in self.settings.items() if name not in SHARED}
        batch = BatchEngine(
            self.model, self.batch_size, draft=self.draft, admission=UNLIMITED, **shared
        )
        found: list[int] = []
        seconds: list[float] = []
        others, peak = self._others(), 0
        start = perf_counter()
        try:
            prompts = [turned(prompt, by) for by in range(self.batch_size)]
            numbers = [
                batch.submit(each, max_tokens=tokens, ignore_eos=True, **own) for each in prompts
            ]
            while batch.busy:
                events = batch.step()
                now = perf_counter() - start
                for number, event in events:
                    peak = max(peak, event.stats.peak_memory_bytes if event.stats else 0)
                    if number == numbers[0]:
                        found.append(event.token)
                        seconds.append(now)
                        self._count_passes(event.stats)
        finally:
            batch.close()
        return Timed(tuple(found), tuple(seconds), peak - others)

    def close(self) -> None:
        self._held = None
        del self.model, self.draft
        mx.clear_cache()


def turned(prompt: list[int], by: int) -> list[int]:
    """The prompt with its words in another order, BOS still first."""
    words = prompt[1:]
    cut = by % len(words) if words else 0
    return [*prompt[:1], *words[cut:], *words[:cut]]


def prompt_ids(engine: Engine, tokens: int, start: int = 0) -> list[int]:
    """BOS and the text above from its token `start` on, over and over, cut to `tokens` ids: the
    same on every machine.

    For a model of random weights that has fewer ids than the tokenizer, they are wrapped.
    """
    text = [token % engine.vocab for token in engine.tokenizer.encode(TEXT, bos=False)]
    return [engine.tokenizer.bos_id, *(text[(start + i) % len(text)] for i in range(tokens - 1))]
