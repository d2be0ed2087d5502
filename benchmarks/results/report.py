"""One self-contained HTML page of a result document: no network, no script; pictures inside, light
and dark.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.results.document import Document, Metric, Row, write_file
from openelm_mlx.benchmarks.results.drawing import Panel
from openelm_mlx.benchmarks.results.labels import (
    OURS,
    is_plain,
    metric_name,
    model_name,
    number,
    setting,
    unique,
    verdict,
    width,
)
from openelm_mlx.benchmarks.results.panels import DECODE, panels
from openelm_mlx.benchmarks.results.plot import DARK, LIGHT, LINUX, is_linux, panel_svg
from openelm_mlx.benchmarks.results.tables import COLUMNS, digits
from openelm_mlx.errors import BenchmarkError

TEMPLATE = Path(__file__).with_name("report.html.j2")
FACTS = {  # of the machine: key -> how it is called
    "chip": "Chip",
    "machine": "Architecture",
    "cores": "CPU cores",
    "gpu_cores": "GPU cores",
    "memory_bytes": "Memory",
    "system": "System",
    "system_version": "Version",
    "backend": "MLX backend",
    "blas": "BLAS",
    "load_average": "Load before the run",
    "thermal_pressure": "Thermal pressure before the run",
    "copy_bytes_per_second": "Memory bandwidth, copying",
    "nominal_bytes_per_second": "Memory bandwidth, nominal",
}


@dataclass(frozen=True)
class Cell:
    """One entry of a table: the text, what stands small beside it, and what it is (`number`,
    `text`, `good`, `bad`).
    """

    text: str
    small: str = ""
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A panel drawn twice, as data URIs."""

    panel: Panel
    light: str
    dark: str


def write_report(document: Document, path: str | Path) -> None:
    """Write the page. Without matplotlib it has no pictures and says what to install.

    Raises `BenchmarkError` where the file cannot be written; an older file then stays whole.
    """
    write_file(path, render(document))


def render(document: Document) -> str:
    """The HTML of the page. Every text of the document is escaped: names of models and notes are
    anyone's.
    """
    from jinja2 import Environment, StrictUndefined

    pictures, missing = draw(document)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        document=document,
        title=f"OpenELM benchmark: {document.machine.chip or 'unknown machine'}",
        linux=LINUX if is_linux(asdict(document.machine)) else "",
        cards=cards(document),
        pictures=pictures,
        missing=missing,
        tables=[measured(model, rows) for model, rows in by_model(document)],
        ratios=ratio_table(document),
        facts=facts(document),
        assumptions=assumptions(document),
    )


def draw(document: Document) -> tuple[list[Picture], str]:
    """The document's panels as SVG, and why there are none where matplotlib is missing."""
    try:
        pictures = [
            Picture(panel, *(svg_uri(panel_svg(panel, theme)) for theme in (LIGHT, DARK)))
            for panel in panels(document)
        ]
    except BenchmarkError as error:
        return [], str(error)
    return pictures, ""


def svg_uri(data: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(data).decode()


def by_model(document: Document) -> list[tuple[str, list[Row]]]:
    names = unique(model_name(row.case) for row in document.rows)
    return [
        (name, [row for row in document.rows if model_name(row.case) == name]) for name in names
    ]


# --- at a glance


@dataclass(frozen=True)
class Card:
    """The fastest plain run of a model."""

    model: str
    figure: str
    lines: list[str]


def cards(document: Document) -> list[Card]:
    found = []
    for model, rows in by_model(document):
        timed = [
            row
            for row in rows
            if row.case.engine == OURS and is_plain(row.case) and DECODE in row.metrics
        ]
        if not timed:
            continue
        best = max(timed, key=lambda row: row.metrics[DECODE].median)
        lines = [f"{width(best.case)} weights, {best.case.prompt_tokens} prompt tokens"]
        if best.percent_of_bound is not None:
            lines.append(f"{best.percent_of_bound:.0f} % of the rate of a copy")
        lines += [
            f"{item.ratio:.2f} × {document.rows[item.against].case.engine}, {width(document.rows[item.row].case)} "
            f"({item.low:.2f}\N{EN DASH}{item.high:.2f})"
            for item in document.ratios
            if item.metric == DECODE
            and document.rows[item.row] in timed
            and document.rows[item.row].case.prompt_tokens == best.case.prompt_tokens
            and document.rows[item.against].case.engine != OURS
        ]
        found.append(Card(model, metric_cell(best.metrics[DECODE], 1.0).text, lines))
    return found


# --- tables


def measured(model: str, rows: Sequence[Row]) -> Table:
    """All rows of a model: what was run, every metric of it, the share of the bound; notes numbered
    below.
    """
    names = [name for name in COLUMNS if any(name in row.metrics for row in rows)]
    bound = any(row.bound_tokens_per_second for row in rows)
    cases = {
        "engine": "text",
        "weights": "text",
        "setting": "text",
        "prompt": "number",
        "new": "number",
    }
    notes: list[str] = []
    lines = [case_cells(row, notes) for row in rows]
    same = [
        place for place in range(2, 5) if len({line[place].text for line in lines}) == 1
    ]  # goes into the caption
    lines = [[cell for place, cell in enumerate(line) if place not in same] for line in lines]
    head = [
        Cell(text, kind=kind)
        for place, (text, kind) in enumerate(cases.items())
        if place not in same
    ]
    head += [Cell(COLUMNS[name][0]) for name in names]
    head += [Cell("memory bound tokens/s"), Cell("% of bound")] * bound
    for row, line in zip(rows, lines, strict=True):
        line += [metric_cell(row.metrics.get(name), COLUMNS[name][1]) for name in names]
        if bound:
            rate, percent = row.bound_tokens_per_second, row.percent_of_bound
            line += [
                Cell("" if rate is None else digits(rate, rate)),
                Cell("" if percent is None else f"{percent:.0f}"),
            ]
    case = rows[0].case
    told = {
        2: setting(case),
        3: f"prompt of {case.prompt_tokens:,} tokens",
        4: f"{case.generation_tokens:,} new tokens",
    }
    facts = [f"{told[place]} throughout" if place == 2 else told[place] for place in same]
    caption = "; ".join(["Medians over the trials, with quartiles where they differ", *facts])
    return Table(model, f"{caption}.", head, lines, notes)


def case_cells(row: Row, notes: list[str]) -> list[Cell]:
    """What was run; its notes are added to `notes` and numbered."""
    case, told = row.case, "; ".join(row.notes)
    small = " ".join([agreement(row), mark(notes, told) if told else ""]).strip()
    texts = [
        Cell(case.engine, small, "text"),
        Cell(width(case), weights(row), "text"),
        Cell(setting(case), "", "text"),
    ]
    return texts + [Cell(f"{case.prompt_tokens:,}"), Cell(f"{case.generation_tokens:,}")]


def mark(notes: list[str], note: str) -> str:
    """The number of a note below the table; equal notes share one."""
    if note not in notes:
        notes.append(note)
    return f"[{notes.index(note) + 1}]"


def weights(row: Row) -> str:
    bits, name = row.case.bits_per_weight, width(row.case)
    return (
        f"{bits:.3g} bits/weight"
        if bits is not None and "bits/weight" not in name and row.case.bits is not None
        else ""
    )


def metric_cell(metric: Metric | None, divisor: float) -> Cell:
    if metric is None:
        return Cell("")
    scaled = [value / divisor for value in (metric.median, metric.q1, metric.q3)]
    middle, low, high = (
        number(value) if abs(scaled[0]) < 1 else digits(value, scaled[0]) for value in scaled
    )
    return Cell(middle, "" if low == high else f"{low}\N{EN DASH}{high}")


def agreement(row: Row) -> str:
    """What the check of a peer's tokens against ours gave."""
    if row.case.engine == OURS or (row.agrees is None and row.parts_at is None):
        return ""
    if row.parts_at is not None:
        return f"parts at token {row.parts_at}"
    return "same tokens" if row.agrees else "other tokens"


def ratio_table(document: Document) -> Table | None:
    if not document.ratios:
        return None
    head = [
        Cell(text, kind="text") for text in ("metric", "model", "weights", "of", "over", "prompt")
    ]
    head += [Cell("ratio"), Cell("95 % interval"), Cell("verdict", kind="text")]
    rows = []
    for index, item in enumerate(document.ratios):
        one, other = document.rows[item.row].case, document.rows[item.against].case
        of, over = (
            (one.engine, other.engine)
            if one.engine != other.engine
            else (setting(one), setting(other))
        )
        found = verdict(document, index)
        texts = (
            metric_name(item.metric),
            model_name(one),
            width(one),
            of,
            over,
            f"{one.prompt_tokens:,}",
        )
        kind = {"better": "good", "worse": "bad"}.get(found, "text")
        rows.append(
            [Cell(text, kind="text") for text in texts]
            + [
                Cell(f"{item.ratio:.3f}"),
                Cell(f"{item.low:.3f}\N{EN DASH}{item.high:.3f}"),
                Cell(found, kind=kind),
            ]
        )
    caption = "Of paired trials, one of each side run after the other; the interval is that of a bootstrap over the pairs."
    return Table("Ratios", caption, head, rows)


# --- facts


def facts(document: Document) -> list[tuple[str, str]]:
    """Machine, versions and date, in words; facts this page does not know by name follow as they
    are.
    """
    machine = asdict(document.machine)
    found = [
        (label, fact(key, machine[key]))
        for key, label in FACTS.items()
        if machine.get(key) is not None
    ]
    more = {key: value for key, value in machine.items() if key not in FACTS and value is not None}
    found += [(key.replace("_", " "), fact(key, value)) for key, value in more.items()]
    found += list(document.versions.items())
    return [
        *found,
        ("Measured", when(document.created)),
        ("Suite", document.suite or "none, single cases"),
    ]


def when(created: str) -> str:
    """`2026-01-02T03:04:05Z` -> `2026-01-02 03:04 UTC`; what is written otherwise stays as it is."""
    return re.sub(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(:[\d.]+)?(Z|\+00:00)$", r"\1 \2 UTC", created)


def fact(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("_bytes_per_second"):
            return f"{value / 1e9:.1f} GB/s"
        if key.endswith("_bytes"):
            return f"{value / 2**30:.0f} GiB"
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
    return str(value)


def assumptions(document: Document) -> list[str]:
    """What a reader has to take on trust; only what applies to this document."""
    told = [
        "Greedy decoding, one token at a time, the end of text ignored, so every engine does the same work.",
        "The prompt's time ends with its first token; the decode rate counts the tokens after it.",
        "One run of each case is not counted: it compiles and fills caches. Trials of what is compared alternate, so that "
        "drift hits all alike.",
        "Figures are medians; quartiles (interpolated between trials) show the spread.",
    ]
    if any(row.bound_tokens_per_second for row in document.rows):
        told += [
            "The memory bound is bandwidth over bytes a token: every weight, scale, key and value is read once a token, "
            "nothing is written, and arithmetic and kernel launches cost nothing.",
            "Bandwidth is what copying memory reached on this machine (MLX's copy kernel on a GPU), bytes read and written "
            "together; a chip's nominal one is higher. Reading alone can be faster than a copy, so a share may pass 100 %.",
        ]
    if any(row.case.random_weights for row in document.rows):
        told.append(
            "Random weights have a model's shapes and cost what it costs; their text and losses mean nothing."
        )
    if any(row.case.engine != OURS for row in document.rows):
        told.append(
            "A peer ran the same weights and prompt. Its times count only where all its tokens are ours."
        )
    if is_linux(asdict(document.machine)):
        told.append(
            "MLX's CPU backend on Linux emulates half precision and has no GPU kernels: nothing here tells a Mac's speed."
        )
    if document.partial:
        told.append("The run was interrupted: cases and trials are missing.")
    return told
