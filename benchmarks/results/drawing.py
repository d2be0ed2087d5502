"""Colours, marks and axes that all pictures share. Works on matplotlib's axes without importing
matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.benchmarks.results.document import Metric

MARKERS = "osD^vP"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
PARTS = ("embedding", "attention", "ffn", "norms", "scales", "kv")
LOG_SPAN = 8  # values further apart than this go on a logarithmic axis


@dataclass(frozen=True)
class Theme:
    """Colours of a picture. Engines and parts take Okabe and Ito's colours, which colour-blind
    people tell apart; engines differ in their marks too, and parts stand in one order.
    """

    ink: str = "#1b1f24"
    muted: str = "#59636e"
    line: str = "#e1e5ea"
    paper: str = "#ffffff"
    engines: tuple[str, ...] = ("#0072b2", "#d55e00", "#009e73", "#b0578d")
    parts: tuple[str, ...] = ("#e69f00", "#56b4e9", "#0072b2", "#8c939c", "#cc79a7", "#009e73")

    def engine(self, index: int) -> str:
        return self.engines[index % len(self.engines)]

    def part(self, name: str) -> str:
        return self.parts[PARTS.index(name)] if name in PARTS else self.muted


LIGHT = Theme()
DARK = Theme(
    ink="#e6eaef",
    muted="#9aa5b1",
    line="#2d343d",
    paper="#14181d",
    engines=("#56b4e9", "#f0a04b", "#2ec4a0", "#e29cc2"),
    parts=("#e69f00", "#8fd0f5", "#2b8fcc", "#9aa3ae", "#e29cc2", "#2ec4a0"),
)


@dataclass(frozen=True)
class Panel:
    """A picture to be drawn: `draw(axes, theme)`. `words` says the same without a picture; `rows`
    sets the height.
    """

    kind: str
    title: str
    model: str  # whose rows these are; empty where they are of several
    words: str
    draw: Callable[[Any, Theme], None]
    rows: float = 0

    @property
    def height(self) -> float:
        """Inches, axes and all."""
        return max(3.6, 1.6 + 0.3 * self.rows)


def dot(ax: Any, x: float, metric: Metric, colour: str, marker: str, label: str) -> None:
    """The median, and a line from quartile to quartile."""
    ax.plot([x, x], [metric.q1, metric.q3], color=colour, lw=2, alpha=0.6, solid_capstyle="round")
    ax.plot([x], [metric.median], color=colour, marker=marker, ms=6.5, ls="", label=label)


def note(
    ax: Any,
    text: str,
    at: tuple[float, float],
    theme: Theme,
    offset: tuple[float, float],
    **more: Any,
) -> None:
    ax.annotate(
        text, at, xytext=offset, textcoords="offset points", fontsize=8, color=theme.muted, **more
    )


def scale_y(ax: Any, values: Sequence[float]) -> None:
    """From 0, or logarithmic where the values lie too far apart to be read beside each other."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_SPAN:
        log_y(ax, (1, 2, 5) if high / low < 1000 else (1,))
        ax.set_ylim(low / 1.6, high * 1.6)
        ax.set_ylabel(f"{ax.get_ylabel()} (log scale)")
    else:
        ax.set_ylim(0, high * 1.12 or 1)


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def log_y(ax: Any, steps: Sequence[float] = (1,)) -> None:
    """A logarithmic axis with plain numbers at `steps` of each decade."""
    ax.set_yscale("log")
    plain_numbers(ax.yaxis, steps)


def log_x(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for values above 0, with plain numbers however close they lie."""
    span = max(values) / min(values)
    ax.set_xscale("log")
    ax.set_xlim(min(values) / 1.3, max(values) * max(1.3, span**0.25))
    plain_numbers(ax.xaxis, (1,) if span > 100 else (1, 2, 5) if span > 2 else ())


def log_ratio_x(ax: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for ratios: half is as far from 1 as double."""
    values = [1.0, *(value for value in values if value > 0)]
    low, high = min(values), max(values)
    ax.set_xscale("log")
    span = max(high / low, 1.01)
    ax.set_xlim(low / span**0.06, high * span**0.2)
    plain_numbers(ax.xaxis, (1, 2, 5) if span > 4 else ())


def plain_numbers(axis: Any, steps: Sequence[float]) -> None:
    """Ticks at `steps` of each decade; without steps at even numbers, for less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps) if steps else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def legend(ax: Any, theme: Theme, order: Sequence[str] = (), columns: int = 2) -> None:
    """One entry a label, below the axes so that it covers nothing. None where there is only one
    thing to tell apart.
    """
    handles, labels = ax.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    ranked = sorted(entries, key=lambda label: order.index(label) if label in order else len(order))
    if len(ranked) > 1:
        handles, names = (
            [entries[label] for label in ranked],
            [shortened(label, 24) for label in ranked],
        )
        ax.figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=theme.ink,
            handlelength=1.6,
            columnspacing=1.4,
        )
