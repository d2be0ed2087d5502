"""The result document: what was measured, on what machine, by which command, in one checked schema.

A figure holds the trials of several processes, because processes differ by more than their trials
tell. `Metric.of` and `completed` compute all that follows from trials; `load` refuses a file in
which a stored summary, bound or ratio is not what its trials give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from openelm_mlx.benchmarks.results.first_run import STRICT, Amount, Count, FirstRun
from openelm_mlx.benchmarks.results.statistics import Processes, paired_ratio, process_medians
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import replacing

SCHEMA, OLD_SCHEMA = "openelm-mlx benchmark 2", "openelm-mlx benchmark 1"

# name of a metric -> its unit
METRICS = {
    "prefill_tokens_per_second": "tokens/s",
    "decode_tokens_per_second": "tokens/s",
    "time_to_first_token_seconds": "s",
    "time_to_first_token_reused_seconds": "s",  # all but 8 tokens of the prompt in the cache
    "startup_seconds": "s",  # a new process, from its start to its first token
    "load_seconds": "s",
    "peak_memory_bytes": "bytes",
    "tokens_per_pass": "tokens",  # of the target model, under speculation
    "kl_mean": "nats",
    "top_1_agreement": "share",
}
HIGHER_IS_BETTER = ("tokens/s", "tokens", "share")
DECODE = "decode_tokens_per_second"


@dataclass(frozen=True, config=STRICT)
class Metric:
    """One figure: the trials of each process (none of one that did not measure it), the median of
    the processes' medians, and the quartiles of all trials.
    """

    unit: str
    processes: tuple[tuple[Amount, ...], ...]
    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> Metric:
        """Return the metric of one process's trials."""
        return cls.of_processes([tuple(values)], unit)

    @classmethod
    def of_processes(cls, processes: Processes, unit: str) -> Metric:
        """Summarise trials. Raises `BenchmarkError` if there are none."""
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


@dataclass(frozen=True, config=STRICT)
class Case:
    """The subject of a row: rows of two documents with equal cases are the same measurement."""

    engine: str  # "openelm-mlx" or a peer's name
    model: str
    dtype: str  # of the activations
    bits: Count | None  # of the weights; None if they are unquantized, or mixed in the folder
    bits_per_weight: Amount | None
    prompt_tokens: Count
    generation_tokens: Count
    batch_size: Count = 1
    cache: str = "plain"
    speculation: str | None = None  # "prompt-lookup" or "draft NAME"
    random_weights: bool = False

    def __str__(self) -> str:
        """Return the case in few words, for messages."""
        weights = f"{self.bits}-bit" if self.bits else self.dtype
        parts = [self.engine, self.model, weights, f"{self.prompt_tokens}+{self.generation_tokens}"]
        parts += [f"batch {self.batch_size}"] * (self.batch_size > 1)
        parts += [self.cache] * (self.cache != "plain") + [self.speculation or ""]
        return " ".join(filter(None, parts))


@dataclass(frozen=True, config=STRICT)
class Row:
    """A case with its metrics; a row that was not timed has none, and says why in its notes."""

    case: Case
    metrics: dict[str, Metric] = Field(default_factory=dict)
    bytes_per_token: dict[str, Amount] | None = None  # by part of the model
    bound_tokens_per_second: float | None = None  # at which a copy moves the bytes of a token
    percent_of_bound: float | None = None
    agrees: bool | None = None  # whether a peer's tokens are ours
    parts_at: int | None = None  # index of the first token that differs
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class Ratio:
    """A metric of one row over that of another, in paired trials, with its 95 % interval, which
    `completed` computes.
    """

    metric: str
    row: int  # index of one in the document
    against: int
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, config=STRICT)
class Machine:
    """Facts of the machine from before the run; None is unknown."""

    chip: str | None = None
    processor: str | None = None  # what tells processors of one name apart
    machine: str | None = None  # the architecture
    cores: Count | None = None
    gpu_cores: Count | None = None
    memory_bytes: Count | None = None
    system: str | None = None
    system_version: str | None = None
    backend: str | None = None
    blas: str | None = None
    kernels: str | None = None  # those of ours that a GPU runs, by name
    load_average: Amount | None = None
    thermal_pressure: str | None = None
    copy_bytes_per_second: Amount | None = None  # read and written bytes; every bound stands on it
    read_bytes_per_second: Amount | None = None
    nominal_bytes_per_second: Amount | None = None


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
    first_run: FirstRun | None = None  # of `openelm doctor --full`
    schema: str = SCHEMA

    @property
    def processes(self) -> int:
        """How many processes measured."""
        return max((len(m.processes) for row in self.rows for m in row.metrics.values()), default=1)


# --- what follows from trials


def completed(document: Document) -> Document:
    """Compute summaries, bounds and ratios. Raises `BenchmarkError` with the place of a mistake."""
    check(document)
    copy = document.machine.copy_bytes_per_second
    rows = tuple(bounded(row, copy) for row in document.rows)
    ratios = []
    for number, one in enumerate(document.ratios):
        ours, theirs = (rows[index].metrics[one.metric] for index in (one.row, one.against))
        try:
            low, middle, high = paired_ratio(ours.processes, theirs.processes)
        except ValueError:
            raise BenchmarkError(f"ratios[{number}] needs two pairs of trials above 0") from None
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


def check(document: Document) -> None:
    """Raise `BenchmarkError` for metrics and ratios that do not fit the rest of the document."""
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
        compared = [
            document.rows[i] for i in (ratio.row, ratio.against) if 0 <= i < len(document.rows)
        ]
        engines = {row.case.engine for row in compared if ratio.metric in row.metrics}
        if len(engines) < 2 or len({replace(row.case, engine="") for row in compared}) > 1:
            raise BenchmarkError(
                f"ratios[{number}] is of {ratio.metric} in rows {ratio.row} and {ratio.against}; "
                "expected the rows of two engines that have measured it in the same case"
            )


# --- files


def to_json(document: Document) -> str:
    return json.dumps(asdict(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save(document: Document, path: str | Path) -> None:
    """Write the document as JSON. Raises `BenchmarkError`, and leaves an older file as it was."""
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
    """Read and check a document. Raises `BenchmarkError` with the file and place of a mistake."""
    try:
        return from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except BenchmarkError as error:
        raise BenchmarkError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON ({error})"
        raise BenchmarkError(
            f"cannot read {path}: {reason}; give a file that `openelm benchmark --output` wrote"
        ) from None


def from_json(data: Any) -> Document:
    """Return the document of parsed JSON. Raises `BenchmarkError` with the place of a mistake."""
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (SCHEMA, OLD_SCHEMA):
        raise BenchmarkError(f"schema is {schema!r}; this version reads {SCHEMA!r}")
    old = schema == OLD_SCHEMA
    try:
        text = json.dumps(upgraded(data) | {"schema": SCHEMA} if old else data)
        document = TypeAdapter(Document).validate_json(text)
    except ValidationError as error:
        raise BenchmarkError(complaint(error.errors()[0])) from None
    try:
        truth = completed(document)
    except (OverflowError, ValidationError):
        raise BenchmarkError("its figures are too far apart to be computed with") from None
    stored = replace(document, ratios=truth.ratios) if old else document
    refuse_difference(asdict(stored), asdict(truth))
    return truth


def refuse_difference(stored: Any, truth: Any, place: str = "") -> None:
    """Raise `BenchmarkError` for the first stored value that is not the one its trials give."""
    if isinstance(stored, dict | tuple):
        for key, value in stored.items() if isinstance(stored, dict) else enumerate(stored):
            refuse_difference(value, truth[key], place + step(key))
    elif stored != truth and not (
        {type(stored), type(truth)} == {float} and math.isclose(stored, truth, rel_tol=1e-6)
    ):
        raise BenchmarkError(f"{place[1:]} is {stored!r}, but {truth!r} follows from the trials")


def step(key: int | str) -> str:
    return f"[{key}]" if isinstance(key, int) else f".{key}"


EXPECTED = {  # by the beginning of pydantic's name for an error
    "int": "a whole number",
    "float": "a finite number",
    "finite": "a finite number",
    "greater": "a number from {ge:g} up",
    "string": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "an object",
    "dataclass": "an object",
}


def complaint(error: Any) -> str:
    """Return pydantic's error as a line that names the place and what is expected there."""
    place, kind = "".join(map(step, error["loc"]))[1:], error["type"]
    if kind in ("missing", "unexpected_keyword_argument"):
        return f"{place} is {'missing' if kind == 'missing' else 'not a key of this schema'}"
    given = given if len(given := repr(error["input"])) < 44 else f"{given[:40]}..."
    wanted = EXPECTED.get(kind.split("_")[0], "{0}").format(error["msg"], **error.get("ctx", {}))
    return f"{place or 'the document'} is {given}; expected {wanted}"


RENAMED = {
    "bandwidth_bytes_per_second": "copy_bytes_per_second",
    "nominal_bandwidth_bytes_per_second": "nominal_bytes_per_second",
}


def upgraded(value: Any) -> Any:
    """Return what stands in a file of the schema before as this one writes it: all trials are of
    one process, and ratios lose their figures, which were computed in another way.
    """
    if isinstance(value, list):
        return [upgraded(item) for item in value]
    if not isinstance(value, dict):
        return value
    left_out = ("ratio", "low", "high") if "against" in value else ()
    new = {RENAMED.get(k, k): upgraded(item) for k, item in value.items() if k not in left_out}
    return new | {"processes": [new.pop("values")]} if "values" in new else new
