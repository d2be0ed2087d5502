"""A picture of a report: ours against Apple's by task, with bars of two standard errors."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.drawing import LIGHT, MARKERS, Theme, legend, new_figure, save, style
from openelm_mlx.evaluate.report import BOUND, SHARES, Cell, Report, Score
from openelm_mlx.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, LINE, MARGINS = 7.2, 0.42, 1.9  # inches: of a picture, for a task, above and below them
APPLES = "Apple"
TITLE = 72  # characters of a line of it
SPREAD = 0.4  # of the room for a task, between the first score and the last
CAPTION = f"Bars are {BOUND} standard errors of a score to each side, for the choice of questions."


def write_picture(reports: Sequence[Report], path: str | Path) -> bool:
    """Draw the reports of one model or of several on the same tasks into a PNG or SVG file.

    Return False, and write nothing, if no score is a share of questions. Raises `OptionError` if
    matplotlib is missing.
    """
    if not tasks_of(reports[0]):
        return False
    with style(LIGHT):
        drawn = save(figure(reports), Path(path).suffix.lower().lstrip("."))
    with replacing(path) as new:
        new.write_bytes(drawn)
    return True


def shares(cell: Cell) -> list[Score]:
    """Return the scores that are shares of questions."""
    return [score for score in cell.scores if score.metric.split()[0] in SHARES]


def tasks_of(report: Report) -> list[str]:
    """Return the names of the lines, from top to bottom."""
    return [cell.title for cell in report.cells if shares(cell)]


def figure(reports: Sequence[Report]) -> Figure:
    """Return the figure, within `drawing.style`."""
    drawn = new_figure(WIDTH, MARGINS + LINE * len(tasks_of(reports[0])))
    ax = drawn.add_subplot()
    against = "".join(f", against {report.model}" for report in reports[1:])
    title = textwrap.shorten(f"{reports[0].title}{against}", 3 * TITLE, placeholder=" ...")
    title = textwrap.fill(title, TITLE, break_on_hyphens=False)
    drawn.suptitle(title, x=0.02, ha="left", size=10.5, weight="bold")
    draw(ax, LIGHT, reports)
    ax.set_title(CAPTION, loc="left", size=8, color=LIGHT.muted)
    return drawn


def draw(ax: Any, theme: Theme, reports: Sequence[Report]) -> None:
    """Draw a line for each task: a mark for each metric of each model, and one for Apple's figure.

    A model has a colour and a metric a shape.
    """
    tasks = tasks_of(reports[0])
    names = [Path(report.model).name for report in reports]
    if len(set(names)) < len(names):  # one model loaded in two ways
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    lines: dict[str, list[tuple[int, Score]]] = {title: [] for title in tasks}
    for number, report in enumerate(reports):
        for cell in report.cells:
            lines.get(cell.title, []).extend((number, score) for score in shares(cell))
    marks: dict[tuple[int, str], list[tuple[float, Score]]] = {}
    for place, line in enumerate(lines.values()):
        for at, (number, score) in enumerate(line):
            y = place + SPREAD * (at - (len(line) - 1) / 2) / max(len(line) - 1, 1)
            marks.setdefault((number, score.metric), []).append((y, score))
    metrics = list(dict.fromkeys(metric for _, metric in marks))
    for (number, metric), some in sorted(marks.items(), key=lambda entry: entry[0][0]):
        heights, scores = zip(*some, strict=True)
        errors = [BOUND * (score.stderr or 0) for score in scores]
        name = "" if len(reports) == 1 else f", {names[number]}"
        look = {"fmt": MARKERS[metrics.index(metric) % len(MARKERS)], "ms": 5, "lw": 1.5}
        look |= {"color": theme.engines[number % len(theme.engines)], "label": metric + name}
        ax.errorbar([score.value for score in scores], heights, xerr=errors, **look)
    published = {c.title: c.published for c in reports[0].cells if c.published is not None}
    places = [tasks.index(title) for title in published]
    tall = {"color": theme.ink, "marker": "|", "ms": 16, "mew": 2, "ls": "", "zorder": 0}
    if published:
        ax.plot(list(published.values()), places, label=APPLES, **tall)
    ax.set_yticks(range(len(tasks)), tasks)
    ax.set_ylim(len(tasks) - 0.4, -0.6)
    ax.set_xlabel("per cent")
    # Apple's is the first; then the metrics of each model are below each other
    one = len(reports) == 1
    legend(ax, theme, most=24 if one else 46, columns=len(marks) + 1 if one else len(reports))
