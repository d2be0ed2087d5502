"""Pictures of a document, by matplotlib: one file for `--plot`, or one small SVG each for the page.

A `Picture` answers one question that rows can answer, and draws itself on matplotlib's axes in the
colours of a theme. The figures themselves stand in the table.

    speed      the decode rate against what a copy reaches, by bits and engine    one a model
    context    the decode rate over the length of the prompt                      one a model
    loss       the KL divergence from full precision against size                 one a model
    ratios     two engines in paired trials, with 95 % intervals                  one in all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.results import OURS, tables
from openelm_mlx.benchmarks.results.document import DECODE, Document, Metric, Row, write_file
from openelm_mlx.drawing import (
    INSTALL,
    LIGHT,
    MARKERS,
    Theme,
    legend,
    new_figure,
    note,
    save,
    style,
)
from openelm_mlx.errors import BenchmarkError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2  # pictures beside each other
WIDTH, PAGE_WIDTH, HEIGHT = 4.8, 3.7, 3.1  # inches; a telephone is 3.7 inches of CSS wide
DASHES = ("-", "--", ":", "-.")
LOG_SPAN = 8  # values further apart than this go on a logarithmic axis
ROWS = 12  # of ratios; what is left out stands in the table
COPY = "rate of a copy"


@dataclass(frozen=True)
class Picture:
    kind: str
    title: str
    model: str  # whose rows these are; empty if they are of several
    draw: Callable[[Any, Theme], None]
    height: float = HEIGHT


def pictures(document: Document) -> list[Picture]:
    """Return everything that the document can show, model by model in the order of its rows."""
    found = [
        make(model, rows)
        for model, rows in tables.by_model(document.rows).items()
        for make in (speed, context, loss)
    ]
    return [picture for picture in (*found, ratios(document)) if picture is not None]


# --- one question a function: rows of one model -> a picture, or None if they do not answer it


def speed(model: str, rows: Sequence[Row]) -> Picture | None:
    """Show each engine at each number of bits, and the rate at which a copy moves the bytes."""
    rows = sorted(decoding(rows), key=lambda row: -tables.bits_of(row.case))
    engines, shortest = engines_of(rows), min((r.case.prompt_tokens for r in rows), default=0)
    rows = [row for row in rows if row.case.prompt_tokens == shortest]
    if not rows:
        return None
    places = list(dict.fromkeys(tables.weights(row.case) for row in rows))

    def draw(ax: Any, theme: Theme) -> None:
        ends: list[float] = []
        for engine in engines_of(rows):
            index, some = engines.index(engine), [row for row in rows if row.case.engine == engine]
            left = ((len(engines) - 1) / 2 - index) * min(0.24, 0.7 / len(engines))
            x = [places.index(tables.weights(row.case)) - left for row in some]
            metrics = [row.metrics[DECODE] for row in some]
            ends += dots(ax, theme, index, x, metrics, label=engine)
            for at, row in zip(x, some, strict=True):
                if engine == OURS and (bound := row.bound_tokens_per_second):
                    ax.hlines(bound, at + left - 0.4, at + left + 0.4, theme.ink, lw=2, label=COPY)
                    share, rate = f"{row.percent_of_bound:.0f} %", row.metrics[DECODE].median
                    note(ax, theme, share, (at, rate), (-6, -11), ha="right")
                    ends.append(bound)
        ax.set_xticks(range(len(places)), places)
        ax.set_xlim(-0.7, len(places) - 0.3)
        scale_y(ax, ends, "decode, tokens/s")
        legend(ax, theme, last=COPY)

    return Picture("speed", "Speed and memory", model, draw)


def context(model: str, rows: Sequence[Row]) -> Picture | None:
    """Show the decode rate over the length of the prompt, if there are at least three."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(decoding(rows), key=lambda row: row.case.prompt_tokens):
        lines.setdefault((row.case.engine, tables.weights(row.case)), []).append(row)
    lines = {k: some for k, some in lines.items() if len({r.case.prompt_tokens for r in some}) > 2}
    if not lines:
        return None
    engines, kinds = engines_of(rows), list(dict.fromkeys(kind for _, kind in lines))

    def draw(ax: Any, theme: Theme) -> None:
        ends: list[float] = []
        for (engine, kind), some in lines.items():
            x, metrics = [row.case.prompt_tokens for row in some], [r.metrics[DECODE] for r in some]
            index, dashes = engines.index(engine), DASHES[kinds.index(kind) % len(DASHES)]
            ends += dots(ax, theme, index, x, metrics, label=f"{engine}, {kind}", ls=dashes)
            bounds = [row.bound_tokens_per_second or 0.0 for row in some]
            if engine == OURS and len(kinds) == 1 and all(bounds):
                ax.plot(x, bounds, color=theme.ink, ls=":", lw=1.5, label=COPY)
                ends += bounds
        ax.set_xlabel("prompt, tokens")
        ax.set_xlim(left=0)
        scale_y(ax, ends, "decode, tokens/s")
        legend(ax, theme, last=COPY)

    return Picture("context", "Decode rate and context", model, draw)


def loss(model: str, rows: Sequence[Row]) -> Picture | None:
    """Show the KL divergence from full precision, which itself has none and no dot, by size."""
    lossy = [row for row in rows if "kl_mean" in row.metrics and row.metrics["kl_mean"].median > 0]
    if len(lossy) < 2:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        for row in lossy:
            bits, metric = tables.bits_of(row.case), row.metrics["kl_mean"]
            dots(ax, theme, 0, [bits], [metric])
            note(ax, theme, tables.weights(row.case), (bits, metric.median), (6, 4))
        ax.set_yscale("log")
        plain_numbers(ax.yaxis, (1,))
        ax.margins(x=0.2, y=0.12)
        ax.set_xlabel("bits per weight")
        ax.set_ylabel("mean KL divergence, nats")

    return Picture("loss", "Loss and size", model, draw)


def ratios(document: Document) -> Picture | None:
    """Show ratios with their intervals, those of decoding if they are many; 1 is parity."""
    shown = list(enumerate(document.ratios))
    if len(shown) > ROWS:
        shown = [(index, one) for index, one in shown if one.metric == DECODE][:ROWS]
    if not shown:
        return None
    labels = [tables.ratio_label(document, index) for index, _ in shown]

    def draw(ax: Any, theme: Theme) -> None:
        marks = {"better": (theme.engines[0], "o"), "worse": (theme.engines[1], "s")}
        marks["no difference"] = theme.muted, "D"
        ends = [1.0, *(end for _, one in shown for end in (one.low, one.high))]
        ax.set_xscale("log")
        ax.axvline(1, color=theme.ink, lw=1)
        for y, (index, one) in enumerate(shown):
            found = tables.verdict(document, index)
            colour, marker = marks[found]
            ax.plot([one.low, one.high], [y, y], color=colour, lw=2, alpha=0.6)
            ax.plot([one.ratio], [y], marker=marker, color=colour, ls="", label=found)
            note(ax, theme, f"{one.ratio:.2f}", (one.high, y), (6, 0), va="center")
        span = max(max(ends) / min(ends), 1.01)
        ax.set_xlim(min(ends) / span**0.06, max(ends) * span**0.2)
        plain_numbers(ax.xaxis, (1, 2, 5) if span > 4 else ())
        ax.set_yticks(range(len(shown)), labels)
        ax.set_ylim(max(len(shown), 3) - 0.5, -0.7)
        ax.set_xlabel("ratio, 95 % interval (log scale)")
        legend(ax, theme, last=COPY)

    height = max(HEIGHT, 1.3 + 0.4 * len(shown))
    return Picture("ratios", "Ratios of paired trials", "", draw, height)


# --- rows


def decoding(rows: Sequence[Row]) -> list[Row]:
    """Return the plain rows that have a decode rate."""
    return [row for row in rows if DECODE in row.metrics and tables.is_plain(row.case)]


def engines_of(rows: Sequence[Row]) -> list[str]:
    """Return the engines, ours first, so that each has one colour in all pictures of a model."""
    return sorted(dict.fromkeys(row.case.engine for row in rows), key=lambda name: name != OURS)


# --- marks and axes


def dots(
    ax: Any, theme: Theme, index: int, x: Sequence[float], metrics: Sequence[Metric], **line: Any
) -> list[float]:
    """Draw medians, each with a line from quartile to quartile, and return the ends of all."""
    colour, marker = theme.engines[index % len(theme.engines)], MARKERS[index % len(MARKERS)]
    low, high = [metric.q1 for metric in metrics], [metric.q3 for metric in metrics]
    medians = [metric.median for metric in metrics]
    ax.vlines(x, low, high, color=colour, lw=2, alpha=0.6)
    ax.plot(x, medians, color=colour, marker=marker, ms=6, **{"ls": "", **line})
    return [*low, *medians, *high]


def scale_y(ax: Any, values: Sequence[float], label: str) -> None:
    """Begin the axis at 0, or make it logarithmic if values lie too far apart to be read."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_SPAN:
        ax.set_yscale("log")
        plain_numbers(ax.yaxis, (1, 2, 5) if high / low < 1000 else (1,))
        ax.set_ylim(low / 1.6, high * 1.6)
        label += " (log scale)"
    else:
        ax.set_ylim(0, high * 1.12 or 1)
    ax.set_ylabel(label)


def plain_numbers(axis: Any, steps: Sequence[float]) -> None:
    """Put ticks at `steps` of each decade, or at even numbers if there is less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps) if steps else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


# --- files


def check_plot(path: str | Path) -> str:
    """Return `png` or `svg`, the format of a picture. Raises `OptionError` for another suffix and
    `BenchmarkError` if matplotlib is missing.
    """
    if (kind := Path(path).suffix.lower()) not in (".png", ".svg"):
        raise OptionError(f"--plot {path}: give a name that ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise BenchmarkError(f"--plot needs matplotlib: {INSTALL}")
    return kind.lstrip(".")


def write_plot(document: Document, path: str | Path) -> None:
    """Draw all pictures of the document into one file. Raises as `check_plot` does, and
    `BenchmarkError` if nothing was timed or the file cannot be written: an older one then stays.
    """
    kind = check_plot(path)
    if not (shown := pictures(document)):
        raise BenchmarkError("nothing to draw: no row of this result has a decode rate or a loss")
    with style(LIGHT):
        write_file(path, save(sheet(document, shown), kind))


def svg(picture: Picture, theme: Theme) -> bytes:
    """Return one picture without its title. Raises `OptionError` if matplotlib is missing."""
    with style(theme):
        figure = new_figure(PAGE_WIDTH, picture.height)
        picture.draw(figure.add_subplot(), theme)
        return save(figure, "svg", transparent=True)


def sheet(document: Document, shown: list[Picture]) -> Figure:
    """Return all pictures in rows, with the machine and date underneath."""
    rows = [shown[start : start + COLUMNS] for start in range(0, len(shown), COLUMNS)]
    heights = [0.5 + max(picture.height for picture in row) for row in rows]
    figure = new_figure(COLUMNS * WIDTH, sum(heights) + 0.7)
    strips: Any = figure.subfigures(len(rows) + 1, 1, height_ratios=[*heights, 0.7])
    for band, row in zip(strips, rows, strict=False):
        for cell, picture in zip(band.subfigures(1, COLUMNS), row, strict=False):
            ax = cell.add_subplot()
            cell.suptitle(picture.title, x=0.02, ha="left", size=10.5, weight="bold")
            ax.set_title(picture.model[:56], loc="left", size=8.5, color=LIGHT.muted)
            picture.draw(ax, LIGHT)
    strips[-1].text(0.01, 0.5, tables.caption(document), size=8, va="center", color=LIGHT.muted)
    return figure
