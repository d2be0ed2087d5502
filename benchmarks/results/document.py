"""The result document: what was measured, on what machine, by which command, in one checked schema.

A figure holds the trials of several processes, because processes differ by more than their trials
tell. `Metric.of`, `completed` and `merge` compute all that follows from trials; `load` refuses a
file in which a stored summary, bound or ratio is not what its trials give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from openelm_mlx.benchmarks.results.statistics import Processes, paired_ratio, process_medians
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import replacing

SCHEMA, OLD_SCHEMA = "openelm-mlx benchmark 2", "openelm-mlx benchmark 1"
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

# name of a metric -> its unit
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
OURS = "openelm-mlx"
DECODE = "decode_tokens_per_second"

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Metric:
    """One figure: the trials of each process, their median over processes, quartiles of all trials.

    A process that did not measure the figure has no trials, so that the same place in all metrics
    of a document belongs to the same process.
    """

    unit: str
    processes: tuple[tuple[float, ...], ...]
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> Metric:
        """Return the metric of one process's trials."""
        return cls.of_processes([tuple(values)], unit)

    @classmethod
    def of_processes(cls, processes: Processes, unit: str) -> Metric:
        """Summarise trials. Raises `BenchmarkError` where there are none."""
        trials = tuple(tuple(float(value) for value in process) for process in processes)
        values = [value for process in trials for value in process]
        if not values:
            raise BenchmarkError("a metric needs at least one trial")
        q1, _, q3 = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(unit, trials, median(process_medians(trials)), q1, q3)

    @property
    def values(self) -> tuple[float, ...]:
        """All trials, in the order they were run."""
        return tuple(value for process in self.processes for value in process)

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.q3 - self.q1) / abs(self.median) if self.median else 0.0

    @property
    def higher_is_better(self) -> bool:
        return self.unit in HIGHER_IS_BETTER


@dataclass(frozen=True, config=STRICT)
class Case:
    """What one row measured. Rows of two documents are the same measurement when their cases are
    equal.
    """

    engine: str  # "openelm-mlx" or a peer's name
    model: str
    dtype: str  # of the activations
    bits: int | None  # of the weights; None where they are unquantized, or mixed in the folder
    bits_per_weight: float | None
    prompt_tokens: Count
    generation_tokens: Count
    batch_size: Count = 1
    cache: str = "plain"
    speculation: str | None = None  # "prompt-lookup" or "draft NAME"
    random_weights: bool = False

    def __str__(self) -> str:
        """Return the case in few words, for messages."""
        parts = [self.engine, self.model, f"{self.bits}-bit" if self.bits else self.dtype]
        parts.append(f"{self.prompt_tokens}+{self.generation_tokens}")
        parts += [f"batch {self.batch_size}"] if self.batch_size > 1 else []
        parts += [self.cache] if self.cache != "plain" else []
        return " ".join([*parts, *([self.speculation] if self.speculation else [])])


@dataclass(frozen=True, config=STRICT)
class Row:
    """A case with its metrics; a row that was not timed has none, and says why in its notes.

    `completed` computes the bound, the rate at which a copy moves the bytes of a token, and the
    share of it that decoding reaches.
    """

    case: Case
    metrics: dict[str, Metric] = Field(default_factory=dict)
    bytes_per_token: dict[str, float] | None = None  # by part of the model
    bound_tokens_per_second: float | None = None
    percent_of_bound: float | None = None
    agrees: bool | None = None  # whether a peer's tokens are ours
    parts_at: int | None = None  # index of the first token that differs
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Ratio:
    """A metric of one row over that of another, in paired trials, with its 95 % interval.

    `rows` are indexes into the document's rows; `completed` computes the figures.
    """

    metric: str
    row: int
    against: int
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, config=STRICT)
class Machine:
    """Facts of the machine from before the run; None is unknown."""

    chip: str | None = None
    processor: str | None = None  # its exact model, where the chip's name does not tell it
    machine: str | None = None  # the architecture
    cores: int | None = None
    gpu_cores: int | None = None
    memory_bytes: int | None = None
    system: str | None = None
    system_version: str | None = None
    backend: str | None = None
    blas: str | None = None
    load_average: float | None = None
    thermal_pressure: str | None = None
    copy_bytes_per_second: float | None = None  # read and written bytes; every bound stands on it
    read_bytes_per_second: float | None = None
    nominal_bytes_per_second: float | None = None


@dataclass(frozen=True, config=STRICT)
class Document:
    """A run of the benchmark."""

    created: str  # ISO 8601, UTC
    command: str
    rows: tuple[Row, ...]
    suite: str | None = None
    partial: bool = False
    machine: Machine = Field(default_factory=Machine)
    versions: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None  # of this package's sources; None outside a git checkout
    dirty: bool | None = None  # whether the checkout had changes that were not committed
    notes: tuple[str, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    schema: str = SCHEMA

    @property
    def processes(self) -> int:
        """How many processes measured."""
        return max((len(m.processes) for row in self.rows for m in row.metrics.values()), default=1)


# --- what follows from trials


def completed(document: Document) -> Document:
    """Compute summaries, bounds, shares of the bound and ratios from trials, bytes and bandwidth.

    Raises `BenchmarkError` naming the place of what nothing can follow from.
    """
    check(document)
    copy = document.machine.copy_bytes_per_second
    rows = tuple(bounded(row, copy) for row in document.rows)
    ratios = []
    for number, one in enumerate(document.ratios):
        ours, theirs = (rows[index].metrics[one.metric] for index in (one.row, one.against))
        try:
            low, middle, high = paired_ratio(ours.processes, theirs.processes)
        except ValueError:
            raise BenchmarkError(
                f"ratios[{number}] needs two pairs of trials above 0 of rows[{one.row}] and "
                f"rows[{one.against}]"
            ) from None
        ratios.append(replace(one, ratio=middle, low=low, high=high))
    return replace(document, rows=rows, ratios=tuple(ratios))


def bounded(row: Row, copy_bytes_per_second: float | None) -> Row:
    """Summarise the trials and judge the decode rate by what a copy reaches."""
    metrics = {
        name: Metric.of_processes(m.processes, METRICS[name]) for name, m in row.metrics.items()
    }
    moved, bound, share = sum((row.bytes_per_token or {}).values()), None, None
    if moved > 0 and copy_bytes_per_second:
        bound = copy_bytes_per_second / moved
        share = 100 * metrics[DECODE].median / bound if DECODE in metrics else None
    return replace(row, metrics=metrics, bound_tokens_per_second=bound, percent_of_bound=share)


def merge(documents: Sequence[Document]) -> Document:
    """Put documents of the same command, one or more processes each, together into one.

    Cases and notes of all are kept; a case that a process did not measure has no trials of it.
    Raises `BenchmarkError` for documents of different commands, commits or machines.
    """
    if not documents:
        raise BenchmarkError("nothing to merge: give at least one result")
    first = documents[0]
    for other in documents[1:]:
        for name in ("command", "suite", "commit", "dirty"):
            same(name, getattr(first, name), getattr(other, name))
        for item in fields(Machine):
            if item.name not in MEASURED:
                same(item.name, *(getattr(one.machine, item.name) for one in (first, other)))
    measured = {
        name: median(found)
        for name in ("copy_bytes_per_second", "read_bytes_per_second")
        if (found := [v for one in documents if (v := getattr(one.machine, name)) is not None])
    }
    cases = list(dict.fromkeys(row.case for one in documents for row in one.rows))
    pairs = {
        (one.rows[r.row].case, one.rows[r.against].case, r.metric): None
        for one in documents
        for r in one.ratios
    }
    merged = replace(
        first,
        rows=tuple(merged_row(case, documents) for case in cases),
        partial=any(one.partial for one in documents),
        machine=replace(first.machine, **measured),
        versions={name: text for one in documents for name, text in one.versions.items()},
        notes=merged_notes([one.notes for one in documents]),
        ratios=tuple(
            Ratio(metric, cases.index(ours), cases.index(theirs)) for ours, theirs, metric in pairs
        ),
    )
    return completed(merged)


MEASURED = (  # facts of the machine that differ from process to process
    "load_average",
    "thermal_pressure",
    "copy_bytes_per_second",
    "read_bytes_per_second",
)


def same(name: str, one: Any, other: Any) -> None:
    if one != other:
        raise BenchmarkError(
            f"results to merge differ in {name.replace('_', ' ')}: {one!r} and {other!r}; "
            "merge processes of one command on one machine"
        )


def merged_row(case: Case, documents: Sequence[Document]) -> Row:
    found = [next((row for row in one.rows if row.case == case), Row(case)) for one in documents]
    names = [name for name in METRICS if any(name in row.metrics for row in found)]
    metrics = {}
    for name in names:
        processes: list[tuple[float, ...]] = []
        for row, one in zip(found, documents, strict=True):
            metric = row.metrics.get(name)
            processes += metric.processes if metric else [()] * one.processes
        metrics[name] = Metric.of_processes(processes, METRICS[name])
    agreed = [row.agrees for row in found if row.agrees is not None]
    return Row(
        case,
        metrics,
        next((row.bytes_per_token for row in found if row.bytes_per_token), None),
        agrees=all(agreed) if agreed else None,
        parts_at=min((row.parts_at for row in found if row.parts_at is not None), default=None),
        notes=merged_notes([row.notes for row in found]),
    )


def merged_notes(of_each: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Keep what all processes say once, and say of the rest whose it is."""
    shared = [note for note in of_each[0] if all(note in notes for notes in of_each)]
    own = [
        f"process {number}: {note}"
        for number, notes in enumerate(of_each, 1)
        for note in notes
        if note not in shared
    ]
    return tuple(dict.fromkeys([*shared, *own]))


def check(document: Document) -> None:
    """Raise `BenchmarkError` for unknown metrics, processes without a place in the document, and
    ratios of rows that were not compared.
    """
    for number, row in enumerate(document.rows):
        for name, metric in row.metrics.items():
            here = f"rows[{number}].metrics.{name}"
            if name not in METRICS:
                known = ", ".join(METRICS)
                raise BenchmarkError(f"{here} is not a metric of this schema; known: {known}")
            if len(metric.processes) != document.processes or not metric.values:
                raise BenchmarkError(
                    f"{here}.processes has {len(metric.values)} trials in {len(metric.processes)} "
                    f"lists; expected at least one trial, in {document.processes} lists"
                )
    for number, ratio in enumerate(document.ratios):
        here, rows = f"ratios[{number}]", document.rows
        for place, index in (("row", ratio.row), ("against", ratio.against)):
            if not 0 <= index < len(rows):
                raise BenchmarkError(
                    f"{here}.{place} is {index}; expected the index of one of {len(rows)} rows"
                )
            if ratio.metric not in rows[index].metrics:
                raise BenchmarkError(
                    f"{here}.metric is {ratio.metric!r}, which rows[{index}] has not measured"
                )
        ours, theirs = rows[ratio.row].case, rows[ratio.against].case
        if ours.engine == theirs.engine or replace(ours, engine=theirs.engine) != theirs:
            raise BenchmarkError(
                f"{here}.against is {ratio.against}; expected the row of another engine in the "
                f"case of rows[{ratio.row}]"
            )


# --- files


def to_json(document: Document) -> str:
    return json.dumps(asdict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save(document: Document, path: str | Path) -> None:
    """Write the document as JSON. Raises `BenchmarkError` where that is impossible; an older file
    is then left as it was.
    """
    write_file(path, to_json(document))


def write_file(path: str | Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content`, all of it or nothing. Raises `BenchmarkError`."""
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
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
        raise BenchmarkError(
            f"cannot read {path}: {reason}; give a file that `openelm benchmark --output` wrote"
        ) from None
    try:
        return from_json(data)
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: {error}") from None


def from_json(data: Any) -> Document:
    """Return the document of parsed JSON. Raises `BenchmarkError` naming the place of what is
    wrong.
    """
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (SCHEMA, OLD_SCHEMA):
        raise BenchmarkError(f"schema is {schema!r}; this version reads {SCHEMA!r}")
    old = schema == OLD_SCHEMA
    try:
        text = json.dumps(upgraded(data) | {"schema": SCHEMA} if old else data)
        document = TypeAdapter(Document).validate_json(text)
    except ValidationError as error:
        raise BenchmarkError(complaint(error.errors()[0])) from None
    truth = completed(document)
    stored = replace(document, ratios=truth.ratios) if old else document
    refuse_difference(asdict(stored), asdict(truth))
    return truth


def refuse_difference(stored: Any, truth: Any, place: str = "") -> None:
    """Raise `BenchmarkError` for the first stored value that is not the one its trials give."""
    if isinstance(stored, dict):
        for key, value in stored.items():
            refuse_difference(value, truth[key], f"{place}.{key}" if place else key)
    elif isinstance(stored, tuple):
        for number, pair in enumerate(zip(stored, truth, strict=True)):
            refuse_difference(*pair, f"{place}[{number}]")
    elif stored != truth and not (
        isinstance(stored, float)
        and isinstance(truth, float)
        and math.isclose(stored, truth, rel_tol=1e-6, abs_tol=1e-12)
    ):
        raise BenchmarkError(f"{place} is {stored!r}, but {truth!r} follows from the trials")


EXPECTED = {  # the kinds of pydantic's errors
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a finite number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "dataclass_type": "an object",
    "greater_than_equal": "a number from 1 up",
}


def complaint(error: Any) -> str:
    """Return pydantic's error as a line that names the place and what is expected there."""
    place = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in error["loc"])[1:]
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{place} is not a key of this schema; leave it out"
    given = repr(error["input"])
    given = f"{given[:40]}..." if len(given) > 43 else given
    return f"{place} is {given}; expected {EXPECTED.get(error['type'], error['msg'])}"


RENAMED = {
    "bandwidth_bytes_per_second": "copy_bytes_per_second",
    "nominal_bandwidth_bytes_per_second": "nominal_bytes_per_second",
}


def upgraded(value: Any) -> Any:
    """Return what stands in a file of the schema before as this one writes it: all trials are those
    of one process; figures of ratios go, as they were computed in another way.
    """
    if isinstance(value, list):
        return [upgraded(item) for item in value]
    if not isinstance(value, dict):
        return value
    new = {RENAMED.get(key, key): upgraded(item) for key, item in value.items()}
    if "values" in new:
        new["processes"] = [new.pop("values")]
    if "against" in new:
        new = {key: item for key, item in new.items() if key not in ("ratio", "low", "high")}
    return new
