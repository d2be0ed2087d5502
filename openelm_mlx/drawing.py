"""The style of all pictures: colours, the settings of matplotlib, notes, legends, and files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160  # dots per inch of a PNG
MARKERS = "osD^vP"
INSTALL = "`pip install 'openelm-mlx[plot]'`"


@dataclass(frozen=True)
class Theme:
    """Colours; those of engines are Okabe and Ito's, which colour-blind people tell apart."""

    ink: str
    muted: str
    line: str
    paper: str
    engines: tuple[str, ...]


OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#b0578d")
LIGHTER = ("#56b4e9", "#f0a04b", "#2ec4a0", "#e29cc2")
LIGHT = Theme("#1b1f24", "#59636e", "#e1e5ea", "#ffffff", OKABE_ITO)
DARK = Theme("#e6eaef", "#9aa5b1", "#2d343d", "#14181d", LIGHTER)


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Set matplotlib up for our pictures, and back. Raises `OptionError` if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise OptionError(f"pictures need matplotlib: {INSTALL}") from None
    ink = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    settings: dict[Any, Any] = {
        "text.parse_math": False,  # a model's name is text, whatever stands in it
        "svg.fonttype": "path",  # shapes, which do not need a font to be shown
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
        "axes.facecolor": "none",
        "figure.facecolor": theme.paper,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        **dict.fromkeys(ink, theme.ink),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), theme.muted),
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of its own, outside pyplot's list of open ones."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, kind: str, transparent: bool = False) -> bytes:
    """Return a picture in the format `png` or `svg`."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=DPI, transparent=transparent, metadata=metadata)
    return buffer.getvalue()


def note(
    ax: Any, theme: Theme, text: str, at: tuple[float, float], by: tuple[int, int], **more: Any
) -> None:
    """Write a text in small beside a mark."""
    box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1}
    style = {"textcoords": "offset points", "fontsize": 8, "color": theme.muted, "bbox": box}
    ax.annotate(text, at, by, **style, **more)


def legend(ax: Any, theme: Theme, last: str = "", most: int = 24, columns: int = 3) -> None:
    """Name what there is to tell apart, each once, in `most` characters, below the axes where it
    covers nothing.
    """
    handles, labels = ax.get_legend_handles_labels()
    both = sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] == last)
    entries = {label[:most]: handle for label, handle in both}
    style = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
    if len(entries) > 1:
        ax.figure.legend(entries.values(), entries, ncols=columns, labelcolor=theme.ink, **style)
