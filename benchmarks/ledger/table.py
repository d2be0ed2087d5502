"""The ledgers side by side, for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from openelm_mlx.benchmarks.ledger.count import ABSORBED, Ledger
from openelm_mlx.benchmarks.ledger.host import HostTime

UNTESTED = (
    "Counted on the graph by the rules of MLX's Metal source; not run on Metal. Weights are read once; buffers are "
    "updated in place."
)


def show(
    model: str, context: int, rows: int, ledgers: Sequence[Ledger], times: Mapping[str, HostTime]
) -> None:
    """Print kernels by purpose and by primitive, bytes by part, and the host's time."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
    of = "one token" if rows == 1 else f"one token of each of {rows} rows"

    def table(
        title: str,
        first: str,
        rows: Mapping[str, Sequence[str]],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
        grid.add_column(first, overflow="fold")
        for entry in ledgers:
            grid.add_column(entry.engine, justify="right")
        if notes is not None:
            grid.add_column("a kernel made for it could save it:", overflow="fold")
        for name, cells in rows.items():
            grid.add_row(name, *cells, *([] if notes is None else [notes.get(name, "")]))
        console.print(grid)
        console.print()

    def merged(counters: Sequence[Mapping[str, int]]) -> dict[str, list[str]]:
        names = dict.fromkeys(name for c in counters for name in c)  # as they run
        return {name: [f"{c[name]:,}" if c.get(name) else "-" for c in counters] for name in names}

    total = {"all": [str(entry.kernels) for entry in ledgers]}
    table(
        f"OpenELM {model}: kernels of {of} at {context} tokens, by purpose",
        "for",
        merged([e.by_purpose for e in ledgers]) | total,
        ABSORBED,
    )
    table(
        "The same kernels by primitive",
        "primitive",
        merged([e.by_primitive for e in ledgers]) | total,
    )
    table(
        "Bytes read, by part",
        "part",
        merged([e.bytes_read for e in ledgers])
        | {"weights, keys, values": [f"{e.bytes_from_memory:,}" for e in ledgers]},
    )
    table("Bytes written", "part", merged([e.bytes_written for e in ledgers]))
    if times:
        peer = times["mlx-lm"]
        console.print(
            "Host time for a step, mx.fast calls as one primitive each (us, and as a share of mlx-lm's):"
        )
        for name, t in times.items():
            pairs = [
                ("build", t.build, peer.build),
                ("submit", t.submit, peer.submit),
                ("both", t.total, peer.total),
            ]
            figures = [f"{word} {1e6 * own:5.0f} ({own / other:.2f})" for word, own, other in pairs]
            console.print(f"  {name:<22}  {'  '.join(figures)}")
        console.print()
    console.print(UNTESTED)
