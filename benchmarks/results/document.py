"""The result document: what was measured, on what machine, by which command. One JSON schema,
versioned and checked.
"""

from __future__ import annotations

import json
import math
import statistics
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.results.bootstrap import paired_ratio
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import replacing

SCHEMA = "openelm-mlx benchmark 1"

# name of a metric -> its unit. A rate is better when higher, so is an agreement; everything else when lower.
METRICS = {
    "prefill_tokens_per_second": "tokens/s",
    "decode_tokens_per_second": "tokens/s",
    "time_to_first_token_seconds": "s",
    # all of the prompt but its last 8 tokens found in the cache
    "time_to_first_token_reused_seconds": "s",
    "startup_seconds": "s",  # a new process, from its start to its first token
    "load_seconds": "s",
    "peak_memory_bytes": "bytes",
    "tokens_per_pass": "tokens",  # of the target model, under speculation
    "kl_mean": "nats",
    "top_1_agreement": "share",
}
HIGHER_IS_BETTER = ("tokens/s", "tokens", "share")


@dataclass(frozen=True)
class Metric:
    """One figure over all trials; the median is what is shown, the quartiles are its spread."""

    unit: str
    values: tuple[float, ...]  # one a trial, in the order they were run
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> Metric:
        """Median and quartiles (inclusive: interpolated between the trials) of at least one
        value.
        """
        values = tuple(float(value) for value in values)
        if not values:
            raise BenchmarkError("a metric needs at least one trial")
        q1, median, q3 = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        )
        return cls(unit, values, median, q1, q3)

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.q3 - self.q1) / abs(self.median) if self.median else 0.0

    @property
    def higher_is_better(self) -> bool:
        return self.unit in HIGHER_IS_BETTER


@dataclass(frozen=True)
class Case:
    """What one row measured. Two rows of different documents are the same measurement when their
    cases are equal.
    """

    engine: str  # "openelm-mlx" or a peer's name
    model: str
    dtype: str  # of the activations
    bits: int | None  # of the weights; None is unquantized, or as the model's folder has them mixed
    bits_per_weight: float | None
    prompt_tokens: int
    generation_tokens: int
    batch_size: int = 1
    cache: str = "plain"
    speculation: str | None = None  # "prompt-lookup" or "draft NAME"
    random_weights: bool = False


@dataclass(frozen=True)
class Row:
    """A case with its metrics; a row that was not timed has none, and says why in its notes."""

    case: Case
    metrics: dict[str, Metric] = field(default_factory=dict)
    bytes_per_token: dict[str, float] | None = None  # by part of the model
    bound_tokens_per_second: float | None = None
    percent_of_bound: float | None = None
    agrees: bool | None = None  # a peer's tokens with ours
    parts_at: int | None = None  # index of the first token that differs
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """A metric of one row over that of another, in paired trials, with its 95 % bootstrap
    interval.
    """

    metric: str
    row: int
    against: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Document:
    """A run of the benchmark. `machine` and `versions` are plain facts, for people and for
    `--compare`'s warnings.
    """

    created: str  # ISO 8601, UTC
    command: str
    rows: tuple[Row, ...]
    suite: str | None = None
    partial: bool = False
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    schema: str = SCHEMA


def to_json(document: Document) -> str:
    return json.dumps(asdict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save(document: Document, path: str | Path) -> None:
    """Write the document as JSON. Raises `BenchmarkError` where that is impossible; an older file
    then stays whole.
    """
    write_file(path, to_json(document))


def write_file(path: str | Path, content: str | bytes) -> None:
    """Replace `path` by `content`, whole or not at all. Raises `BenchmarkError`."""
    try:
        with replacing(path) as new:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise BenchmarkError(
            f"cannot write {path}: {error.strerror}; give a file in a folder that exists"
        ) from None


def load(path: str | Path) -> Document:
    """Read and check a document. Raises `BenchmarkError` naming the file and the place of what is
    wrong.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON ({error})"
        raise BenchmarkError(
            f"cannot read {path}: {reason}; give a file that `openelm benchmark --output` wrote"
        ) from None
    try:
        return from_json(data)
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: {error}") from None


def from_json(data: Any) -> Document:
    """The document of parsed JSON. Raises `BenchmarkError` naming the place of what is wrong."""
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise BenchmarkError(f"schema is {schema!r}; this version reads {SCHEMA!r}")
    document: Document = build(Document, data, "")
    bandwidth = document.machine.get("bandwidth_bytes_per_second")
    for number, row in enumerate(document.rows):
        check_row(row, f"rows[{number}]")
        if row.bound_tokens_per_second and row.bytes_per_token and isinstance(bandwidth, float):
            bound = bandwidth / sum(row.bytes_per_token.values())
            follows(row.bound_tokens_per_second, bound, f"rows[{number}].bound_tokens_per_second")
    for number, ratio in enumerate(document.ratios):
        check_ratio(ratio, document, f"ratios[{number}]")
    return document


def check_row(row: Row, place: str) -> None:
    """Known metrics in their units, whose summaries follow from their values; counts of at least
    one token.
    """
    for name, metric in row.metrics.items():
        here = f"{place}.metrics.{name}"
        if name not in METRICS:
            raise BenchmarkError(f"{here} is no metric of this schema; known: {', '.join(METRICS)}")
        if metric.unit != METRICS[name]:
            raise BenchmarkError(
                f"{here}.unit is {metric.unit!r}; this metric is in {METRICS[name]}"
            )
        if not metric.values:
            raise BenchmarkError(f"{here}.values is empty; a metric needs at least one trial")
        truth = Metric.of(metric.values, metric.unit)
        for part in ("median", "q1", "q3"):
            follows(getattr(metric, part), getattr(truth, part), f"{here}.{part}")
    for count in ("prompt_tokens", "generation_tokens", "batch_size"):
        if getattr(row.case, count) < 1:
            raise BenchmarkError(
                f"{place}.case.{count} is {getattr(row.case, count)}; allowed is a number from 1 up"
            )
    rate = row.metrics.get("decode_tokens_per_second")
    if row.percent_of_bound is not None:
        if rate is None or not row.bound_tokens_per_second:
            raise BenchmarkError(
                f"{place}.percent_of_bound needs a decode rate and a bound above 0"
            )
        share = 100 * rate.median / row.bound_tokens_per_second
        follows(row.percent_of_bound, share, f"{place}.percent_of_bound")


def follows(given: float, truth: float, place: str) -> None:
    """Raise `BenchmarkError` for a summary that is not the one of its values."""
    if not math.isclose(given, truth, rel_tol=1e-6, abs_tol=1e-12):
        raise BenchmarkError(f"{place} is {given}, but that of its values is {truth}")


def check_ratio(ratio: Ratio, document: Document, place: str) -> None:
    for name in ("row", "against"):
        index = getattr(ratio, name)
        if not 0 <= index < len(document.rows):
            raise BenchmarkError(
                f"{place}.{name} is {index}; the document has {len(document.rows)} rows"
            )
        if ratio.metric not in document.rows[index].metrics:
            raise BenchmarkError(
                f"{place}.metric is {ratio.metric!r}, which rows[{index}] has not measured"
            )
    ours, theirs = (
        document.rows[index].metrics[ratio.metric].values for index in (ratio.row, ratio.against)
    )
    if min(len(ours), len(theirs)) < 2 or min(*ours, *theirs) <= 0:
        raise BenchmarkError(f"{place} needs two trials above 0 of either row")
    for name, truth in zip(("low", "ratio", "high"), paired_ratio(ours, theirs), strict=True):
        follows(getattr(ratio, name), truth, f"{place}.{name}")


def build(kind: Any, value: Any, place: str) -> Any:
    """`value`, parsed from JSON, as the type `kind`: the dataclasses above are the schema. Raises
    `BenchmarkError`.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return build_dataclass(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else build(arguments[0], value, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise misfit(place, value, "a list")
        return tuple(
            build(arguments[0], item, f"{place}[{number}]") for number, item in enumerate(value)
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise misfit(place, value, "an object")
        return {
            key: build(arguments[1], item, f"{place}.{key}" if place else key)
            for key, item in value.items()
        }
    if kind is float:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not math.isfinite(value)
        ):
            raise misfit(place, value, "a finite number")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise misfit(
            place, value, {int: "a whole number", str: "a text", bool: "true or false"}[kind]
        )
    return value


def build_dataclass(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise misfit(place, value, "an object")
    types_of = typing.get_type_hints(kind)
    if unknown := sorted(value.keys() - types_of.keys()):
        raise BenchmarkError(
            f"{place or 'the document'} has an unknown key {unknown[0]!r}; known: {', '.join(types_of)}"
        )
    given = {}
    for item in fields(kind):
        here = f"{place}.{item.name}" if place else item.name
        if item.name in value:
            given[item.name] = build(types_of[item.name], value[item.name], here)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise BenchmarkError(f"{here} is missing")
    return kind(**given)


def misfit(place: str, value: Any, wanted: str) -> BenchmarkError:
    shown = repr(value)
    return BenchmarkError(
        f"{place or 'the document'} is {shown[:40]}{'...' if len(shown) > 40 else ''}; expected {wanted}"
    )
