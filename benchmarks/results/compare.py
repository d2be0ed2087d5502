"""Two documents against each other: what has become faster or slower beyond what chance does."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.measure.machine import BUSY
from openelm_mlx.benchmarks.results.bootstrap import Interval, interval, standard_error
from openelm_mlx.benchmarks.results.document import Case, Document, Metric, Row
from openelm_mlx.errors import BenchmarkError

if TYPE_CHECKING:
    from rich.console import Console

CONFIDENCE = 0.95
RESOLUTION = {
    "s": 1e-4,
    "bytes": 2**20,
    "nats": 1e-4,
    "share": 1e-3,
}  # least half width of an interval, by unit
TIMED = ("s", "tokens/s")
MACHINE = ("chip", "cores", "memory_bytes", "system", "backend", "blas")


@dataclass(frozen=True)
class Difference:
    """One metric of one case in both documents."""

    case: Case
    metric: str
    before: Interval
    after: Interval
    higher_is_better: bool

    @property
    def significant(self) -> bool:
        """Whether the intervals keep apart."""
        return not self.before.overlaps(self.after)

    @property
    def better(self) -> bool:
        return (self.after.middle > self.before.middle) == self.higher_is_better

    @property
    def change(self) -> float:
        """Of the median, as a share of that before."""
        return self.after.middle / self.before.middle - 1 if self.before.middle else 0.0

    @property
    def verdict(self) -> str:
        if not self.significant:
            return "same"
        return "better" if self.better else "worse"


@dataclass(frozen=True)
class Comparison:
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        return any(d.verdict == "worse" for d in self.differences)


def compare(before: Document, after: Document) -> Comparison:
    """Every metric that both documents have for the same case, over at least two trials each.

    A difference counts where the bootstrap intervals of the two medians do not overlap. Their
    confidence is raised with the number of comparisons (Bonferroni), so that two runs of the same
    thing pass in all of them with 95 %. No time is taken for surer than the typical one of its run:
    few trials that happen to lie close do not make a steady machine. Raises `BenchmarkError` when
    the documents have nothing in common.
    """
    pairs = list(common(before, after))
    if not pairs:
        raise BenchmarkError(
            "the two results have no measurement in common; run the same suite on the same models twice"
        )
    confidence = 1 - (1 - CONFIDENCE) / len(pairs)
    noise = typical_error(before), typical_error(after)
    found = tuple(
        Difference(
            case,
            name,
            bounds(a, confidence, noise[0]),
            bounds(b, confidence, noise[1]),
            a.higher_is_better,
        )
        for case, name, a, b in pairs
    )
    return Comparison(found, tuple(warnings(before, after)))


def common(before: Document, after: Document) -> list[tuple[Case, str, Metric, Metric]]:
    rows = {key(row): row for row in before.rows}
    found = []
    for row in after.rows:
        if (other := rows.get(key(row))) is None:
            continue
        for name, metric in row.metrics.items():
            if (
                name in other.metrics
                and min(len(metric.values), len(other.metrics[name].values)) >= 2
            ):
                found.append((row.case, name, other.metrics[name], metric))
    return found


def key(row: Row) -> Case:
    """The case, its bits per weight to a tenth: group sizes tell cases apart, a model converted
    anew does not.
    """
    bits = row.case.bits_per_weight
    return replace(row.case, bits_per_weight=None if bits is None else round(bits, 1))


def typical_error(document: Document) -> float:
    """Median over the times and rates of a run of their standard error, as a share of the
    figure.
    """
    metrics = [metric for row in document.rows for metric in row.metrics.values()]
    found = [
        standard_error(metric.values) / metric.median
        for metric in metrics
        if metric.unit in TIMED and len(metric.values) > 1 and metric.median > 0
    ]
    return median(found) if found else 0.0


def bounds(metric: Metric, confidence: float, typical: float) -> Interval:
    least = typical * metric.median if metric.unit in TIMED else 0.0
    return interval(metric.values, confidence, RESOLUTION.get(metric.unit, 0.0), least)


def warnings(before: Document, after: Document) -> list[str]:
    """What makes two documents hard to compare."""
    notes = []
    for name in MACHINE:
        old, new = getattr(before.machine, name), getattr(after.machine, name)
        if not alike(old, new):
            told = ("unknown" if value is None else value for value in (old, new))
            notes.append(
                "another machine: {} {} before, {} after".format(name.replace("_", " "), *told)
            )
    for name in sorted(before.versions.keys() & after.versions.keys()):
        if before.versions[name] != after.versions[name]:
            notes.append(f"{name} {before.versions[name]} before, {after.versions[name]} after")
    for document, when in ((before, "first"), (after, "second")):
        if document.partial:
            notes.append(f"the {when} result is partial: it was interrupted")
        load, cores = document.machine.load_average, document.machine.cores
        if isinstance(load, (int, float)) and isinstance(cores, int) and load > BUSY * cores:
            notes.append(
                f"the machine was busy before the {when} run: load {load:.1f} on {cores} cores"
            )
    missing = len({key(row) for row in before.rows} ^ {key(row) for row in after.rows})
    if missing:
        notes.append(f"{missing} {'case is' if missing == 1 else 'cases are'} in one result only")
    return notes


def alike(old: Any, new: Any) -> bool:
    """Tell whether two facts are those of one machine.

    The memory that a system reports differs by some pages from start to start.
    """
    if isinstance(old, int) and isinstance(new, int):
        return math.isclose(old, new, rel_tol=1e-3)
    return bool(old == new)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All of it for JSON: every figure with its two intervals, also where they show no
    difference.
    """
    differences = [
        {
            **asdict(d),
            "before": d.before._asdict(),
            "after": d.after._asdict(),
            "change": d.change,
            "verdict": d.verdict,
        }
        for d in comparison.differences
    ]
    facts = {
        "regressed": comparison.regressed,
        "smallest_change_that_would_have_shown": sensitivity(comparison),
    }
    return {**facts, "differences": differences, "notes": list(comparison.notes)}


def lines(comparison: Comparison) -> list[str]:
    """Describe every difference case by case, then how much could have been missed.

    Each is one line, however long.
    """
    from openelm_mlx.benchmarks.measure.harness import label

    found = []
    for d in comparison.differences:
        if d.significant:
            found.append(
                f"{d.verdict}: {label(d.case)}, {d.metric.replace('_', ' ')}: {d.before.middle:.4g} -> "
                f"{d.after.middle:.4g} ({d.change:+.1%})"
            )
    same = sum(not d.significant for d in comparison.differences)
    count = len(comparison.differences)
    found.append(
        f"{same} of {count} figures show no significant difference; smallest change that would have shown: "
        f"{sensitivity(comparison):.0%} (median over the figures)"
    )
    return found + [f"! {note}" for note in comparison.notes]


def sensitivity(comparison: Comparison) -> float:
    """Median over the figures of the change that the two intervals are wide enough to hide."""
    hidden = [
        (d.before.high - d.before.middle + d.after.high - d.after.middle) / abs(d.before.middle)
        for d in comparison.differences
        if d.before.middle
    ]
    return median(hidden) if hidden else 0.0


def show(comparison: Comparison, console: Console) -> None:
    colours = {"worse": "red", "better": "green"}
    for line in lines(comparison):
        console.print(line, style=colours.get(line.split(":")[0]), markup=False, highlight=False)
