"""What a result document has to show: one small picture for each question that its rows can answer.

A `Panel` knows its title, what it says in words, and how to draw itself on a matplotlib axes;
plot.py sets panels into one picture, report.py into a page. Those of bytes are in byte_panels.py.

    speed      decode rate against the memory bound, by width of the weights and engine    one a model
    parts      bytes read for one token, by part of the model and width                    one a model
    layers     the same by layer: OpenELM's layers grow with depth                         one a model
    context    decode rate against the length of the prompt                                one a model
    loss       KL divergence from full precision against size                              one a model
    settings   batches, cache kinds, speculation beside the plain run                      one a model
    first      time to the first token: a new process, a warm one, a prompt held already   one a model
    ratios     two engines in paired trials, with 95 % intervals                           one in all
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openelm_mlx.benchmarks.results.byte_panels import layers, parts
from openelm_mlx.benchmarks.results.document import Document, Row
from openelm_mlx.benchmarks.results.drawing import (
    DASHES,
    MARKERS,
    Panel,
    Theme,
    dot,
    legend,
    log_ratio_x,
    log_x,
    log_y,
    note,
    scale_y,
    shortened,
)
from openelm_mlx.benchmarks.results.labels import (
    OURS,
    engines_ours_first,
    is_plain,
    model_name,
    number,
    ratio_label,
    setting,
    unique,
    verdict,
    width,
    widths_by_size,
)

DECODE = "decode_tokens_per_second"
FIRST = {
    "startup_seconds": "new process",
    "time_to_first_token_seconds": "warm",
    "time_to_first_token_reused_seconds": "reused prefix",
}
BARS = 12  # rows of a panel of bars; more stand in the table alone


def panels(document: Document) -> list[Panel]:
    """Everything the document can show, model by model in the order of its rows."""
    found: list[Panel | None] = []
    for model in unique(model_name(row.case) for row in document.rows):
        rows = [row for row in document.rows if model_name(row.case) == model]
        found += [
            make(model, rows) for make in (speed, parts, layers, context, loss, settings, first)
        ]
    return [panel for panel in (*found, ratios(document)) if panel is not None]


# --- one kind a function: the rows of one model -> a panel, or None where they do not say enough


def speed(model: str, rows: Sequence[Row]) -> Panel | None:
    """A dot with its quartiles for each engine at each width, and the memory bound as a bar above
    them.
    """
    rows = [row for row in rows if is_plain(row.case) and DECODE in row.metrics]
    if not rows:
        return None
    shortest = min(row.case.prompt_tokens for row in rows)
    rows = [row for row in rows if row.case.prompt_tokens == shortest]
    widths, engines = widths_by_size(rows), engines_ours_first(row.case.engine for row in rows)

    def draw(ax: Any, theme: Theme) -> None:
        ends: list[float] = []
        ax.set_ylabel("decode, tokens/s")
        for row in rows:
            place, index, metric = (
                widths.index(width(row.case)),
                engines.index(row.case.engine),
                row.metrics[DECODE],
            )
            x = place + (index - (len(engines) - 1) / 2) * min(0.24, 0.7 / len(engines))
            dot(ax, x, metric, theme.engine(index), MARKERS[index % len(MARKERS)], row.case.engine)
            ends += [metric.median, metric.q1, metric.q3]
            if row.case.engine == OURS and row.bound_tokens_per_second:
                ends.append(row.bound_tokens_per_second)
                ax.plot(
                    [place - 0.4, place + 0.4],
                    ends[-1:] * 2,
                    color=theme.ink,
                    lw=2,
                    label="memory bound",
                )
            if row.case.engine == OURS and row.percent_of_bound is not None:
                below = (
                    row.percent_of_bound > 60
                )  # beside the bound's bar there is no room above the dot
                at = (x, min(metric.q1, metric.median) if below else max(metric.q3, metric.median))
                note(
                    ax,
                    f"{row.percent_of_bound:.0f} %",
                    at,
                    theme,
                    (0, -15 if below else 7),
                    ha="center",
                )
        ax.set_xticks(range(len(widths)), widths)
        ax.set_xlim(-0.7, len(widths) - 0.3)
        scale_y(ax, ends)
        legend(ax, theme, [*engines, "memory bound"], columns=3)

    said = "; ".join(
        f"{row.case.engine} {width(row.case)} {number(row.metrics[DECODE].median)} tokens/s"
        + (
            f", {row.percent_of_bound:.0f} % of the memory bound"
            if row.percent_of_bound is not None
            else ""
        )
        for row in rows
    )
    return Panel(
        "speed",
        "Speed and memory bound",
        model,
        f"Decode rate after {shortest} prompt tokens: {said}.",
        draw,
    )


def context(model: str, rows: Sequence[Row]) -> Panel | None:
    """Lines over the prompt's length with their quartiles as a band; the memory bound dotted."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.prompt_tokens):
        if is_plain(row.case) and DECODE in row.metrics:
            lines.setdefault((row.case.engine, width(row.case)), []).append(row)
    lines = {
        key: some
        for key, some in lines.items()
        if len({row.case.prompt_tokens for row in some}) >= 3
    }
    if not lines:
        return None
    engines, widths = (
        engines_ours_first(engine for engine, _ in lines),
        unique(form for _, form in lines),
    )

    def draw(ax: Any, theme: Theme) -> None:
        ends: list[float] = []
        for (engine, form), some in lines.items():
            index, x = engines.index(engine), [row.case.prompt_tokens for row in some]
            metrics = [row.metrics[DECODE] for row in some]
            label = f"{engine}, {form}" if len(widths) > 1 else engine
            ax.fill_between(
                x,
                [m.q1 for m in metrics],
                [m.q3 for m in metrics],
                color=theme.engine(index),
                alpha=0.2,
                lw=0,
            )
            ax.plot(
                x,
                [m.median for m in metrics],
                color=theme.engine(index),
                marker=MARKERS[index % len(MARKERS)],
                ms=4.5,
                label=label,
                ls=DASHES[widths.index(form) % len(DASHES)],
            )
            bounds = [row.bound_tokens_per_second for row in some if row.bound_tokens_per_second]
            ends += [m.median for m in metrics]
            if engine == OURS and len(widths) == 1 and len(bounds) == len(some):
                ends += bounds
                ax.plot(x, bounds, color=theme.ink, ls=":", lw=1.5, label="memory bound")
        ax.set_xlabel("prompt, tokens")
        ax.set_ylabel("decode, tokens/s")
        ax.set_xlim(left=0)
        scale_y(ax, ends)
        legend(ax, theme, [*engines, "memory bound"], columns=3 if len(widths) == 1 else 2)

    said = "; ".join(
        f"{engine} {form} {number(some[0].metrics[DECODE].median)} tokens/s after {some[0].case.prompt_tokens} prompt tokens, "
        f"{number(some[-1].metrics[DECODE].median)} after {some[-1].case.prompt_tokens}"
        for (engine, form), some in lines.items()
    )
    return Panel("context", "Decode rate and context", model, f"{said}.", draw)


def loss(model: str, rows: Sequence[Row]) -> Panel | None:
    """KL divergence from full precision over bits per weight, both as measured."""
    rows = [row for row in rows if row.case.bits_per_weight and "kl_mean" in row.metrics]
    rows = [
        row for row in rows if row.metrics["kl_mean"].median > 0
    ]  # full precision itself is at 0
    if len(rows) < 2:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        for row in rows:
            at = (row.case.bits_per_weight or 0.0, row.metrics["kl_mean"].median)
            ax.plot(*([end] for end in at), marker="o", ms=6.5, color=theme.engine(0), ls="")
            note(ax, width(row.case), at, theme, (6, 4))
        log_y(ax)
        ax.margins(x=0.2, y=0.12)
        ax.set_xlabel("bits per weight")
        ax.set_ylabel("mean KL divergence, nats")

    said = "; ".join(
        f"{width(row.case)} {number(row.metrics['kl_mean'].median)} nats" for row in rows
    )
    return Panel(
        "loss", "Loss and size", model, f"Mean KL divergence from full precision: {said}.", draw
    )


def settings(model: str, rows: Sequence[Row]) -> Panel | None:
    """What batches, other caches and speculation do to the decode rate, beside the plain run at the
    same width.
    """
    rows = [row for row in rows if DECODE in row.metrics and row.case.engine == OURS]
    keys = {(width(row.case), row.case.prompt_tokens) for row in rows if not is_plain(row.case)}
    rows = [row for row in rows if (width(row.case), row.case.prompt_tokens) in keys][:BARS]
    if not rows:
        return None
    several = [len({key[side] for key in keys}) > 1 for side in (0, 1)]
    labels = [setting(row.case, *several) for row in rows]

    def draw(ax: Any, theme: Theme) -> None:
        for y, row in enumerate(rows):
            metric = row.metrics[DECODE]
            ax.barh(
                y, metric.median, 0.62, color=theme.muted if is_plain(row.case) else theme.engine(0)
            )
            ax.plot([metric.q1, metric.q3], [y, y], color=theme.ink, lw=1.5)
            note(
                ax,
                number(metric.median),
                (max(metric.median, metric.q3), y),
                theme,
                (4, 0),
                va="center",
            )
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        ax.margins(x=0.18)
        ax.set_xlabel("decode, tokens/s, all sequences")

    said = "; ".join(
        f"{label} {number(row.metrics[DECODE].median)} tokens/s"
        for label, row in zip(labels, rows, strict=True)
    )
    return Panel(
        "settings", "Batches, caches, speculation", model, f"{said}.", draw, rows=len(rows)
    )


def first(model: str, rows: Sequence[Row]) -> Panel | None:
    """Time to the first token of each engine, where new processes were timed; of several widths the
    first.
    """
    started = [row for row in rows if "startup_seconds" in row.metrics]
    if not started:
        return None
    form, prompt = width(started[0].case), started[0].case.prompt_tokens
    rows = [
        row
        for row in rows
        if is_plain(row.case) and width(row.case) == form and row.case.prompt_tokens == prompt
    ]
    found = [
        (name, row.case.engine, row.metrics[name])
        for name in FIRST
        for row in rows
        if name in row.metrics
    ]
    names, engines = (
        unique(name for name, _, _ in found),
        engines_ours_first(engine for _, engine, _ in found),
    )

    def draw(ax: Any, theme: Theme) -> None:
        for name, engine, metric in found:
            index = engines.index(engine)
            y = names.index(name) + (index - (len(engines) - 1) / 2) * 0.2
            ax.plot(
                [1e3 * metric.q1, 1e3 * metric.q3],
                [y, y],
                color=theme.engine(index),
                lw=2,
                alpha=0.6,
            )
            ax.plot(
                [1e3 * metric.median],
                [y],
                color=theme.engine(index),
                marker=MARKERS[index % len(MARKERS)],
                ms=6.5,
                ls="",
                label=engine,
            )
            note(ax, number(1e3 * metric.median), (1e3 * metric.q3, y), theme, (6, 0), va="center")
        ax.set_yticks(range(len(names)), [FIRST[name] for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        log_x(
            ax, [1e3 * max(end, 1e-6) for _, _, metric in found for end in (metric.q1, metric.q3)]
        )
        ax.set_xlabel("to the first token, ms (log scale)")
        legend(ax, theme, engines, columns=3)

    said = "; ".join(
        f"{engine}, {FIRST[name]}: {number(1e3 * metric.median)} ms"
        for name, engine, metric in found
    )
    return Panel(
        "first",
        f"Time to the first token, {form}",
        model,
        f"After {prompt} prompt tokens: {said}.",
        draw,
        rows=4,
    )


def ratios(document: Document) -> Panel | None:
    """Ratios of paired trials as dots with their intervals; 1 is parity, and what holds 1 is grey.
    Of many, decode's.
    """
    shown = list(range(len(document.ratios)))
    if len(shown) > BARS:
        shown = [index for index in shown if document.ratios[index].metric == DECODE][:BARS]
    if not shown:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        colours = {
            "better": theme.engine(0),
            "worse": theme.engine(1),
            "no difference": theme.muted,
        }
        marks = {"better": "o", "worse": "s", "no difference": "D"}
        log_ratio_x(
            ax,
            [
                end
                for index in shown
                for end in (document.ratios[index].low, document.ratios[index].high)
            ],
        )
        ax.axvline(1, color=theme.ink, lw=1)
        for y, index in enumerate(shown):
            item, found = document.ratios[index], verdict(document, index)
            ax.plot([item.low, item.high], [y, y], color=colours[found], lw=2, alpha=0.6)
            ax.plot(
                [item.ratio],
                [y],
                marker=marks[found],
                ms=6.5,
                color=colours[found],
                ls="",
                label=found,
            )
            note(
                ax,
                f"{item.ratio:.2f}",
                (item.high, y),
                theme,
                (6, 0),
                va="center",
                backgroundcolor=theme.paper,
            )
            label = shortened(ratio_label(document, index), 60)
            text = ax.text(
                0,
                y - 0.34,
                label,
                transform=ax.get_yaxis_transform(),
                va="center",
                fontsize=8,
                color=theme.ink,
            )
            text.set_in_layout(False)  # it may stand over the axes' end
            text.set_bbox({"facecolor": theme.paper, "edgecolor": "none", "pad": 1})
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.set_ylim(max(len(shown), 3) - 0.5, -0.7)
        ax.set_xlabel("ratio, 95 % interval (log scale)")
        legend(ax, theme, list(marks), columns=3)

    said = "; ".join(
        f"{ratio_label(document, index)} {item.ratio:.2f}, 95 % interval {item.low:.2f} to {item.high:.2f}"
        for index, item in ((index, document.ratios[index]) for index in shown)
    )
    return Panel("ratios", "Ratios of paired trials", "", f"{said}.", draw, rows=1.4 * len(shown))
