"""A report: the scores in lm-eval's results, beside the figures that Apple published.

Two things are not known about a figure of Apple's: which metric of the task it is, and how far it
is off by itself. So a verdict is given for the metric that is nearer to it, and the other one is
shown too. And the only standard error is that of our score, which tells how far it would be from
this one if other questions of the kind had been asked. Apple asked the same ones, so that the same
model should be much closer than two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from openelm_mlx.evaluate import tables
from openelm_mlx.evaluate.suites import (
    AVERAGE,
    LORA,
    SUITES,
    TASKS,
    Suite,
    Task,
    figures,
    row_of,
    source_of,
)
from openelm_mlx.files import read_own_json
from openelm_mlx.model.config import RECORD, OpenELMConfig

if TYPE_CHECKING:
    from rich.console import Group

    from openelm_mlx.engine.loading import Engine

SCHEMA = "openelm evaluation 1"
BOUND = 2  # standard errors of a verdict
MERGED = "merged"  # the record of a conversion says this of an adapter
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "pct_stereotype")  # shown in per cent
NEARER = "nearer"  # the name of an average over the metrics that verdicts are for


@dataclass(frozen=True)
class Score:
    """A metric of a task, in per cent if it is a share of the questions."""

    metric: str
    value: float
    stderr: float | None  # lm-eval's, for the choice of the questions; None if it gave none
    difference: float | None = None  # from Apple's figure

    @property
    def errors(self) -> float | None:
        """The difference in standard errors, None if either is unknown or all answers are alike."""
        return None if self.difference is None or not self.stderr else self.difference / self.stderr


@dataclass(frozen=True)
class Cell:
    """The scores of a task, or of a group of tasks, and the figure that Apple published for it."""

    task: str
    title: str
    shots: int | None
    asked: int  # questions
    of: int  # questions that the task has
    scores: tuple[Score, ...]
    version: str | None = None  # lm-eval's, of the task
    truncated: int = 0  # questions that lost their beginning, as they were longer than the context
    without_answer: int = 0  # questions whose right answer is none of their choices
    published: float | None = None  # in per cent, with two decimals
    compared: Score | None = None  # the score that is nearest to it

    @property
    def verdict(self) -> str | None:
        """Return "within 2" or "beyond 2", in standard errors, or None: without a figure to compare
        with, for a part of the questions, and without a standard error.
        """
        if self.compared is None or self.compared.errors is None or self.asked < self.of:
            return None
        return f"{'within' if abs(self.compared.errors) <= BOUND else 'beyond'} {BOUND}"

    def as_dict(self) -> dict[str, Any]:
        scores = [asdict(score) | {"errors": score.errors} for score in self.scores]
        compared = None if self.compared is None else self.compared.metric
        return asdict(self) | {"scores": scores, "compared": compared, "verdict": self.verdict}


@dataclass(frozen=True)
class Subject:
    """The model of a report, and the row of Apple's tables that it is compared with, if any."""

    name: str
    row: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, engine: Engine) -> Subject:
        """Find the row by the model's name, or by what the record of its conversion says it was.

        A model of another shape has none, nor has one with an adapter, but for CoreNet's own.
        """
        record = read_own_json(engine.path / RECORD)
        row = row_of(str(record.get("source") or engine.name))
        if row is None or not same_shape(row, engine.config):
            return cls(engine.name)
        merged = record.get("adapter") == MERGED and not row.endswith(LORA)
        if merged or engine.adapter is not None:
            note = "It has an adapter, so that it is not compared with Apple's figures."
            return cls(engine.name, None, (note,))
        quantized = (f"It is quantized; Apple's {row} was not.",) if engine.quantization else ()
        return cls(engine.name, row, quantized)


def same_shape(row: str, config: OpenELMConfig) -> bool:
    apples = OpenELMConfig.from_name(row.removesuffix(LORA))
    names = ("num_transformer_layers", "model_dim", "head_dim")
    return all(getattr(apples, name) == getattr(config, name) for name in names)


@dataclass(frozen=True)
class Report:
    """The scores of a model, and Apple's: `print` it, or give it to a console of rich."""

    model: str
    suite: str | None
    row: str | None
    cells: tuple[Cell, ...]
    average: Cell | None
    notes: tuple[str, ...]
    lm_eval: str | None
    results: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # lm-eval's

    @property
    def title(self) -> str:
        of = "" if self.suite is None else f", {SUITES[self.suite].title}"
        return f"{self.model}{of}" + (f", beside Apple's {self.row}" if self.compares else "")

    @property
    def compares(self) -> bool:
        """Whether any score has a figure of Apple's beside it."""
        return any(cell.published is not None for cell in self.cells)

    def grid(self) -> list[list[str]]:
        """Return the table, its head first: a line for each metric of a task."""
        cells = self.cells if self.average is None else (*self.cells, self.average)
        return tables.grid(cells, self.compares)

    def markdown(self) -> str:
        return tables.markdown(self.title, self.grid(), self.notes)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for JSON, with the source of Apple's figures."""
        found: dict[str, Any] = {"schema": SCHEMA, "model": self.model, "suite": self.suite}
        found |= {
            "row": self.row,
            "source": source_of(self.row) if self.row and self.compares else None,
        }
        average = None if self.average is None else self.average.as_dict()
        found |= {"tasks": [cell.as_dict() for cell in self.cells], "average": average}
        return found | {"notes": list(self.notes), "lm_eval": self.lm_eval}

    def __str__(self) -> str:
        return self.markdown()

    def __rich__(self) -> Group:
        return tables.on_terminal(self.title, self.grid(), self.notes)


def report(results: Mapping[str, Any], subject: Subject, suite: str | None = None) -> Report:
    """Read lm-eval's results: `results`, `n-shot`, `n-samples`, `versions`, `group_subtasks`.

    They may also have what `evaluate_tasks` adds, `truncated` and `without_answer`. Tasks of a
    group are in the score of the group. A score is compared with Apple's of the same task and shots
    in any table, and with none if a chat template was used.
    """
    chosen = None if suite is None else SUITES[suite]
    notes = list(subject.notes)
    if results.get("chat_template"):
        notes.append("Each question was put as a message of a chat.")
        if subject.row is not None:
            notes.append("Apple used no chat template, so that no figure of Apple's is shown.")
        subject = replace(subject, row=None)
    names = [name for name in top_level(results) if chosen is None or name in chosen.shots]
    if chosen is not None:
        names.sort(key=list(chosen.shots).index)
    cells = tuple(read_cell(results, name, subject.row) for name in names)
    whole = chosen is not None and set(names) == set(chosen.shots)
    average = average_cell(chosen, cells, subject.row) if chosen is not None and whole else None
    notes += tables.notes_on(cells, subject.row)
    version = results.get("lm_eval_version")
    row, name = subject.row, subject.name
    return Report(name, suite, row, cells, average, tuple(notes), version, results)


# --- from lm-eval's results


def top_level(results: Mapping[str, Any]) -> list[str]:
    """Return the tasks and groups that have a score and are in no group that has one."""
    scored = [name for name, found in results["results"].items() if metrics_of(found)]
    groups = results.get("group_subtasks", {})
    inner = {child for name in scored for child in groups.get(name, ())}
    while more := {child for name in inner for child in groups.get(name, ())} - inner:
        inner |= more
    return [name for name in scored if name not in inner]


def leaves(results: Mapping[str, Any], name: str) -> list[str]:
    """Return the tasks that a group consists of, or the task itself."""
    inside = results.get("group_subtasks", {}).get(name)
    return [leaf for child in inside for leaf in leaves(results, child)] if inside else [name]


def metrics_of(found: Mapping[str, Any]) -> dict[str, str]:
    """Return lm-eval's key of each metric, by its name with the filter, if there is one."""
    keys = [key for key, value in found.items() if "," in key and isinstance(value, (int, float))]
    keys = [key for key in keys if not key.partition(",")[0].endswith("_stderr")]
    return {key.removesuffix(",none").replace(",", " "): key for key in keys}


def read_cell(results: Mapping[str, Any], name: str, row: str | None) -> Cell:
    found, tasks = results["results"][name], leaves(results, name)
    counts = [results["n-samples"][task] for task in tasks]
    shots = results.get("n-shot", {}).get(name, results.get("n-shot", {}).get(tasks[0]))
    truncated, without_answer = (
        sum(results.get(key, {}).get(task, 0) for task in tasks)
        for key in ("truncated", "without_answer")
    )
    version = results.get("versions", {}).get(name)
    known = TASKS.get(name, Task(name, 0, ()))
    metrics = metrics_of(found)
    wanted = [metric for metric in known.metrics if metric in metrics]
    scores = [read_score(found, metric) for metric in wanted or metrics]
    cell = Cell(
        name,
        known.title,
        shots,
        sum(count["effective"] for count in counts),
        sum(count["original"] for count in counts),
        tuple(scores),
        None if version is None else str(version),
        truncated,
        without_answer,
    )
    return beside(cell, figure_of(row, name, shots)) if wanted else cell


def read_score(found: Mapping[str, Any], metric: str) -> Score:
    key = metrics_of(found)[metric]
    scale = 100 if metric.split()[0] in SHARES else 1
    stderr: Any = found.get(key.replace(",", "_stderr,", 1))  # "N/A" if there is none
    known = isinstance(stderr, (int, float)) and math.isfinite(stderr)
    return Score(metric, scale * found[key], scale * stderr if known else None)


def figure_of(row: str | None, task: str, shots: int | None) -> float | None:
    """Return Apple's figure for a task: tables that have it with the same shots agree on it."""
    suites = [name for name, suite in SUITES.items() if suite.shots.get(task) == shots]
    found = [figures(name, row).get(task) for name in suites]
    return next((figure for figure in found if figure is not None), None)


def beside(cell: Cell, figure: float | None) -> Cell:
    """Return the cell with Apple's figure, and the nearest of its scores as the one compared."""
    if figure is None or not cell.scores:
        return cell
    scores = tuple(replace(score, difference=score.value - figure) for score in cell.scores)
    nearest = min(scores, key=lambda score: abs(score.difference or 0))
    return replace(cell, scores=scores, published=figure, compared=nearest)


def average_cell(suite: Suite, cells: Sequence[Cell], row: str | None) -> Cell:
    """Return the mean of the columns, as the card has it: with acc, with acc_norm where there is
    one, and with the metric of each column that is nearer to Apple's figure.
    """
    kinds = {"acc": [cell.scores[0] for cell in cells]}
    kinds["acc_norm"] = [cell.scores[-1] for cell in cells]
    nearer = [cell.compared for cell in cells if cell.compared is not None]
    if len(nearer) == len(cells):
        kinds[NEARER] = nearer
    scores = tuple(mean(kind, found) for kind, found in kinds.items())
    asked, of = sum(cell.asked for cell in cells), sum(cell.of for cell in cells)
    cell = Cell(AVERAGE, AVERAGE, None, asked, of, scores)
    if NEARER not in kinds:
        return cell
    cell = beside(cell, figures(suite.name, row).get(AVERAGE))
    return replace(cell, compared=cell.scores[-1]) if cell.compared is not None else cell


def mean(metric: str, scores: Sequence[Score]) -> Score:
    """Return the mean of scores of different tasks, whose errors are independent."""
    errors = [score.stderr for score in scores if score.stderr is not None]
    stderr = math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None
    return Score(metric, sum(score.value for score in scores) / len(scores), stderr)
