"""Pictures of a result document, by matplotlib: one file for `--plot`, or one small SVG a panel for
the page.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.results.document import Document, write_file
from openelm_mlx.benchmarks.results.drawing import DARK, LIGHT, Panel, Theme, shortened
from openelm_mlx.benchmarks.results.panels import panels
from openelm_mlx.errors import BenchmarkError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DARK", "LIGHT", "panel_svg", "write_plot"]

SUFFIXES = (".png", ".svg")
COLUMNS, DPI = 3, 160  # panels beside each other; dots per inch of a PNG
WIDTH, PAGE_WIDTH = (
    4.4,
    3.7,
)  # inches of a panel: in one picture; on a page, where a telephone is 3.7 inches of CSS wide
HEAD, FOOT, TITLE, MARGIN = 0.5, 0.6, 0.55, 0.12  # inches


def write_plot(document: Document, path: str | Path) -> None:
    """Draw all panels of the document into a PNG or SVG, by the suffix of `path`.

    Raises `OptionError` for another suffix, `BenchmarkError` where matplotlib is missing, nothing
    was timed, or the file cannot be written; an older file then stays whole.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(f"--plot {path}: a picture ends in {' or '.join(SUFFIXES)}")
    shown = panels(document)
    if not shown:
        raise BenchmarkError(
            "nothing to draw: no row of this result has a decode rate, bytes or a ratio"
        )
    with style(LIGHT):
        data = save(figure_of(document, shown), path.suffix.lower().lstrip("."))
    write_file(path, data)


def panel_svg(panel: Panel, theme: Theme) -> bytes:
    """One panel without its title as an SVG, its text as shapes: it needs no font. Raises as
    `write_plot`.
    """
    with style(theme):
        figure = new_figure(PAGE_WIDTH, panel.height - TITLE)
        panel.draw(figure.add_subplot(), theme)
        return save(figure, "svg", transparent=True)


def figure_of(document: Document, shown: list[Panel]) -> Figure:
    """Panels in rows of three, each row as high as its highest, with the machine and date
    underneath.

    Each panel lies in a figure of its own, so that the long labels of one do not take room from the
    others.
    """
    columns = min(COLUMNS, len(shown))
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    figure = new_figure(max(columns, 2) * WIDTH, sum(heights) + HEAD + FOOT)
    strips: Any = figure.subfigures(
        len(rows) + 2, 1, height_ratios=[HEAD, *heights, FOOT], hspace=0
    )
    head, *bands, foot = strips
    left = MARGIN / figure.get_figwidth()
    head.text(left, 0.5, "OpenELM benchmark", size=15, weight="bold", va="center", color=LIGHT.ink)
    foot.text(left, 0.5, caption(document), size=8, va="center", color=LIGHT.muted, linespacing=1.6)
    for band, row, height in zip(bands, rows, heights, strict=True):
        cells = band.subfigures(1, columns, squeeze=False)[0]
        for cell, panel in zip(cells, row, strict=False):
            parts = [TITLE, panel.height - TITLE]
            if (
                panel.height < height
            ):  # stays empty: a picture is not drawn out to its neighbour's height
                parts.append(height - panel.height)
            title, body = cell.subfigures(len(parts), 1, height_ratios=parts, hspace=0)[:2]
            title.text(
                left * columns,
                0.62,
                panel.title,
                size=10.5,
                weight="bold",
                color=LIGHT.ink,
                va="center",
            )
            title.text(
                left * columns,
                0.2,
                shortened(panel.model, 56),
                size=8.5,
                color=LIGHT.muted,
                va="center",
            )
            panel.draw(body.add_subplot(), LIGHT)
    return figure


def caption(document: Document) -> str:
    """Two lines: machine and versions; date and how to read the marks. Says so when no Mac was
    measured.
    """
    machine, versions = asdict(document.machine), document.versions
    facts = [machine_line(machine), *(f"{name} {version}" for name, version in versions.items())]
    marks = ["dots are medians, lines their quartiles", document.created[:10]]
    if document.partial:
        marks.insert(0, "PARTIAL RUN")
    return " · ".join(fact for fact in facts if fact) + "\n" + " · ".join(marks)


def machine_line(machine: dict[str, Any]) -> str:
    """`Apple M2 Max, 64 GB, macOS 15.1, gpu`; `Linux CPU result, not Apple silicon: ...` for the
    CPU backend there.
    """
    memory = machine.get("memory_bytes")
    facts = [
        machine.get("chip"),
        f"{memory / 2**30:.0f} GB" if isinstance(memory, (int, float)) and memory else None,
        " ".join(str(machine[key]) for key in ("system", "system_version") if machine.get(key)),
    ]
    line = ", ".join(str(fact) for fact in facts if fact)
    return shortened(f"{LINUX}: {line}" if is_linux(machine) else line, 120)


LINUX = "Linux CPU result, not Apple silicon"


def is_linux(machine: dict[str, Any]) -> bool:
    return str(machine.get("system", "")).lower() == "linux"


# --- matplotlib


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """matplotlib's settings for our pictures, put back afterwards. Raises `BenchmarkError` where it
    is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise BenchmarkError(
            "pictures need matplotlib: `pip install 'openelm-mlx[plot]'`"
        ) from None
    settings: dict[Any, Any] = {
        "text.parse_math": False,  # a model's name is text, whatever stands in it
        "svg.fonttype": "path",  # needs no font where it is shown
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.facecolor": "none",
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "figure.facecolor": theme.paper,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, outside pyplot's list of open ones."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=0.05))


def save(figure: Figure, kind: str, transparent: bool = False) -> bytes:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=DPI, transparent=transparent, metadata=metadata)
    return buffer.getvalue()
