"""Documents beside each other: processes of one run are merged, two runs are compared.

Times and rates are one family of tests: Welch's t on the logarithms of process medians, with Holm's
correction, so that two runs of the same thing pass in all of them with at least 95 %. A figure that
repeats another leaves the family, and one that no clock measures (bytes, losses) is compared by its
resolution. `tests/benchmarks/test_benchmark_compare.py` simulates how often this is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.results import PROCESSES
from openelm_mlx.benchmarks.results.document import (
    HIGHER_IS_BETTER,
    METRICS,
    Case,
    Document,
    Machine,
    Metric,
    Ratio,
    Row,
    completed,
)
from openelm_mlx.benchmarks.results.statistics import difference, holm, samples, student_t, welch
from openelm_mlx.errors import BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

CHANCE = 0.05
TIMED = ("s", "tokens/s")
# a smaller change is none: by unit, absolute and as a share
RESOLUTION = {"s": 1e-4, "bytes": 2**20, "nats": 1e-4, "share": 1e-3, "tokens": 1e-2}
RELATIVE = {"bytes": 0.01}
COPIES = {"prefill_tokens_per_second": "time_to_first_token_seconds"}  # of the prompt's length
SAME_MACHINE = ("chip", "processor", "cores", "memory_bytes", "system", "backend", "blas")
MEASURED = ("load_average", "thermal_pressure", "copy_bytes_per_second", "read_bytes_per_second")


def merge(documents: Sequence[Document]) -> Document:
    """Put the processes of one run together, in the order of their documents.

    A process has no trials of a case that it did not measure. Bandwidths become the median over the
    processes, and the load stays that of the first. Raises `BenchmarkError` for documents of
    different commands, commits or machines.
    """
    if not documents:
        raise BenchmarkError("nothing to merge: give at least one result")
    first, unmeasured = documents[0], dict.fromkeys(MEASURED)
    runs = [
        (one.command, one.suite, one.commit, one.dirty, replace(one.machine, **unmeasured))
        for one in documents
    ]
    if len(set(runs)) > 1:
        raise BenchmarkError(
            "the results to merge are of different commands, commits or machines; "
            "merge processes of one run"
        )
    bandwidths = {
        name: median(found)
        for name in MEASURED[2:]
        if (found := [value for one in documents if (value := getattr(one.machine, name))])
    }
    cases = list(dict.fromkeys(row.case for one in documents for row in one.rows))
    pairs = dict.fromkeys(
        (
            ratio.metric,
            cases.index(one.rows[ratio.row].case),
            cases.index(one.rows[ratio.against].case),
        )
        for one in documents
        for ratio in one.ratios
    )
    merged = replace(
        first,
        rows=tuple(merged_row(case, documents) for case in cases),
        partial=any(one.partial for one in documents),
        machine=replace(first.machine, **bandwidths),
        versions={name: text for one in documents for name, text in one.versions.items()},
        notes=tuple(dict.fromkeys(note for one in documents for note in one.notes)),
        ratios=tuple(Ratio(*pair) for pair in pairs),
    )
    return completed(merged)


def merged_row(case: Case, documents: Sequence[Document]) -> Row:
    found = [next((row for row in one.rows if row.case == case), Row(case)) for one in documents]
    metrics = {}
    for name in (name for name in METRICS if any(name in row.metrics for row in found)):
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
        notes=tuple(dict.fromkeys(note for row in found for note in row.notes)),
    )


# --- two runs


@dataclass(frozen=True)
class Difference:
    """One metric of one case in both documents.

    `smallest` is the change that would have shown, as a share; `chance` is how often two runs of
    the same thing would differ as much, corrected for all figures. Both are None if no test is
    made.
    """

    case: Case
    metric: str
    before: float
    after: float
    verdict: str  # "better", "worse" or "same"
    chance: float | None = None
    smallest: float | None = None

    @property
    def change(self) -> float:
        """The change of the median as a share of that before."""
        return self.after / self.before - 1 if self.before else 0.0


@dataclass(frozen=True)
class Comparison:
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return any(one.verdict == "worse" for one in self.differences)

    @property
    def sensitivity(self) -> float | None:
        """The smallest change that would have shown: the median over the tested figures."""
        found = [one.smallest for one in self.differences if one.smallest is not None]
        return median(found) if found else None


def compare(before: Document, after: Document) -> Comparison:
    """Judge every metric that both documents have for the same case.

    Raises `BenchmarkError` if they have nothing in common.
    """
    pairs = list(common(before, after))
    if not pairs:
        raise BenchmarkError(
            "the two results have no measurement in common; "
            "run the same suite on the same models twice"
        )
    family = {i: logarithms(pair) for i, pair in enumerate(pairs) if pair[2].unit in TIMED}
    chances = holm([welch(*logs) for logs in family.values()])
    tests = {
        i: (chance, smallest_change(*logs, len(family)))
        for (i, logs), chance in zip(family.items(), chances, strict=True)
    }
    found = tuple(judged(pair, *tests.get(i, (None, None))) for i, pair in enumerate(pairs))
    return Comparison(found, tuple(warnings(before, after)))


Pair = tuple[Case, str, Metric, Metric]


def common(before: Document, after: Document) -> Iterator[Pair]:
    """Yield the metrics of both documents that can be judged and do not repeat another: a time
    needs two values above 0 on either side.
    """
    rows = {key(row): row for row in before.rows}
    for row in after.rows:
        if (other := rows.get(key(row))) is None:
            continue
        shared = row.metrics.keys() & other.metrics.keys()
        for name in (name for name in row.metrics if name in shared):
            sides = other.metrics[name], row.metrics[name]
            values = [samples(metric.processes) for metric in sides]
            enough = min(map(len, values)) > 1 and min(map(min, values)) > 0
            if COPIES.get(name) not in shared and (enough or sides[0].unit not in TIMED):
                yield row.case, name, *sides


def key(row: Row) -> Case:
    """Return the case with its bits per weight to a tenth: group sizes tell cases apart, a model
    that was converted anew does not.
    """
    bits = row.case.bits_per_weight
    return replace(row.case, bits_per_weight=None if bits is None else round(bits, 1))


def logarithms(pair: Pair) -> tuple[list[float], list[float]]:
    before, after = (
        [math.log(value) for value in samples(metric.processes)] for metric in pair[2:]
    )
    return before, after


def smallest_change(before: Sequence[float], after: Sequence[float], tests: int) -> float:
    """Return the change that the first step of Holm's correction would have taken for one."""
    _, error, freedom = difference(before, after)
    return math.expm1(min(student_t(1 - CHANCE / tests, freedom) * error, 99))


def judged(pair: Pair, chance: float | None, smallest: float | None) -> Difference:
    case, name, before, after = pair
    limit = max(RESOLUTION.get(before.unit, 0), RELATIVE.get(before.unit, 0) * before.median)
    verdict = "same"
    if abs(after.median - before.median) > limit and (chance is None or chance < CHANCE):
        more = after.median > before.median
        verdict = "better" if more == (after.unit in HIGHER_IS_BETTER) else "worse"
    return Difference(case, name, before.median, after.median, verdict, chance, smallest)


# --- what makes two documents hard to compare


def warnings(before: Document, after: Document) -> Iterator[str]:
    if 1 in (before.processes, after.processes):
        yield (
            "a result of one process does not tell how processes differ, which by itself can look "
            f"like a change; measure both with --processes {PROCESSES}"
        )
    for name in SAME_MACHINE:
        one, other = getattr(before.machine, name), getattr(after.machine, name)
        if not alike(one, other):
            old, new = ("unknown" if value is None else value for value in (one, other))
            yield f"another machine: {name.replace('_', ' ')} {old} before, {new} after"
    old, new = ({"commit": d.commit or ""} | d.versions for d in (before, after))
    for name in old:
        if old[name] and new.get(name) and old[name] != new[name]:
            yield f"{name} {old[name]} before, {new[name]} after"
    for document, when in ((before, "first"), (after, "second")):
        if document.partial:
            yield f"the {when} result is partial: it was interrupted"
        if load := busy(document.machine):
            yield f"the machine was busy before the {when} run: {load}"
    missing = len({key(row) for row in before.rows} ^ {key(row) for row in after.rows})
    if missing:
        yield f"{missing} {'case is' if missing == 1 else 'cases are'} in one result only"


def busy(machine: Machine) -> str | None:
    """Return the load in words if others used the machine before the run: more than half a core's
    for each core.
    """
    load, cores = machine.load_average or 0, machine.cores or math.inf
    return f"load {load:.1f} on {cores} cores" if load > cores / 2 else None


def alike(old: Any, new: Any) -> bool:
    """Return whether two facts are those of one machine, whose memory differs by some pages from
    start to start.
    """
    if isinstance(old, int) and isinstance(new, int):
        return math.isclose(old, new, rel_tol=1e-3)
    return bool(old == new)


# --- the report


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return everything for JSON, also the figures that show no difference."""
    return {
        "regressed": comparison.regressed,
        "smallest_change_that_would_have_shown": comparison.sensitivity,
        "differences": [asdict(one) | {"change": one.change} for one in comparison.differences],
        "notes": list(comparison.notes),
    }


def lines(comparison: Comparison) -> list[str]:
    """Describe every difference, then how much could have been missed, a line each."""
    changed = [one for one in comparison.differences if one.verdict != "same"]
    found = [
        f"{one.verdict}: {one.case}, {one.metric.replace('_', ' ')}: {one.before:.4g} -> "
        f"{one.after:.4g} ({one.change:+.1%})"
        for one in changed
    ]
    count = len(comparison.differences)
    summary = f"{count - len(changed)} of {count} figures show no significant difference"
    if comparison.sensitivity is not None:
        least = "over 1000%" if comparison.sensitivity > 10 else f"{comparison.sensitivity:.0%}"
        shown = f"smallest change that would have shown: {least} (median over the times and rates)"
        summary += f"; {shown}"
    return [*found, summary, *(f"! {note}" for note in comparison.notes)]


def show(comparison: Comparison, console: Console) -> None:
    colours = {"worse": "red", "better": "green"}
    for line in lines(comparison):
        console.print(line, style=colours.get(line.split(":")[0]), markup=False, highlight=False)
