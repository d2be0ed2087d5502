"""What changes from one model to another on the same questions, taken question by question.

The noise of which questions a task has is in both scores alike, and cancels in their difference: it
shows changes that are far smaller than two separate standard errors.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from openelm_mlx.evaluate import tables

if TYPE_CHECKING:
    from rich.console import Group

    from openelm_mlx.evaluate.report import Report


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


@dataclass(frozen=True)
class Differences:
    """How two models differ on the same questions. `print` it, or a console of rich."""

    first: str
    second: str
    rows: tuple[Difference, ...]

    @classmethod
    def of(cls, first: Report, second: Report) -> Differences:
        """Compare two reports in every metric of every task that both have.

        A group's difference is over all its questions, each of which counts the same.
        """
        from openelm_mlx.evaluate.report import SHARES, leaves

        found = []
        for cell in first.cells:
            for metric in (score.metric for score in cell.scores):
                scale = 100 if metric.split()[0] in SHARES else 1
                pairs = []
                for task in leaves(first.results, cell.task):
                    one, other = answered(first, task, metric), answered(second, task, metric)
                    pairs += [(scale * one[n], scale * other[n]) for n in one if n in other]
                if pairs:
                    found.append(of_pairs(cell.task, cell.title, metric, pairs))
        return cls(first.model, second.model, tuple(found))

    @property
    def title(self) -> str:
        return f"{self.first} against {self.second}, question by question"

    def grid(self) -> list[list[str]]:
        """Return the table, its head first: a line for each metric of a task."""
        names = ["first", "second"]
        lines = [["task", "questions", "metric", *names, "difference ± s.e.", "better", "worse"]]
        for row in self.rows:
            spread = "" if row.stderr is None else f" ±{row.stderr:.2f}"
            scores = [f"{row.first:.2f}", f"{row.second:.2f}", f"{row.difference:+.2f}{spread}"]
            line = [row.title, f"{row.questions:,}", row.metric, *scores]
            lines.append([*line, f"{row.better:,}", f"{row.worse:,}"])
        return lines

    @property
    def notes(self) -> list[str]:
        return [
            "better, worse: questions at which the first model scores higher or lower.",
            "s.e.: the standard error of the difference, from the differences at each question.",
        ]

    def as_dict(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        return tables.markdown(self.title, self.grid(), self.notes)

    def __rich__(self) -> Group:
        return tables.on_terminal(self.title, self.grid(), self.notes)


def answered(report: Report, task: str, metric: str) -> dict[int, float]:
    """Return the score of each question of a task, by its number."""
    name, _, kind = metric.partition(" ")
    samples = report.results["samples"].get(task, ())
    kept = [sample for sample in samples if sample["filter"] == (kind or "none")]
    scores = {sample["doc_id"]: sample.get(name) for sample in kept}
    return {key: float(value) for key, value in scores.items() if isinstance(value, (int, float))}


def of_pairs(task: str, title: str, metric: str, pairs: list[tuple[float, float]]) -> Difference:
    changes = [one - other for one, other in pairs]
    return Difference(
        task,
        title,
        metric,
        len(pairs),
        fmean(one for one, _ in pairs),
        fmean(other for _, other in pairs),
        fmean(changes),
        stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None,
        sum(change > 0 for change in changes),
        sum(change < 0 for change in changes),
    )
