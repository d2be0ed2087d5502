"""A document as a table: Markdown for a pipe or a file, rich on a terminal, CSV for a spreadsheet.
The same cells in all.
"""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.benchmarks.results.document import METRICS, Case, Document, Metric, Row

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80

# what heads a column, and by what a value is divided for it
COLUMNS = {
    "prefill_tokens_per_second": ("prefill tokens/s", 1.0),
    "decode_tokens_per_second": ("decode tokens/s", 1.0),
    "time_to_first_token_seconds": ("first token ms", 1e-3),
    "time_to_first_token_reused_seconds": ("reused prefix ms", 1e-3),
    "startup_seconds": ("start-up s", 1.0),
    "load_seconds": ("load s", 1.0),
    "peak_memory_bytes": ("peak MB", 1e6),
    "tokens_per_pass": ("tokens a pass", 1.0),
    "kl_mean": ("KL nats", 1.0),
    "top_1_agreement": ("same top-1", 1.0),
}
SHORT = {
    "tokens/s": "t/s",
    "first token": "first",
    "reused prefix": "reused",
    "tokens a pass": "t/pass",
}  # explained below
CASE_COLUMNS = {
    "engine": "engine",
    "model": "model",
    "dtype": "dtype",
    "bits": "bits",
    "prompt_tokens": "prompt",
    "generation_tokens": "new",
    "setting": "setting",
}
LEGEND = {
    "prefill_tokens_per_second": "t/s: tokens a second",
    "time_to_first_token_seconds": "first: time to the first token",
    "time_to_first_token_reused_seconds": "reused: the same with all but 8 tokens of the prompt in the cache",
    "tokens_per_pass": "t/pass: tokens that one pass of the model gives",
}


class Grid(NamedTuple):
    """Head and cells of one table; the first `keys` columns say what a row is."""

    head: list[str]
    rows: list[list[str]]
    keys: int


def grid(document: Document) -> Grid:
    """Rows with the case's facts that differ between them, then every metric that was measured."""
    varied = [
        name
        for name in CASE_COLUMNS
        if name == "engine" or len({case_cell(row.case, name) for row in document.rows}) > 1
    ]
    measured = [name for name in COLUMNS if any(name in row.metrics for row in document.rows)]
    head = [CASE_COLUMNS[name] for name in varied] + [short(name) for name in measured]
    rows = [
        [case_cell(row.case, name) for name in varied]
        + [metric_cell(row, name) for name in measured]
        for row in document.rows
    ]
    if any(
        row.percent_of_bound is not None for row in document.rows
    ):  # beside the rate that it judges
        at = head.index(short("decode_tokens_per_second")) + 1
        for cells, text in zip(
            [head, *rows], ["bound", *(bound_cell(row) for row in document.rows)], strict=True
        ):
            cells.insert(at, text)
    return Grid(head, rows, len(varied))


def short(name: str) -> str:
    head = COLUMNS[name][0]
    for long, brief in SHORT.items():
        head = head.replace(long, brief)
    return head


def bound_cell(row: Row) -> str:
    return "" if row.percent_of_bound is None else f"{row.percent_of_bound:.0f} %"


def constants(document: Document) -> str:
    """What all rows have in common, in one line."""
    if not document.rows:
        return "nothing was measured"
    case, words = document.rows[0].case, []
    for name in CASE_COLUMNS:
        if name != "engine" and len({case_cell(row.case, name) for row in document.rows}) == 1:
            words.append(constant(name, case))
    return ", ".join(word for word in words if word)


def constant(name: str, case: Case) -> str:
    if name == "bits":
        return f"{case.bits}-bit weights" if case.bits else ""
    words = {"prompt_tokens": "prompt of {} tokens", "generation_tokens": "{} new tokens"}
    shown = case_cell(case, name)
    return "" if shown == "plain" else words.get(name, "{}").format(shown)


def case_cell(case: Case, name: str) -> str:
    if name == "setting":
        return setting(case)
    if name == "model" and case.random_weights:
        return f"{case.model} (random)"
    value = getattr(case, name)
    return "-" if value is None else str(value)


def setting(case: Case) -> str:
    """What sets a case apart from one plain sequence."""
    parts = [f"batch {case.batch_size}"] * (case.batch_size > 1) + [case.cache] * (
        case.cache != "plain"
    )
    parts += [] if case.speculation is None else [case.speculation]
    return ", ".join(parts) or "plain"


def metric_cell(row: Row, name: str) -> str:
    """Median and quartiles, in the column's unit; why there is none, where there is none."""
    if (metric := row.metrics.get(name)) is None:
        if name == "decode_tokens_per_second" and row.parts_at is not None:
            return f"parts at {row.parts_at}"
        return ""
    return summary(metric, COLUMNS[name][1])


def summary(metric: Metric, divisor: float) -> str:
    """`81.3 (4%)`: the median to three digits, and the interquartile range as a share of it where
    there is one.
    """
    middle = metric.median / divisor
    spread = f"{metric.spread:.0%}"
    return digits(middle, middle) + ("" if spread == "0%" else f" ({spread})")


def digits(value: float, scale: float) -> str:
    """Three significant digits of what `scale` has."""
    scale = abs(scale)
    places = 0 if scale >= 100 else 1 if scale >= 10 else 2 if scale >= 1 else 4
    return f"{value:.{places}f}"


def markdown(document: Document) -> str:
    """The whole document as Markdown, no line over 80 columns but long names: fit to paste into an
    issue.
    """
    lines = [*wrap(f"**{title(document)}**"), "", *wrap(constants(document)), ""]
    for part in parts(document, WIDTH):
        lines += [*table_lines(part), ""]
    for note in [*legend(document), *document.notes, *row_notes(document)]:
        lines += wrap(note, "- ")
    lines += ["", *wrap(f"`{document.command}`")] if document.command else []
    return "\n".join(lines).rstrip() + "\n"


def title(document: Document) -> str:
    machine, versions = asdict(document.machine), document.versions
    memory = machine.get("memory_bytes")
    words = [
        machine.get("chip"),
        f"{machine['cores']} cores" if machine.get("cores") else None,
        f"{memory / 2**30:.0f} GiB" if isinstance(memory, (int, float)) else None,
        f"{machine['system'] or ''} {machine['system_version'] or ''}".strip(),
        f"{machine.get('backend')} backend" if machine.get("backend") else None,
        f"BLAS: {machine['blas']}"
        if machine.get("backend") == "cpu" and machine.get("blas")
        else None,
    ]
    words += [f"{name} {version}" for name, version in versions.items()]
    return ("partial: " if document.partial else "") + ", ".join(
        str(word) for word in words if word
    )


def parts(document: Document, width: int) -> list[Grid]:
    """All tables of a document, none wider than `width`: what was measured, then ours against each
    peer.
    """
    if not document.rows:
        return []
    return split(grid(document), width) + (
        split(ratio_grid(document), width) if document.ratios else []
    )


def split(table: Grid, width: int) -> list[Grid]:
    """Tables of at most `width` columns: the key columns again in each, then as many metrics as
    fit; no empty rows.
    """
    sizes = [
        max(len(cells[i]) for cells in [table.head, *table.rows]) for i in range(len(table.head))
    ]
    keys, parts = list(range(table.keys)), []
    chosen: list[int] = []
    for i in range(table.keys, len(table.head)):
        if chosen and sum(sizes[j] + 3 for j in [*keys, *chosen, i]) + 1 > width:
            parts.append(chosen)
            chosen = []
        chosen.append(i)
    parts.append(chosen)
    found = []
    for part in parts:
        shown = [*keys, *part]
        rows = [
            [row[i] for i in shown] for row in table.rows if not part or any(row[i] for i in part)
        ]
        found.append(Grid([table.head[i] for i in shown], rows, table.keys))
    return found


def table_lines(table: Grid) -> list[str]:
    sizes = [
        max(3, *(len(cells[i]) for cells in [table.head, *table.rows]))
        for i in range(len(table.head))
    ]
    rule = [
        "-" * size if i < table.keys else "-" * (size - 1) + ":" for i, size in enumerate(sizes)
    ]
    lines = []
    for cells in [table.head, rule, *table.rows]:
        padded = [
            cell.ljust(size) if i < table.keys else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def ratio_grid(document: Document) -> Grid:
    """Ours over each peer, a row a case: rates above 1 and times below 1 are in our favour."""
    found: dict[tuple[int, int], dict[str, str]] = {}
    for ratio in document.ratios:
        cell = f"{ratio.ratio:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        found.setdefault((ratio.row, ratio.against), {})[ratio.metric] = cell
    measured = [name for name in COLUMNS if any(name in cells for cells in found.values())]
    peers = [document.rows[peer].case for _, peer in found]
    varied = [
        name
        for name in CASE_COLUMNS
        if name != "engine" and len({case_cell(case, name) for case in peers}) > 1
    ]
    rows = [
        [
            document.rows[peer].case.engine,
            *(case_cell(document.rows[peer].case, name) for name in varied),
        ]
        + [cells.get(name, "") for name in measured]
        for (_, peer), cells in found.items()
    ]
    head = [
        f"{document.rows[document.ratios[0].row].case.engine} /",
        *(CASE_COLUMNS[name] for name in varied),
    ]
    return Grid(head + [short(name).rsplit(" ", 1)[0] for name in measured], rows, len(head))


def legend(document: Document) -> list[str]:
    """What the heads of the columns stand for."""
    words = [
        text for name, text in LEGEND.items() if any(name in row.metrics for row in document.rows)
    ]
    words += ["bound: share of the rate at which a copy moves as many bytes"] * any(
        row.percent_of_bound is not None for row in document.rows
    )
    found = (
        ["; ".join([*words, "in brackets: interquartile range as a share of the median"])]
        if words
        else []
    )
    if document.ratios:
        found.append(
            "ratios to a peer have their 95 % interval in brackets; above 1 is faster, but slower for first"
        )
    return found


def row_notes(document: Document) -> list[str]:
    return [f"{row.case}: {'; '.join(row.notes)}" for row in document.rows if row.notes]


def wrap(text: str, bullet: str = "") -> list[str]:
    import textwrap

    indent = " " * len(bullet)
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=bullet,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def show(document: Document, console: Console) -> None:
    """The same on a terminal."""
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(title(document))}[/bold]\n{escape(constants(document))}")
    for part in parts(document, console.width):
        table = Table()
        for i, name in enumerate(part.head):
            table.add_column(name, justify="left" if i < part.keys else "right")
        for cells in part.rows:
            table.add_row(*(escape(cell) for cell in cells))
        console.print(table)
    for note in [*legend(document), *document.notes, *row_notes(document)]:
        console.print(f"[dim]- {escape(note)}[/dim]")


def csv_text(document: Document) -> str:
    """One line a case: its facts, then median, quartiles and number of trials of every metric, in
    its own unit.
    """
    names = [name for name in METRICS if any(name in row.metrics for row in document.rows)]
    head = [item.name for item in fields(Case)]
    for name in names:
        head += [name, f"{name}_q1", f"{name}_q3", f"{name}_trials"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*head, "bound_tokens_per_second", "percent_of_bound", "agrees", "parts_at", "notes"]
    )
    for row in document.rows:
        cells: list[Any] = list(asdict(row.case).values())
        for name in names:
            metric = row.metrics.get(name)
            cells += (
                [None] * 4
                if metric is None
                else [metric.median, metric.q1, metric.q3, len(metric.values)]
            )
        cells += [
            row.bound_tokens_per_second,
            row.percent_of_bound,
            row.agrees,
            row.parts_at,
            "; ".join(row.notes),
        ]
        writer.writerow(cells)
    return out.getvalue()
