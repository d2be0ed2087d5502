"""The plan of a run: suites, the options that change them, and the grid of cases that follows.

Nothing here needs MLX, so that `openelm benchmark --help` can list every option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from openelm_mlx.benchmarks.peers import PEERS
from openelm_mlx.benchmarks.results import PROCESSES
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import check_fields, check_unset, option
from openelm_mlx.model.config import PUBLISHED
from openelm_mlx.quantization import BITS, GROUP_SIZES, MLX_GROUP_SIZE

MIN_TRIALS = 5


@dataclass(frozen=True)
class Point:
    """The lengths and settings of a case, for whatever model."""

    prompt_tokens: int
    generation_tokens: int
    batch_size: int = 1
    cache: str = "plain"
    speculation: str | None = None

    @property
    def simple(self) -> bool:
        """True if a peer runs it too."""
        return self.batch_size == 1 and self.cache == "plain" and self.speculation is None

    @property
    def settings(self) -> dict[str, int]:
        """Options of its requests and of the engine."""
        return {**cache_settings(self.cache), **speculation_settings(self.speculation)[0]}

    @property
    def draft(self) -> str | None:
        """The model that drafts."""
        return speculation_settings(self.speculation)[1]


@dataclass(frozen=True)
class Suite:
    """The axes of a grid.

    Lengths of prompt and generation are crossed; the other axes vary one at a time, at the first
    lengths. `trials` are spread over the processes.
    """

    help: str
    models: tuple[str, ...] = ("openelm-tiny",)
    bits: tuple[int | None, ...] = (None,)
    dtype: str | None = None
    prompt_tokens: tuple[int, ...] = (64,)
    generation_tokens: tuple[int, ...] = (64,)
    batch_sizes: tuple[int, ...] = (1,)
    caches: tuple[str, ...] = ("plain",)
    speculations: tuple[str | None, ...] = (None,)
    trials: int = 10
    processes: int = PROCESSES
    speed: bool = True  # prefill, decode, first token
    startup: bool = False  # a new process to its first token
    loss: bool = False  # KL divergence and agreement with the model as stored
    soak: bool = False

    def points(self) -> list[Point]:
        found = [Point(*lengths) for lengths in product(self.prompt_tokens, self.generation_tokens)]
        first = found[0]
        found += [replace(first, batch_size=size) for size in self.batch_sizes]
        found += [replace(first, cache=cache) for cache in self.caches]
        found += [replace(first, speculation=kind) for kind in self.speculations]
        return list(dict.fromkeys(found))

    @property
    def trials_of_a_process(self) -> int:
        """Its share of the trials, but two at least, without which no ratio has an interval."""
        return max(2, -(-self.trials // self.processes))


SUITES = {
    "quick": Suite(
        "the bundled model in under 2 minutes",
        batch_sizes=(1, 4),
        caches=("plain", "kv8"),
        speculations=(None, "prompt-lookup"),
    ),
    "standard": Suite(
        "two prompt lengths, batches, cache kinds, speculation, start-up",
        prompt_tokens=(64, 512),
        generation_tokens=(128,),
        batch_sizes=(1, 4, 16),
        caches=("plain", "kv8", "kv4", "window-256"),
        speculations=(None, "prompt-lookup"),
        startup=True,
    ),
    # arXiv:2404.14619, benchmarking on Apple hardware: all four sizes in bfloat16 and 4 bits on an
    # M2 Max. Prompt (36 tokens, BOS included) and 1024 greedy tokens are those of
    # corenet/mlx_examples/open_elm/inference.py; unlike that, every token is awaited as it comes,
    # not in eights, and the rate counts the steps after the first token.
    "paper": Suite(
        "all sizes in bfloat16 and 4 bits, 36 + 1024 tokens, as the OpenELM paper measured MLX",
        models=tuple(PUBLISHED),
        bits=(None, 4),
        dtype="bfloat16",
        prompt_tokens=(36,),
        generation_tokens=(1024,),
        trials=6,
        processes=3,
    ),
    "context": Suite(
        "decode speed against the length of the context, up to 2048",
        prompt_tokens=(32, 224, 480, 992, 1504, 2017),
        generation_tokens=(32,),
    ),
    "bits": Suite(
        "speed, memory and loss at every number of bits", bits=(None, *reversed(BITS)), loss=True
    ),
    "startup": Suite("a new process to its first token", speed=False, startup=True),
    "first-run": Suite(
        "what openelm doctor --full times: unquantized, 8 and 4 bits",
        bits=(None, 8, 4),
        prompt_tokens=(64, 512),
        trials=5,
        processes=1,
    ),
    "soak": Suite(
        "half an hour of everything at random, memory and tokens watched",
        speed=False,
        soak=True,
        processes=1,
    ),
}


OTHERS = ", ".join(
    f"{name}: {suite.processes}" for name, suite in SUITES.items() if suite.processes != PROCESSES
)


def several(help: str, low: float | None = None, **metadata: Any) -> Any:
    """An option of several values after one flag; without any, the suite decides."""
    return option((), help, low, nargs="+", **{"metavar": "N", **metadata})


@dataclass(frozen=True)
class BenchmarkOptions:
    """The options of a run; the suite decides about those that are not given.

    Raises `OptionError` for what is out of range, or has nothing to act on.
    """

    models: tuple[str, ...] = ()
    suite: str = option(
        "quick",
        "; ".join(f"{name}: {suite.help}" for name, suite in SUITES.items()),
        choices=tuple(SUITES),
        metavar="NAME",
    )
    random_weights: tuple[str, ...] = several(
        f"published sizes with random weights, nothing downloaded: {', '.join(PUBLISHED)}",
        metavar="SIZE",
    )
    bits: tuple[int, ...] = several(
        f"quantize to these numbers of bits: {', '.join(map(str, BITS))}", choices=BITS
    )
    group_size: int = option(
        MLX_GROUP_SIZE, "with --bits: weights that share a scale", choices=GROUP_SIZES
    )
    dtype: str | None = option(None, "compute in this type", choices=FLOATS)
    prompt_tokens: tuple[int, ...] = several("lengths of the prompt", 1)
    generation_tokens: tuple[int, ...] = several("tokens generated after it", 1)
    batch_sizes: tuple[int, ...] = several("sequences at a time", 1, flag="--batch-size")
    caches: tuple[str, ...] = several(
        "how keys and values are kept: plain, kv8, kv4, window-N", flag="--cache", metavar="KIND"
    )
    speculations: tuple[str, ...] = several(
        "none, prompt-lookup, 'draft MODEL'", flag="--speculation", metavar="KIND"
    )
    trials: int | None = option(
        None, "counted runs of each case, spread over the processes; at least 5", MIN_TRIALS
    )
    processes: int | None = option(
        None, f"processes that measure in turn (default: {PROCESSES}; {OTHERS})", 1, 100
    )
    minutes: float = option(30.0, "length of the soak suite", 0.01)
    peers: tuple[str, ...] = option(
        (), f"time these too: {', '.join(PEERS)}", commas=True, choices=PEERS, metavar="NAMES"
    )
    command: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.models and self.random_weights:
            raise OptionError("a model and --random-weights exclude each other; give one of them")
        for cache in self.caches:
            cache_settings(cache)
        for kind in self.speculations:
            speculation_settings(kind)
        if not any(self.chosen().bits):
            check_unset(self, "group_size", "nothing is quantized here; give bits too")
        if not self.chosen().soak:
            why = "only the soak suite runs by the clock; give --suite soak too"
            check_unset(self, "minutes", why)
        elif self.processes not in (None, 1):
            why = "the soak suite runs in one; leave it out"
            raise OptionError(f"processes is {self.processes}, but {why}")

    def chosen(self) -> Suite:
        """Return the suite, changed as these options say."""
        suite = SUITES[self.suite]
        given = {item.name: getattr(self, item.name, None) for item in fields(suite)}
        given["models"] = self.random_weights or self.models
        given["speculations"] = tuple(None if k == "none" else k for k in self.speculations)
        return replace(suite, **{name: value for name, value in given.items() if value})

    def points(self) -> list[Point]:
        """Return the suite's own points, or the whole grid over the axes that were given.

        Whoever gives lengths wants only those, without the suite's variations beside them.
        """
        suite, plain = self.chosen(), Suite("")
        names = ("prompt_tokens", "generation_tokens", "batch_sizes", "caches", "speculations")
        if not any(getattr(self, name) for name in names):
            return suite.points()
        lengths = [getattr(suite, name) for name in names[:2]]
        others = [getattr(suite if getattr(self, name) else plain, name) for name in names[2:]]
        return [Point(*values) for values in product(*lengths, *others)]


def cache_settings(cache: str) -> dict[str, int]:
    """Return the engine options of a kind of cache. Raises `OptionError` for an unknown one."""
    if cache == "plain":
        return {}
    if match := re.fullmatch(r"kv([48])", cache):
        return {"kv_bits": int(match[1])}
    if match := re.fullmatch(r"window-(\d{1,6})", cache):
        return {"kv_window": int(match[1])}
    kinds = "plain, kv8, kv4, window-N with a number of tokens N"
    raise OptionError(f"cache is {cache!r}; allowed: {kinds}")


def speculation_settings(kind: str | None) -> tuple[dict[str, int], str | None]:
    """Return the generation options of a kind of speculation, and the model that drafts, if any.

    Raises `OptionError` for an unknown kind.
    """
    if kind in (None, "none"):
        return {}, None
    if kind == "prompt-lookup":
        return {"prompt_lookup": 3}, None
    if kind is not None and kind.startswith("draft ") and kind[6:].strip():
        return {}, kind[6:].strip()
    raise OptionError(f"speculation is {kind!r}; allowed: none, prompt-lookup, or 'draft MODEL'")


def work(points: Iterable[Point]) -> float:
    """Return the tokens of all points; a prompt's count an eighth, as they are faster.

    Only proportions matter, for the progress bar's estimate.
    """
    return sum(
        point.batch_size * (point.prompt_tokens / 8 + point.generation_tokens) for point in points
    )
