"""A document in words: short names of cases, figures and machines, and the table of its rows as
Markdown, on a terminal, and as CSV. Pictures and the page take their words and cells from here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.benchmarks.results import OURS, first_run
from openelm_mlx.benchmarks.results.document import (
    DECODE,
    HIGHER_IS_BETTER,
    METRICS,
    Case,
    Document,
    Machine,
    Row,
)
from openelm_mlx.dtypes import FLOATS, itemsize

if TYPE_CHECKING:
    from rich.console import Console

# metric -> the head of its column, and what a value is divided by for it
COLUMNS = {
    "prefill_tokens_per_second": ("prefill t/s", 1.0),
    "decode_tokens_per_second": ("decode t/s", 1.0),
    "time_to_first_token_seconds": ("first ms", 1e-3),
    "time_to_first_token_reused_seconds": ("reused ms", 1e-3),
    "startup_seconds": ("start-up s", 1.0),
    "load_seconds": ("load s", 1.0),
    "peak_memory_bytes": ("peak MB", 1e6),
    "tokens_per_pass": ("t/pass", 1.0),
    "kl_mean": ("KL nats", 1.0),
    "top_1_agreement": ("same top-1", 1.0),
}
LEGEND = {
    "prefill_tokens_per_second": "t/s: tokens a second",
    "time_to_first_token_seconds": "first: time to the first token",
    "time_to_first_token_reused_seconds": (
        "reused: the same with all but 8 tokens of the prompt in the cache"
    ),
    "tokens_per_pass": "t/pass: tokens that one pass of the model gives",
}


# --- words


def weights(case: Case) -> str:
    """Return `4-bit`, `4.62 bits/weight` if they are mixed, or the type of unquantized ones."""
    if case.bits is not None:
        return f"{case.bits}-bit"
    mixed = case.bits_per_weight and case.bits_per_weight < unquantized_bits(case) - 1
    return f"{case.bits_per_weight:.3g} bits/weight" if mixed else case.dtype


def unquantized_bits(case: Case) -> int:
    return 8 * itemsize(case.dtype) if case.dtype in FLOATS else 32


def bits_of(case: Case) -> float:
    """Return the bits that a weight takes, with its share of scales if that is known."""
    return case.bits_per_weight or float(case.bits or unquantized_bits(case))


def model_name(case: Case) -> str:
    return f"{case.model} (random weights)" if case.random_weights else case.model


def setting(case: Case) -> str:
    """Return what sets a case apart from one plain sequence: `batch 4, kv8`."""
    parts = [f"batch {case.batch_size}"] * (case.batch_size > 1)
    parts += [case.cache] * (case.cache != "plain") + [case.speculation or ""]
    return ", ".join(filter(None, parts)) or "plain"


def is_plain(case: Case) -> bool:
    return setting(case) == "plain"


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(model_name(row.case), []).append(row)
    return found


def digits(value: float) -> str:
    """Return three significant digits, or all before the point."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    size = abs(value)
    places = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 4 if size < 0.1 else 3
    return f"{value:,.{places}f}"


def verdict(document: Document, number: int) -> str:
    """Return `better` or `worse`, or `no difference` for a ratio whose interval holds 1."""
    ratio = document.ratios[number]
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    return "better" if (ratio.low > 1) == (METRICS[ratio.metric] in HIGHER_IS_BETTER) else "worse"


def ratio_label(document: Document, number: int) -> str:
    """Return `decode over mlx-lm`, and below it the facts in which the document's ratios differ."""
    ratio = document.ratios[number]
    peers = [document.rows[one.against].case for one in document.ratios]
    metric = COLUMNS[ratio.metric][0].rsplit(" ", 1)[0]
    facts = [FACTS[name](peers[number]) for name in varied(peers) if name != "engine"]
    return f"{metric} over {peers[number].engine}" + "\n".join(["", ", ".join(facts)] * bool(facts))


def machine_line(machine: Machine) -> str:
    """Return the machine in one line."""
    facts = [
        " ".join(filter(None, (machine.chip, machine.processor and f"({machine.processor})"))),
        machine.cores and f"{machine.cores} cores",
        machine.memory_bytes and f"{machine.memory_bytes / 2**30:.0f} GiB",
        " ".join(filter(None, (machine.system, machine.system_version))),
        machine.backend and f"{machine.backend} backend",
        machine.blas and machine.backend == "cpu" and f"BLAS: {machine.blas}",
        machine.kernels and f"kernels: {machine.kernels}",
    ]
    return ", ".join(str(fact) for fact in facts if fact)


def not_a_mac(machine: Machine) -> str:
    if (machine.system or "").lower() != "linux":
        return ""
    what = "NVIDIA GPU" if machine.backend == "cuda" else "Linux CPU"
    return f"{what} result, not Apple silicon"


def versions_line(document: Document) -> str:
    found = [f"{name} {version}" for name, version in document.versions.items()]
    if document.commit:
        found.append(f"commit {document.commit[:12]}{' with changes' if document.dirty else ''}")
    return ", ".join(found)


def caption(document: Document) -> str:
    """Return what stands below pictures: lines of the machine, of versions, and of the marks and
    the date.
    """
    facts = [not_a_mac(document.machine), machine_line(document.machine)[:90]]
    marks = ["PARTIAL RUN"] * document.partial + ["dots are medians, lines their quartiles"]
    lines = [facts, [versions_line(document)], [*marks, document.created[:10]]]
    return "\n".join(" · ".join(filter(None, line)) for line in lines)


# --- cells


class Grid(NamedTuple):
    """The head and cells of one table; the first `keys` columns say what a row is."""

    head: list[str]
    rows: list[list[str]]
    keys: int


FACTS = {
    "engine": lambda case: case.engine,
    "model": model_name,
    "dtype": lambda case: case.dtype,
    "weights": weights,
    "prompt": lambda case: f"{case.prompt_tokens:,}",
    "new": lambda case: f"{case.generation_tokens:,}",
    "setting": setting,
}


def varied(cases: Sequence[Case], names: Iterable[str] = FACTS) -> list[str]:
    """Return the facts in which cases differ."""
    return [name for name in names if len({FACTS[name](case) for case in cases}) > 1]


def grid(rows: Sequence[Row]) -> Grid:
    """Return the facts in which the rows differ, then every metric that was measured, and beside
    the decode rate its share of the bound.
    """
    names = list(dict.fromkeys(["engine", *varied([row.case for row in rows])]))
    columns = [
        (head, [metric_cell(row, name) for row in rows])
        for name, (head, _) in COLUMNS.items()
        if any(name in row.metrics for row in rows)
    ]
    shares = ["" if (p := row.percent_of_bound) is None else f"{p:.0f} %" for row in rows]
    if any(shares):
        heads = [head for head, _ in columns]
        columns.insert(heads.index(COLUMNS[DECODE][0]) + 1, ("bound", shares))
    facts = [(name, [FACTS[name](row.case) for row in rows]) for name in names]
    heads, cells = zip(*facts, *columns, strict=True)
    return Grid(list(heads), [list(line) for line in zip(*cells, strict=True)], len(names))


def metric_cell(row: Row, name: str) -> str:
    """Return the median in the column's unit and its spread, `81.3 (4%)`, or why there is none."""
    if (metric := row.metrics.get(name)) is None:
        parted = name == DECODE and row.parts_at is not None
        return f"parts at {row.parts_at}" if parted else ""
    spread = f"{metric.spread:.0%}"
    return digits(metric.median / COLUMNS[name][1]) + (f" ({spread})" if spread != "0%" else "")


def ratio_grid(document: Document) -> Grid:
    """Return ours over each peer, a row a case."""
    found: dict[tuple[int, int], dict[str, str]] = {}
    for one in document.ratios:
        cell = f"{one.ratio:.2f} ({one.low:.2f}-{one.high:.2f})"
        found.setdefault((one.row, one.against), {})[one.metric] = cell
    peers = [document.rows[against].case for _, against in found]
    names = ["engine", *varied(peers, [name for name in FACTS if name != "engine"])]
    measured = [name for name in COLUMNS if any(name in cells for cells in found.values())]
    rows = [
        [FACTS[name](peer) for name in names] + [cells.get(name, "") for name in measured]
        for peer, cells in zip(peers, found.values(), strict=True)
    ]
    heads = [COLUMNS[name][0].rsplit(" ", 1)[0] for name in measured]
    return Grid([f"{OURS} /", *names[1:], *heads], rows, len(names))


def grids(document: Document) -> list[Grid]:
    found = [grid(document.rows)] if document.rows else []
    return found + ([ratio_grid(document)] if document.ratios else [])


# --- what stands around the tables


def constants(rows: Sequence[Row]) -> str:
    """Return what all rows have in common, in one line."""
    if not rows:
        return "no model was timed"
    case, cases = rows[0].case, [row.case for row in rows]
    words = {
        "model": "{}",
        "dtype": "{}",
        "weights": "{} weights" if weights(case) != case.dtype else "",
        "prompt": "prompt of {} tokens",
        "new": "{} new tokens",
        "setting": "{}" if not is_plain(case) else "",
    }
    same = [name for name in words if words[name] and name not in varied(cases)]
    return ", ".join(words[name].format(FACTS[name](case)) for name in same)


def notes(document: Document) -> list[str]:
    """Return what the columns stand for, then the notes of the run and of its rows."""
    rows = document.rows
    words = [text for name, text in LEGEND.items() if any(name in row.metrics for row in rows)]
    found = ["; ".join([*words, "in brackets: interquartile range as a share of the median"])]
    if any(row.percent_of_bound is not None for row in rows):
        found.append("bound: share of the rate at which a copy moves the bytes of a token")
    if document.ratios:
        sure = "processes" if document.processes > 1 else "trials of one process"
        found.append(
            f"ratios to a peer have their 95 % interval over the {sure} in brackets; above 1 is "
            "faster, but slower for first"
        )
    found = found if rows else []
    found += [] if document.first_run is None else first_run.lines(document.first_run)
    return [*found, *document.notes, *(f"{r.case}: {'; '.join(r.notes)}" for r in rows if r.notes)]


def title(document: Document) -> str:
    words = filter(None, (machine_line(document.machine), versions_line(document)))
    return ("partial: " if document.partial else "") + ", ".join(words)


# --- formats


def markdown(document: Document) -> str:
    """Return the whole document as Markdown, fit to paste into an issue."""
    lines = [f"**{title(document)}**", "", constants(document.rows), ""]
    for table in grids(document):
        lines += [*table_lines(table), ""]
    lines += [f"- {note}" for note in notes(document)]
    lines += ["", f"`{document.command}`"] if document.command else []
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Grid) -> list[str]:
    sizes = [max(3, *map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
    sides = [str.ljust if i < table.keys else str.rjust for i in range(len(sizes))]
    rule = ["-" * (n - 1) + ("-" if i < table.keys else ":") for i, n in enumerate(sizes)]
    lines = []
    for cells in (table.head, rule, *table.rows):
        padded = [pad(cell, n) for pad, cell, n in zip(sides, cells, sizes, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def show(document: Document, console: Console) -> None:
    """Print the same on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{escape(title(document))}[/bold]\n{escape(constants(document.rows))}")
    for grid in grids(document):
        columns = list(zip(grid.head, *grid.rows, strict=True))
        narrow = sum(max(map(len, column)) + 3 for column in columns) > console.width
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, int(not narrow)))
        for i, column in enumerate(columns):  # a narrow terminal folds figures at their spaces
            word = max(len(word) for cell in column for word in cell.split())
            if i < grid.keys:
                table.add_column(column[0], no_wrap=True)
            else:
                width = word if narrow else None
                table.add_column(column[0], justify="right", overflow="fold", width=width)
        for cells in grid.rows:
            table.add_row(*map(escape, cells))
        console.print(table, "", sep="\n")
    for note in notes(document):
        console.print(f"[dim]- {escape(note)}[/dim]")


def csv_text(document: Document) -> str:
    """Return a line a case: its facts, then each metric in its own unit, with quartiles and counts
    of trials and processes.
    """
    lines = []
    for row in document.rows:
        line: dict[str, Any] = asdict(row.case)
        for name in ("bound_tokens_per_second", "percent_of_bound", "agrees", "parts_at"):
            line[name] = getattr(row, name)
        line["notes"] = "; ".join(row.notes)
        for name, m in row.metrics.items():
            line |= {name: m.median, f"{name}_q1": m.q1, f"{name}_q3": m.q3}
            line |= {f"{name}_trials": len(m.values), f"{name}_processes": len(m.processes)}
        lines.append(line)
    out, head = io.StringIO(), dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(out, list(head) or ["engine", "model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
