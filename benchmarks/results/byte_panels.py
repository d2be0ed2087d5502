"""Pictures of the bytes that one decoded token reads: by part of the model, and by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openelm_mlx.benchmarks.results.document import Row
from openelm_mlx.benchmarks.results.drawing import PARTS, Panel, Theme, legend, note
from openelm_mlx.benchmarks.results.labels import (
    OURS,
    bits_of,
    first_of_each_width,
    is_plain,
    number,
    width,
)
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, layer_shapes, normal_name


def parts(model: str, rows: Sequence[Row]) -> Panel | None:
    """Stacked bars of the bytes that one decoded token reads."""
    rows = [
        row
        for row in rows
        if row.bytes_per_token and row.case.engine == OURS and is_plain(row.case)
    ]
    rows = sorted(first_of_each_width(rows), key=lambda row: -bits_of(row.case))
    if not rows:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        for y, row in enumerate(rows):
            left = 0.0
            for part, megabytes in ordered(row.bytes_per_token):
                ax.barh(
                    y,
                    megabytes,
                    0.62,
                    left,
                    color=theme.part(part),
                    label=part,
                    edgecolor=theme.paper,
                    lw=0.5,
                )
                left += megabytes
            note(ax, number(left), (left, y), theme, (4, 0), va="center")
        ax.set_yticks(range(len(rows)), [width(row.case) for row in rows])
        ax.set_ylim(max(len(rows), 3) - 0.4, -0.6)
        ax.margins(x=0.16)
        ax.set_xlabel("read for one token, MB")
        legend(ax, theme, PARTS, columns=3)

    said = "; ".join(
        f"{width(row.case)}: "
        + ", ".join(f"{part} {number(size)} MB" for part, size in ordered(row.bytes_per_token))
        for row in rows
    )
    return Panel("parts", "Bytes of a token, by part", model, f"{said}.", draw, rows=len(rows))


def layers(model: str, rows: Sequence[Row]) -> Panel | None:
    """Bytes of attention, feed-forward network and keys and values by layer: each part's bytes,
    shared out by shape.
    """
    rows = [row for row in rows if row.bytes_per_token and row.case.engine == OURS]
    config = known_config(rows[0].case.model) if rows else None
    if config is None:
        return None
    row = min(rows, key=lambda row: bits_of(row.case))
    columns, scales = (
        layer_megabytes(config, row.bytes_per_token or {}),
        (row.bytes_per_token or {}).get("scales", 0),
    )
    totals = [sum(sizes) for sizes in zip(*columns.values(), strict=True)]
    if not totals:
        return None

    def draw(ax: Any, theme: Theme) -> None:
        below = [0.0] * len(totals)
        for part, sizes in columns.items():
            ax.bar(range(1, len(below) + 1), sizes, 0.8, below, color=theme.part(part), label=part)
            below = [low + more for low, more in zip(below, sizes, strict=True)]
        ax.set_xlabel("layer")
        ax.set_ylabel("MB read a token" + (", scales left out" if scales else ""))
        ax.xaxis.get_major_locator().set_params(integer=True)
        legend(ax, theme, PARTS, columns=3)

    said = f"From {number(totals[0])} MB in the first layer to {number(totals[-1])} MB in the last."
    return Panel("layers", f"Bytes of a token, by layer, {width(row.case)}", model, said, draw)


def ordered(bytes_per_token: Mapping[str, float] | None) -> list[tuple[str, float]]:
    """(part, megabytes) of what is read, known parts in their order first."""
    found = {part: size / 1e6 for part, size in (bytes_per_token or {}).items() if size > 0}
    return sorted(
        found.items(), key=lambda item: PARTS.index(item[0]) if item[0] in PARTS else len(PARTS)
    )


def layer_megabytes(
    config: OpenELMConfig, bytes_per_token: Mapping[str, float]
) -> dict[str, list[float]]:
    """Part -> megabytes a layer. A part's bytes are shared out by its share of parameters (of kv heads, for `kv`).

    Exact where all layers of a part have one width; scales are left out, as they belong to
    attention and FFN alike.
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
    """The configuration of a published size or the bundled model. Nothing else is looked up for a
    name in a document.
    """
    if normal_name(model) in PUBLISHED:
        return OpenELMConfig.from_name(model)
    return OpenELMConfig.from_file(BUNDLED / "config.json") if model == BUNDLED.name else None
