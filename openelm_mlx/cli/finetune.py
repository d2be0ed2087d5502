"""`openelm finetune`: a model learns from examples."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_flags,
    from_args,
    given_path,
    load_model,
)
from openelm_mlx.engine.options import ModelOptions
from openelm_mlx.finetune.options import FinetuneOptions

DESCRIPTION = """Train a model on examples of your own."""

EXAMPLES = """examples:
  openelm finetune openelm-tiny pairs.jsonl -o my-adapter
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="train a model on examples of yours",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("data", metavar="DATA", help="a file of examples")
    text = "what is written"
    output: Any = {"dest": "folder", "metavar": "FOLDER", "required": True}
    parser.add_argument("-o", "--output", **output, help=text)
    add_flags(parser, FinetuneOptions)
    add_flags(parser, ModelOptions, skip=("adapter",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = from_args(FinetuneOptions, args)
    engine = load_model(args.model, args)
    from openelm_mlx.finetune.loop import finetune

    folder = given_path(args.folder)
    finetune(engine, given_path(args.data), folder, options, progress=show)
    return 0


def show(row: dict[str, Any], steps: int) -> None:
    print(row, file=sys.stderr, flush=True)
