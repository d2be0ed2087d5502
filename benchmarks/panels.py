"""What a result document has to show: one small picture for each question that its rows can answer.

A panel knows its title, what it says in words, and how to draw itself on a matplotlib axes; plot.py sets panels into
one picture, report.py into a page.

    speed      decode rate against the memory bound, by width of the weights and engine    one a model
    parts      bytes read for one token, by part of the model and width                    one a model
    layers     the same by layer: OpenELM's layers grow with depth                         one a model
    context    decode rate against the length of the prompt                                one a model
    loss       KL divergence from full precision against size                              one a model
    settings   batches, cache kinds, speculation beside the plain run                      one a model
    ratios     two engines in paired trials, with 95 % intervals                           one in all
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openelm_mlx.benchmarks.drawing import (
    DASHES,
    MARKERS,
    PARTS,
    Theme,
    dot,
    legend,
    log_ratio_x,
    log_y,
    note,
    scale_y,
    shortened,
)
from openelm_mlx.benchmarks.labels import (
    OURS,
    bits_of,
    engines_ours_first,
    first_of_each_width,
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
from openelm_mlx.benchmarks.results import Document, Row

from openelm_mlx.config import PUBLISHED, OpenELMConfig, layer_shapes, normal_name
from openelm_mlx.hub import BUNDLED

DECODE = "decode_tokens_per_second"
BARS = 12  # rows of a panel of bars; more stand in the table alone


@dataclass(frozen=True)
class Panel:
    """A picture to be drawn: `draw(axes, theme)`. `words` says the same without a picture; `rows` sets the height."""

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


def panels(document: Document) -> list[Panel]:
    """Everything the document can show, model by model in the order of its rows."""
    found: list[Panel | None] = []
    for model in unique(model_name(row.case) for row in document.rows):
        rows = [row for row in document.rows if model_name(row.case) == model]
        found += [make(model, rows) for make in (speed, parts, layers, context, loss, settings)]
    return [panel for panel in (*found, ratios(document)) if panel is not None]


# --- one kind a function: the rows of one model -> a panel, or None where they do not say enough


def speed(model: str, rows: Sequence[Row]) -> Panel | None:
    """A dot with its quartiles for each engine at each width, and the memory bound as a bar above them."""
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
            place, index, metric = widths.index(width(row.case)), engines.index(row.case.engine), row.metrics[DECODE]
            x = place + (index - (len(engines) - 1) / 2) * min(0.24, 0.7 / len(engines))
            dot(ax, x, metric, theme.engine(index), MARKERS[index % len(MARKERS)], row.case.engine)
            ends += [metric.median, metric.q1, metric.q3]
            if row.case.engine == OURS and row.bound_tokens_per_second:
                ends.append(row.bound_tokens_per_second)
                ax.plot([place - 0.4, place + 0.4], ends[-1:] * 2, color=theme.ink, lw=2, label="memory bound")
            if row.case.engine == OURS and row.percent_of_bound is not None:
                below = row.percent_of_bound > 60  # beside the bound's bar there is no room above the dot
                note(ax, f"{row.percent_of_bound:.0f} %", (x, metric.median), theme, (0, -15 if below else 7), ha="center")
        ax.set_xticks(range(len(widths)), widths)
        ax.set_xlim(-0.7, len(widths) - 0.3)
        scale_y(ax, ends)
        legend(ax, theme, [*engines, "memory bound"], columns=3)

    said = "; ".join(
        f"{row.case.engine} {width(row.case)} {number(row.metrics[DECODE].median)} tokens/s"
        + (f", {row.percent_of_bound:.0f} % of the memory bound" if row.percent_of_bound is not None else "")
        for row in rows
    )
    return Panel("speed", "Speed and memory bound", model, f"Decode rate after {shortest} prompt tokens: {said}.", draw)


def parts(model: str, rows: Sequence[Row]) -> Panel | None:
    """Stacked bars of the bytes that one decoded token reads."""
    rows = [row for row in rows if row.bytes_per_token and row.case.engine == OURS and is_plain(row.case)]
    rows = sorted(first_of_each_width(rows), key=lambda row: -bits_of(row.case))
    if not rows:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        for y, row in enumerate(rows):
            left = 0.0
            for part, megabytes in ordered(row.bytes_per_token):
                ax.barh(y, megabytes, 0.62, left, color=theme.part(part), label=part, edgecolor=theme.paper, lw=0.5)
                left += megabytes
            note(ax, number(left), (left, y), theme, (4, 0), va="center")
        ax.set_yticks(range(len(rows)), [width(row.case) for row in rows])
        ax.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        ax.margins(x=0.16)
        ax.set_xlabel("read for one token, MB")
        legend(ax, theme, PARTS, columns=3)

    said = "; ".join(
        f"{width(row.case)}: " + ", ".join(f"{part} {number(size)} MB" for part, size in ordered(row.bytes_per_token))
        for row in rows
    )
    return Panel("parts", "Bytes of a token, by part", model, f"{said}.", draw, rows=len(rows))


def layers(model: str, rows: Sequence[Row]) -> Panel | None:
    """Bytes of attention, feed-forward network and keys and values by layer: each part's bytes, shared out by shape."""
    rows = [row for row in rows if row.bytes_per_token and row.case.engine == OURS]
    config = known_config(rows[0].case.model) if rows else None
    if config is None:
        return None
    row = min(rows, key=lambda row: bits_of(row.case))
    columns = layer_megabytes(config, row.bytes_per_token or {})
    totals = [sum(sizes) for sizes in zip(*columns.values(), strict=True)]
    if not totals:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        below = [0.0] * len(totals)
        for part, sizes in columns.items():
            ax.bar(range(1, len(below) + 1), sizes, 0.8, below, color=theme.part(part), label=part)
            below = [low + more for low, more in zip(below, sizes, strict=True)]
        ax.set_xlabel("layer")
        ax.set_ylabel("read for one token, MB")
        ax.xaxis.get_major_locator().set_params(integer=True)
        legend(ax, theme, PARTS, columns=3)

    said = f"From {number(totals[0])} MB in the first layer to {number(totals[-1])} MB in the last."
    return Panel("layers", f"Bytes of a token, by layer, {width(row.case)}", model, said, draw)


def context(model: str, rows: Sequence[Row]) -> Panel | None:
    """Lines over the prompt's length with their quartiles as a band; the memory bound dotted."""
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.prompt_tokens):
        if is_plain(row.case) and DECODE in row.metrics:
            lines.setdefault((row.case.engine, width(row.case)), []).append(row)
    lines = {key: some for key, some in lines.items() if len({row.case.prompt_tokens for row in some}) >= 3}
    if not lines:
        return None
    engines, widths = engines_ours_first(engine for engine, _ in lines), unique(form for _, form in lines)

    def draw(ax: Any, theme: Theme) -> None:
        ends: list[float] = []
        for (engine, form), some in lines.items():
            index, x = engines.index(engine), [row.case.prompt_tokens for row in some]
            metrics = [row.metrics[DECODE] for row in some]
            label = f"{engine}, {form}" if len(widths) > 1 else engine
            ax.fill_between(x, [m.q1 for m in metrics], [m.q3 for m in metrics], color=theme.engine(index), alpha=0.2, lw=0)
            ax.plot(x, [m.median for m in metrics], color=theme.engine(index), marker=MARKERS[index % len(MARKERS)], ms=4.5,
                    label=label, ls=DASHES[widths.index(form) % len(DASHES)])  # fmt: skip
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
    rows = [row for row in rows if row.metrics["kl_mean"].median > 0]  # full precision itself is at 0
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

    said = "; ".join(f"{width(row.case)} {number(row.metrics['kl_mean'].median)} nats" for row in rows)
    return Panel("loss", "Loss and size", model, f"Mean KL divergence from full precision: {said}.", draw)


def settings(model: str, rows: Sequence[Row]) -> Panel | None:
    """What batches, other caches and speculation do to the decode rate, beside the plain run at the same width."""
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
            ax.barh(y, metric.median, 0.62, color=theme.muted if is_plain(row.case) else theme.engine(0))
            ax.plot([metric.q1, metric.q3], [y, y], color=theme.ink, lw=1.5)
            note(ax, number(metric.median), (max(metric.median, metric.q3), y), theme, (4, 0), va="center")
        ax.set_yticks(range(len(rows)), labels)
        ax.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        ax.margins(x=0.18)
        ax.set_xlabel("decode, tokens/s, all sequences")

    said = "; ".join(f"{label} {number(row.metrics[DECODE].median)} tokens/s" for label, row in zip(labels, rows, strict=True))
    return Panel("settings", "Batches, caches, speculation", model, f"{said}.", draw, rows=len(rows))


def ratios(document: Document) -> Panel | None:
    """Ratios of paired trials as dots with their intervals; 1 is parity, and what holds 1 is grey. Of many, decode's."""
    shown = list(range(len(document.ratios)))
    if len(shown) > BARS:
        shown = [index for index in shown if document.ratios[index].metric == DECODE][:BARS]
    if not shown:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        colours = {"better": theme.engine(0), "worse": theme.engine(1), "no difference": theme.muted}
        marks = {"better": "o", "worse": "s", "no difference": "D"}
        log_ratio_x(ax, [end for index in shown for end in (document.ratios[index].low, document.ratios[index].high)])
        ax.axvline(1, color=theme.ink, lw=1)
        for y, index in enumerate(shown):
            item, found = document.ratios[index], verdict(document, index)
            ax.plot([item.low, item.high], [y, y], color=colours[found], lw=2, alpha=0.6)
            ax.plot([item.ratio], [y], marker=marks[found], ms=6.5, color=colours[found], ls="", label=found)
            note(ax, f"{item.ratio:.2f}", (item.high, y), theme, (6, 0), va="center")
            label = shortened(ratio_label(document, index), 60)
            text = ax.text(0, y - 0.34, label, transform=ax.get_yaxis_transform(), va="center", fontsize=8, color=theme.ink)
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


# --- bytes


def ordered(bytes_per_token: Mapping[str, float] | None) -> list[tuple[str, float]]:
    """(part, megabytes) of what is read, known parts in their order first."""
    found = {part: size / 1e6 for part, size in (bytes_per_token or {}).items() if size > 0}
    return sorted(found.items(), key=lambda item: PARTS.index(item[0]) if item[0] in PARTS else len(PARTS))


def layer_megabytes(config: OpenELMConfig, bytes_per_token: Mapping[str, float]) -> dict[str, list[float]]:
    """Part -> megabytes a layer. A part's bytes are shared out by its share of parameters (of kv heads, for `kv`).

    Exact where all layers of a part have one width; scales are left out, as they belong to attention and FFN alike.
    """
    shapes, gates = layer_shapes(config), 3 if config.ffn_with_glu else 2
    weights = {
        "attention": [2 * shape.q_heads + 2 * shape.kv_heads for shape in shapes],
        "ffn": [gates * shape.ffn_dim for shape in shapes],
        "kv": [shape.kv_heads for shape in shapes],
    }
    return {
        part: [bytes_per_token[part] / 1e6 * share / sum(shares) for share in shares]
        for part, shares in weights.items()
        if bytes_per_token.get(part, 0) > 0
    }


def known_config(model: str) -> OpenELMConfig | None:
    """The configuration of a published size or the bundled model. Nothing else is looked up for a name in a document."""
    if normal_name(model) in PUBLISHED:
        return OpenELMConfig.from_name(model)
    return OpenELMConfig.from_file(BUNDLED / "config.json") if model == BUNDLED.name else None
