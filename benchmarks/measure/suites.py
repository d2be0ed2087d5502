"""What is measured: the suites, the options that change them, and the grid of cases that follows.
No MLX here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from openelm_mlx.errors import OptionError
from openelm_mlx.fields import check_fields
from openelm_mlx.model.config import PUBLISHED
from openelm_mlx.quantization import BITS

MIN_TRIALS = 5
TINY = ("openelm-tiny",)


@dataclass(frozen=True)
class Point:
    """One shape of work, of whatever model."""

    prompt_tokens: int
    generation_tokens: int
    batch_size: int = 1
    cache: str = "plain"
    speculation: str | None = None

    @property
    def simple(self) -> bool:
        """Whether a peer runs it too."""
        return self.batch_size == 1 and self.cache == "plain" and self.speculation is None


@dataclass(frozen=True)
class Suite:
    """Axes of a grid. Prompt and generation lengths are crossed; the other axes vary one at a time,
    at the first lengths.
    """

    help: str
    models: tuple[str, ...] = TINY
    bits: tuple[int | None, ...] = (None,)
    dtype: str | None = None
    prompt_tokens: tuple[int, ...] = (64,)
    generation_tokens: tuple[int, ...] = (64,)
    batch_sizes: tuple[int, ...] = (1,)
    caches: tuple[str, ...] = ("plain",)
    speculations: tuple[str | None, ...] = (None,)
    trials: int = 5
    speed: bool = True  # prefill, decode, first token
    startup: bool = False  # a new process to its first token
    loss: bool = False  # KL divergence and agreement of each width with full precision
    soak: bool = False

    def points(self) -> list[Point]:
        found = [Point(*lengths) for lengths in product(self.prompt_tokens, self.generation_tokens)]
        first = found[0]
        found += [replace(first, batch_size=size) for size in self.batch_sizes]
        found += [replace(first, cache=cache) for cache in self.caches]
        found += [replace(first, speculation=kind) for kind in self.speculations]
        return list(dict.fromkeys(found))


SUITES = {
    "quick": Suite(
        "the bundled model in under 2 minutes",
        batch_sizes=(1, 4),
        caches=("plain", "kv8"),
        speculations=(None, "prompt-lookup"),
        trials=7,
    ),
    "standard": Suite(
        "two prompt lengths, batches, cache kinds, speculation, start-up",
        prompt_tokens=(64, 512),
        generation_tokens=(128,),
        batch_sizes=(1, 4, 16),
        caches=("plain", "kv8", "kv4", "window-256"),
        speculations=(None, "prompt-lookup"),
        trials=7,
        startup=True,
    ),
    # arXiv:2404.14619, benchmarking on Apple hardware: all four sizes in bfloat16 and 4 bits on an
    # M2 Max. Prompt (36 tokens, BOS included) and 1024 greedy tokens are those of
    # corenet/mlx_examples/open_elm/inference.py; unlike that, every token is awaited as it comes,
    # not in eights, and the rate counts the steps after the first token.
    "paper": Suite(
        "all four sizes in bfloat16 and 4 bits, 36 + 1024 tokens, as the OpenELM paper measured MLX",
        models=tuple(PUBLISHED),
        bits=(None, 4),
        dtype="bfloat16",
        prompt_tokens=(36,),
        generation_tokens=(1024,),
    ),
    "context": Suite(
        "decode speed against the length of the context, up to 2048",
        prompt_tokens=(32, 224, 480, 992, 1504, 2017),
        generation_tokens=(32,),
    ),
    "bits": Suite(
        "speed, memory and loss of each width of the weights",
        bits=(None, *reversed(BITS)),
        loss=True,
    ),
    "startup": Suite("a new process to its first token", speed=False, startup=True, trials=7),
    "soak": Suite(
        "half an hour of everything at random, memory and tokens watched", speed=False, soak=True
    ),
}


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure; an empty field leaves it to the suite. Raises `OptionError` for what is out
    of range.
    """

    models: tuple[str, ...] = ()
    suite: str = "quick"
    random_weights: tuple[str, ...] = ()  # published sizes, instead of models
    bits: tuple[int, ...] = ()
    dtype: str | None = None
    group_size: int = 64
    prompt_tokens: tuple[int, ...] = ()
    generation_tokens: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    caches: tuple[str, ...] = ()
    speculations: tuple[str, ...] = ()
    trials: int | None = None
    peers: tuple[str, ...] = ()
    minutes: float = 30.0  # of the soak
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.suite not in SUITES:
            raise OptionError(f"suite is {self.suite!r}; allowed: {', '.join(SUITES)}")
        if self.models and self.random_weights:
            raise OptionError("a model and --random-weights exclude each other; give one of them")
        for name in ("prompt_tokens", "generation_tokens", "batch_sizes"):
            for value in getattr(self, name):
                if value < 1:
                    raise OptionError(f"{name} is {value}; allowed is a number from 1 up")
        for bits in self.bits:
            if bits not in BITS:
                raise OptionError(f"bits is {bits}; allowed: {', '.join(map(str, BITS))}")
        if self.trials is not None and self.trials < MIN_TRIALS:
            raise OptionError(
                f"trials is {self.trials}; allowed is a number from {MIN_TRIALS} up: fewer say nothing of spread"
            )
        if self.minutes <= 0:
            raise OptionError(f"minutes is {self.minutes}; allowed is a number above 0")
        for cache in self.caches:
            cache_settings(cache)
        for kind in self.speculations:
            speculation_settings(kind)
        if self.group_size != BenchmarkOptions.group_size and not any(self.chosen().bits):
            raise OptionError(
                f"group_size is {self.group_size}, but nothing is quantized here; give bits too"
            )
        if self.minutes != BenchmarkOptions.minutes and not SUITES[self.suite].soak:
            raise OptionError(
                f"minutes is {self.minutes:g}, but only the soak suite runs by the clock; give --suite soak too"
            )

    def chosen(self) -> Suite:
        """The suite with what these options say otherwise."""
        suite = SUITES[self.suite]
        given: dict[str, Any] = {
            "models": self.random_weights or self.models,
            "bits": self.bits,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.generation_tokens,
            "batch_sizes": self.batch_sizes,
            "caches": self.caches,
            "speculations": tuple(None if kind == "none" else kind for kind in self.speculations),
            "dtype": self.dtype,
            "trials": self.trials,
        }
        return replace(suite, **{name: value for name, value in given.items() if value})

    def points(self) -> list[Point]:
        """The suite's own points, or the whole grid over the axes that were given here."""
        suite = self.chosen()
        if not (self.batch_sizes or self.caches or self.speculations):
            return (
                suite.points()
                if not (self.prompt_tokens or self.generation_tokens)
                else lengths_only(suite)
            )
        axes = (
            suite.prompt_tokens,
            suite.generation_tokens,
            suite.batch_sizes if self.batch_sizes else (1,),
            suite.caches if self.caches else ("plain",),
            suite.speculations if self.speculations else (None,),
        )
        return [Point(*values) for values in product(*axes)]


def lengths_only(suite: Suite) -> list[Point]:
    """Who names lengths wants those, not the suite's variations beside them."""
    return [Point(*lengths) for lengths in product(suite.prompt_tokens, suite.generation_tokens)]


def cache_settings(cache: str) -> dict[str, int]:
    """Engine options of a cache kind: plain, kv8, kv4 (quantized), window-N. Raises
    `OptionError`.
    """
    if cache == "plain":
        return {}
    if match := re.fullmatch(r"kv([48])", cache):
        return {"kv_bits": int(match[1])}
    if match := re.fullmatch(r"window-(\d{1,6})", cache):
        return {"kv_window": int(match[1])}
    raise OptionError(
        f"cache is {cache!r}; allowed: plain, kv8, kv4, window-N with a number of tokens N"
    )


def speculation_settings(kind: str | None) -> tuple[dict[str, int], str | None]:
    """Generation options of a kind of speculation, and the model that drafts, if one does. Raises
    `OptionError`.
    """
    if kind in (None, "none"):
        return {}, None
    if kind == "prompt-lookup":
        return {"prompt_lookup": 3}, None
    if kind is not None and kind.startswith("draft ") and kind[6:].strip():
        return {}, kind[6:].strip()
    raise OptionError(f"speculation is {kind!r}; allowed: none, prompt-lookup, or 'draft MODEL'")


def settings(point: Point) -> dict[str, int]:
    """Options of a point, of its requests and of the engine."""
    return {**cache_settings(point.cache), **speculation_settings(point.speculation)[0]}


def work(points: list[Point]) -> Iterator[float]:
    """Tokens of each point, as the harness counts them."""
    for point in points:
        yield point.batch_size * (point.prompt_tokens / 8 + point.generation_tokens)
