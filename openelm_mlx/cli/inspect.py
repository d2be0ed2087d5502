"""`openelm inspect`: what a model is made of, without reading its weights."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from openelm_mlx.cli.options import MODEL_HELP

EXAMPLES = """examples:
  openelm inspect 1.1b                 a published size, nothing downloaded
  openelm inspect my-model --json
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="layers, parameters and bytes of a model",
        description="Heads and widths of each layer, parameters, bytes by part. Reads no weights, only their headers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default="openelm-tiny", help=MODEL_HELP
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.cli.inspection import inspect

    facts = inspect(args.model)
    if args.json:
        print(json.dumps(facts))
    else:
        show(facts)
    return 0


def show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80)
    table = Table(
        title=f"{facts['name']}: {facts['layers_total']} layers, dim {facts['model_dim']}",
        title_justify="left",
    )
    for column in ("layer", "query heads", "kv heads", "FFN width"):
        table.add_column(column, justify="right")
    table.add_column("parameters")
    widest = max(layer["parameters"] for layer in facts["layers"])
    for number, layer in enumerate(facts["layers"]):
        bar = "█" * max(1, round(24 * layer["parameters"] / widest))
        table.add_row(
            str(number),
            str(layer["q_heads"]),
            str(layer["kv_heads"]),
            str(layer["ffn_dim"]),
            f"{bar} {layer['parameters'] / 1e6:.2f}M",
        )
    console.print(table)
    print(f"parameters          {facts['parameters']:,}")
    print(
        f"vocabulary          {facts['vocab_size']:,}, context {facts['max_context_length']:,} tokens"
    )
    print(
        f"weights             {facts['bytes']:,} bytes, {facts['bits_per_weight']:.2f} bits per weight"
    )
    for part, size in facts["bytes_by_part"].items():
        print(f"  {part:<18}{size:,} bytes ({size / facts['bytes']:.1%})")
    print(f"a token reads       {facts['bytes_read_per_token']:,} bytes of weights")
    print(
        "a token adds        "
        + "; ".join(f"{size:,} bytes {kind}" for kind, size in facts["kv_bytes_per_token"].items())
    )
    print(f"assumed             {facts['assumed']}")
