"""Tables of scores in words: the lines of a report and its notes, as Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from openelm_mlx.evaluate.suites import TASKS, source_of

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from openelm_mlx.evaluate.report import Cell

Grid = Sequence[Sequence[str]]  # lines of cells, the head first
ERROR = "s.e.: the standard error of the score, for the choice of the questions."
CHANCES = {"fairy_tales_two": "50", "fairy_tales_four": "25", "fairy_tales": "37.5"}


def grid(cells: Iterable[Cell], compares: bool) -> list[list[str]]:
    """Return a line for each metric of a task; a verdict stands at the metric it is for."""
    head = ["task", "shots", "questions", "metric", "score ±s.e."]
    cells = tuple(cells)
    judged = compares and any(cell.verdict for cell in cells)
    lines = [head + ["Apple", "off"] * compares + ["verdict"] * judged]
    for cell in cells:
        shots = "" if cell.shots is None else str(cell.shots)
        asked = f"{cell.asked:,}" + (f" of {cell.of:,}" if cell.asked < cell.of else "")
        for number, score in enumerate(cell.scores):
            line = [cell.title, shots, asked] if number == 0 else ["", "", ""]
            line += [score.metric, plain(score.value) + plain(score.stderr, " ±")]
            if compares:
                errors = "" if score.errors is None else f"{score.errors:+z.1f}"
                line += [plain(cell.published) if number == 0 else "", errors]
            if judged:
                line.append((score is cell.compared and cell.verdict) or "")
            lines.append(line)
    return lines


def plain(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.2f}"


def notes_on(cells: Sequence[Cell], row: str | None) -> Iterator[str]:
    """Say what a reader must know of the tasks, of Apple's figures and of verdicts."""
    for cell in cells:
        if cell.task in TASKS and TASKS[cell.task].note:
            yield f"{cell.title} is {TASKS[cell.task].note}."
        if cell.truncated:
            what = f"{cell.truncated:,} of {cell.asked:,} questions"
            yield f"{cell.title}: {what} were longer than the context and lost their beginning."
        if cell.without_answer:
            what = f"{cell.without_answer:,} of {cell.asked:,} questions"
            yield f"{cell.title}: the answer to {what} is none of their choices, so none is right."
    if chances := [
        f"{CHANCES[cell.task]} in {cell.title}" for cell in cells if cell.task in CHANCES
    ]:
        yield f"Guessing would score {' and '.join(chances)}."
    compared = [cell for cell in cells if cell.published is not None]
    if any(cell.asked < cell.of for cell in cells):
        verdict = ", so that there is no verdict" if compared else ""
        yield f"Only a part of the questions was asked, the first ones{verdict}."
    if row is None or not compared:
        yield ERROR
        return
    if reworded := [cell.title for cell in compared if TASKS[cell.task].reworded]:
        what = "lm-eval does not put all of these questions as it did for Apple"
        yield f"{', '.join(reworded)}: {what}; see docs/evaluating.md."
    other = [
        f"{cell.title} {cell.of:,} (Apple's {TASKS[cell.task].questions:,})"
        for cell in compared
        if cell.of != TASKS[cell.task].questions
    ]
    if other:
        yield f"Not as many questions as Apple asked: {', '.join(other)}."
    source = source_of(row)
    yield f"Apple's figures: {source['what']}, {source['url']}."
    yield (
        "s.e.: the standard error of our score, for the choice of the questions; off: how many of "
        "them it lies above Apple's. Apple asked the same questions, so that the same model should "
        "be off by much less than 2."
    )
    if any(len(cell.scores) > 1 for cell in compared):
        yield "Apple does not say which metric a figure is; a verdict is for the nearer one."


def markdown(title: str, lines: Grid, notes: Iterable[str]) -> str:
    rule = ["---:" if right else "---" for right in numeric(lines)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))
    return f"## {title}\n\n{table}\n" + "".join(f"- {note}\n" for note in notes)


def on_terminal(title: str, lines: Grid, notes: Iterable[str]) -> Group:
    """Return the same for a console of rich."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=0)
    table.show_edge = False
    for name, right in zip(lines[0], numeric(lines), strict=True):
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    below = Table.grid(padding=(0, 1, 0, 0))
    for note in notes:
        below.add_row("-", Text(note))
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    parts += ["", below] if below.row_count else []
    return Group(*parts)


def numeric(lines: Grid) -> list[bool]:
    """Return which columns have nothing that begins with a letter."""
    columns = zip(*lines[1:], strict=True)
    return [all(not cell[:1].isalpha() for cell in column) for column in columns]
