"""This engine and mlx-lm behind a `Session`, both on MLX in this process.

Each runs its public functions, timed where a user's loop would stand; mlx-lm has its own model
class, cache and loop on the same folder, and is imported when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any

from openelm_mlx import GenerationStats, PromptCache, __version__
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.results import OURS
from openelm_mlx.device import facts, mx, nn, utils
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.engine.generation import UNLIMITED, BatchEngine, stream_generate
from openelm_mlx.engine.loading import Engine, cast, load
from openelm_mlx.engine.options import EngineOptions

SHARED = {item.name for item in fields(EngineOptions)}  # what all requests of a batch share
NEW_TOKENS = 8  # of a prompt whose beginning is in the cache already

# R. L. Stevenson, Treasure Island (1883), the opening; its first 36 tokens are the prompt of
# CoreNet's mlx_examples/open_elm/inference.py, with which arXiv:2404.14619 measured.
TEXT = (
    "Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down "
    "the whole particulars about Treasure Island, from the beginning to the end, keeping nothing "
    "back but the bearings of the island, and that only because there is still treasure not yet "
    "lifted, I take up my pen in the year of grace 17 and go back to the time when my father kept "
    "the Admiral Benbow inn and the brown old seaman with the sabre cut first took up his lodging "
    "under our roof. I remember him as if it were yesterday, as he came plodding to the inn door, "
    "his sea-chest following behind him in a hand-barrow; a tall, strong, heavy, nut-brown man, "
    "his tarry pigtail falling over the shoulder of his soiled blue coat, his hands ragged and "
    "scarred, with black, broken nails, and the sabre cut across one cheek, a dirty, livid white. "
    "I remember him looking round the cover and whistling to himself as he did so, and then "
    "breaking out in that old sea-song that he sang so often afterwards. "
)


class OurSession:
    """A loaded engine with the settings of one case; several sessions may share an engine.

    `settings` are fields of `GenerationOptions` and `EngineOptions`, and `draft` is a smaller
    engine that drafts. With a `batch_size` above 1 the other sequences are the prompt's words
    rotated: just as long, but not the same. `clock` gives the seconds that are reported.
    """

    engine, version = OURS, __version__
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        engine: Engine,
        load_seconds: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        draft: Engine | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.model: Engine = engine
        self.load_seconds, self.clock = load_seconds, clock
        self.settings: dict[str, Any] = dict(settings or {})
        self.batch_size, self.draft = batch_size, draft
        self.cache: PromptCache | None = None
        self.reuses = 0

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        return self.batch(prompt, tokens) if self.batch_size > 1 else self.single(prompt, tokens)

    def reused(self, prompt: list[int]) -> dict[str, float]:
        """Return the seconds to the first token if all but 8 tokens of `prompt` are cached.

        Batches, windows that have moved on, and prompts that are too short have no such figure.
        """
        cached, fresh = prompt[:-NEW_TOKENS], prompt[-NEW_TOKENS:]
        if self.batch_size > 1 or "kv_window" in self.settings or len(cached) < NEW_TOKENS:
            return {}
        self.reuses += 1  # other tokens each time, or the cache would have these too
        fresh = [3 + (token + self.reuses) % (self.model.vocab - 3) for token in fresh]
        if self.cache is None or self.cache.tokens[: len(cached)] != cached:
            self.cache = PromptCache()
            self.single([*cached, *fresh[::-1]], 1, self.cache)
        timed = self.single([*cached, *fresh], 1, self.cache)
        return {"time_to_first_token_reused_seconds": timed.first}

    def single(self, prompt: list[int], tokens: int, cache: PromptCache | None = None) -> Timed:
        found: list[int] = []
        seconds: list[float] = []
        others, stats = self.bytes_of_others(), None
        wanted: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, **self.settings}
        start = self.clock()
        with closing(
            stream_generate(self.model, prompt, prompt_cache=cache, draft=self.draft, **wanted)
        ) as events:
            for event in events:
                seconds.append(self.clock() - start)
                found.append(event.token)
                stats = event.stats or stats
        peak = None if stats is None else stats.peak_memory_bytes - others
        return Timed(tuple(found), tuple(seconds), peak, self.tokens_per_pass(stats))

    def batch(self, prompt: list[int], tokens: int) -> Timed:
        """Run all sequences together and take down the first one.

        All prompts are read in the first step; every later one gives each sequence a token, or
        several that were drafted. A token's time is when all tokens of its step are known.
        """
        shared: dict[str, Any] = {
            name: value for name, value in self.settings.items() if name in SHARED
        }
        wanted = {name: value for name, value in self.settings.items() if name not in SHARED}
        wanted |= {"max_tokens": tokens, "ignore_eos": True}
        shared |= {"draft": self.draft, "admission": UNLIMITED}
        batch = BatchEngine(self.model, self.batch_size, **shared)
        found: list[int] = []
        seconds: list[float] = []
        others, peak, passes = self.bytes_of_others(), 0, None
        start = self.clock()
        with closing(batch):
            prompts = [rotated(prompt, by) for by in range(self.batch_size)]
            numbers = [batch.submit(each, **wanted) for each in prompts]
            while batch.busy:
                events = batch.step()
                now = self.clock() - start
                for number, event in events:
                    peak = max(peak, event.stats.peak_memory_bytes if event.stats else 0)
                    if number == numbers[0]:
                        found.append(event.token)
                        seconds.append(now)
                        passes = self.tokens_per_pass(event.stats)
        return Timed(tuple(found), tuple(seconds), peak - others, passes)

    def tokens_per_pass(self, stats: GenerationStats | None) -> float | None:
        """Return the tokens that a pass gave under speculation; 1 if nothing was drafted."""
        speculative = self.draft is not None or self.settings.get("prompt_lookup")
        return stats.tokens_per_pass or 1.0 if stats is not None and speculative else None

    def bytes_of_others(self) -> int:
        """Return the bytes in use that are not this model's weights: engines loaded beside it."""
        own = self.model.nbytes + (self.draft.nbytes if self.draft else 0)
        return max(0, mx.get_active_memory() - own)

    def close(self) -> None:
        self.cache = None
        del self.model, self.draft
        mx.clear_cache()


def open_ours(folder: Path, dtype: str, tokenizer: str | None = None) -> OurSession:
    return OurSession(load(folder, dtype, tokenizer=tokenizer))


def rotated(prompt: list[int], by: int) -> list[int]:
    """Return the prompt with its words in another order, BOS still first."""
    words = prompt[1:]
    cut = by % len(words) if words else 0
    return [*prompt[:1], *words[cut:], *words[:cut]]


def prompt_ids(engine: Engine, tokens: int) -> list[int]:
    """Return BOS and the text above, over and over, as `tokens` ids: the same on every machine.

    The ids are wrapped for a model of random weights that has fewer of them than the tokenizer.
    """
    text = [token % engine.vocab for token in engine.tokenizer.encode(TEXT, bos=False)]
    return [engine.tokenizer.bos_id, *(text[i % len(text)] for i in range(tokens - 1))]


# --- mlx-lm


class MlxLm:
    """A model of mlx-lm."""

    engine = "mlx-lm"
    notes: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, load_seconds: float) -> None:
        self.model, self.load_seconds, self.version = model, load_seconds, facts()["mlx_lm"]
        parameters: Any = utils.tree_flatten(model.parameters())
        self.nbytes = sum(array.nbytes for _, array in parameters)

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Generate as `generate_step` does unasked, greedily.

        The memory is that of its weights and what the run added to them.
        """
        from mlx_lm.generate import generate_step, generation_stream, wired_limit

        found: list[int] = []
        seconds: list[float] = []
        streams: Any = [generation_stream]
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with wired_limit(self.model, streams):
            start = perf_counter()
            for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=tokens):
                seconds.append(perf_counter() - start)
                found.append(int(token))
        mx.synchronize(generation_stream)
        return Timed(tuple(found), tuple(seconds), self.nbytes + mx.get_peak_memory() - before)

    def close(self) -> None:
        del self.model
        mx.clear_cache()


def open_session(folder: Path, dtype: str) -> MlxLm:
    """Open mlx-lm, the peer of this module."""
    from mlx_lm.utils import load_model

    start = perf_counter()
    model, _ = load_model(folder, lazy=True)
    model.update(utils.tree_map(lambda array: cast(array, DTYPES[dtype].mlx), model.parameters()))
    mx.eval(model.parameters())
    return MlxLm(model, perf_counter() - start)
