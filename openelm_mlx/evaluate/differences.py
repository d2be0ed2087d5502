"""What changes from one model to another on the same questions, taken question by question.

The noise of which questions a task has is in both scores alike, and cancels in their difference: it
shows changes that are far smaller than two separate standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import EvaluationError
from openelm_mlx.evaluate import tables

if TYPE_CHECKING:
    from rich.console import Group

    from openelm_mlx.evaluate.report import Cell, Report

ALL = "all questions"
ACCURACIES = ("acc", "acc_norm")
Pair = tuple[float, float]  # the first model's score at a question, and the second's


@dataclass(frozen=True)
class Difference:
    """A metric of a task for two models, with scores and differences in the unit of the report."""

    task: str
    title: str
    metric: str
    questions: int
    first: float
    second: float
    difference: float  # the first less the second
    stderr: float | None  # of the difference; None for a single question
    better: int  # questions at which the first has the higher score
    worse: int
    p: float  # of a split of these as uneven as this if either were as likely: McNemar's exact test


@dataclass(frozen=True)
class Differences:
    """How two models differ on the same questions. `print` it, or a console of rich."""

    first: str
    second: str
    rows: tuple[Difference, ...]

    @classmethod
    def of(cls, first: Report, second: Report) -> Differences:
        """Compare two reports in every metric of every task that both have.

        A group's difference is over all its questions, each of which counts the same. So is that of
        `ALL` tasks: with acc, and with acc_norm where there is one. Raises `EvaluationError` if two
        questions of one number are not the same.
        """
        found, whole = [], {metric: list[Pair]() for metric in ACCURACIES}
        for cell in first.cells:
            pairs = {
                score.metric: paired(first, second, cell, score.metric) for score in cell.scores
            }
            found += [
                of_pairs(cell.task, cell.title, *entry) for entry in pairs.items() if entry[1]
            ]
            for metric in whole:
                whole[metric] += pairs.get(metric, pairs.get(ACCURACIES[0], []))
        if len(first.cells) > 1:
            used = {row.metric for row in found}
            found += [of_pairs(ALL, ALL, *one) for one in whole.items() if one[0] in used]
        return cls(first.model, second.model, tuple(found))

    @property
    def title(self) -> str:
        return f"{self.first} against {self.second}, question by question"

    def grid(self) -> list[list[str]]:
        """Return the table, its head first: a line for each metric of a task."""
        head = ["task", "metric", "first", "second", "change ±s.e.", "better", "worse", "p"]
        lines = [head]
        for row in self.rows:
            spread = "" if row.stderr is None else f" ±{row.stderr:.2f}"
            scores = [f"{row.first:.2f}", f"{row.second:.2f}", f"{row.difference:+.2f}{spread}"]
            counts = [f"{row.better:,}", f"{row.worse:,}", f"{row.p:.2g}"]
            lines.append([row.title, row.metric, *scores, *counts])
        return lines

    @property
    def notes(self) -> list[str]:
        return [
            f"first: {self.first}; second: {self.second}; change: the first score less the second; "
            "s.e.: its standard error, from the changes at each question.",
            "better, worse: questions at which the first model scores higher or lower; p: the "
            "chance of numbers as uneven if neither model were better (McNemar's exact test).",
        ]

    def as_dict(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        return tables.markdown(self.title, self.grid(), self.notes)

    def __rich__(self) -> Group:
        return tables.on_terminal(self.title, self.grid(), self.notes)


def paired(first: Report, second: Report, cell: Cell, metric: str) -> list[Pair]:
    """Return what both models score at each question of a task or group that both were asked."""
    from openelm_mlx.evaluate.report import SHARES, leaves

    pairs, scale = [], 100 if metric.split()[0] in SHARES else 1
    for task in leaves(first.results, cell.task):
        one, other = answered(first, task, metric), answered(second, task, metric)
        for number in sorted(one.keys() & other.keys()):
            (question, score), (their_question, theirs) = one[number], other[number]
            if question != their_question:
                what = f"question {number} of {task} is not the same for {first.model}"
                raise EvaluationError(f"{what} and {second.model}; ask both of the same data")
            pairs.append((scale * score, scale * theirs))
    return pairs


def answered(report: Report, task: str, metric: str) -> dict[int, tuple[str, float]]:
    """Return lm-eval's hash of each question of a task and its score, by its number."""
    name, _, kind = metric.partition(" ")
    samples = report.results["samples"].get(task, ())
    kept = [sample for sample in samples if sample["filter"] == (kind or "none")]
    scores = {one["doc_id"]: (one["doc_hash"], one.get(name)) for one in kept}
    return {n: (of, float(x)) for n, (of, x) in scores.items() if isinstance(x, (int, float))}


def of_pairs(task: str, title: str, metric: str, pairs: Sequence[Pair]) -> Difference:
    changes = [one - other for one, other in pairs]
    better, worse = (sum(sign * change > 0 for change in changes) for sign in (1, -1))
    return Difference(
        task,
        title,
        metric,
        len(pairs),
        fmean(one for one, _ in pairs),
        fmean(other for _, other in pairs),
        fmean(changes),
        stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
        better,
        worse,
        mcnemar(better, worse),
    )


def mcnemar(better: int, worse: int) -> float:
    """Return the probability of a split of fair coins that is as uneven as this one or more so."""
    tosses, term, tail = better + worse, 1, 1
    for heads in range(min(better, worse)):
        term = term * (tosses - heads) // (heads + 1)
        tail += term
    return min(1.0, 2 * tail / 2**tosses)
