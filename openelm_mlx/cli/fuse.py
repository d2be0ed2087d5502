"""`openelm fuse`: an adapter is merged into the weights of its base."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import Any

from openelm_mlx.cli import convert
from openelm_mlx.cli.options import add_flags, given_path
from openelm_mlx.errors import OptionError

DESCRIPTION = """Merge a LoRA or DoRA adapter into its base model, and write a model folder that
needs no adapter: for openelm-mlx and mlx-lm, for Hugging Face (--to hf) or llama.cpp (--to gguf).
The merge is computed in float32 and rounded once, to the type of the base or to --bits.

Matrices of a quantized base that the adapter changes are written in full precision, unless --bits
quantizes them again, which costs accuracy. An adapter that was trained with --bits can be merged
into the full-precision MODEL too. `openelm convert MODEL --adapter-folder FOLDER` does the same
with more options."""

EXAMPLES = """examples:
  openelm fuse 270m --adapter my-adapter -o my-model
  openelm fuse 270m --adapter my-adapter -o my-model-4bit --bits 4 --verify
  openelm fuse 270m --adapter my-adapter -o my-model.gguf --bits 8
"""
TAKEN: tuple[str, ...] = (
    "target_format",
    "dtype",
    "bits",
    "group_size",
    "mode",
    "recipe",
    "tokenizer",
)
TAKEN += ("verify", "max_kl", "dry_run", "force")


def register(commands: Any) -> None:
    from openelm_mlx.convert.options import ConvertOptions

    parser = commands.add_parser(
        "fuse",
        help="merge an adapter into its base",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    text = "the base: a folder, a .pt or GGUF file, a hub id, or a name: 270m ..."
    parser.add_argument("source", metavar="MODEL", help=text)
    text = "the adapter, written by `openelm finetune`, mlx-lm or PEFT"
    adapter: Any = {"dest": "adapter_folder", "metavar": "FOLDER", "required": True, "help": text}
    parser.add_argument("--adapter", **adapter)
    text = "folder to write, or a GGUF file if it ends in .gguf"
    target: Any = {"dest": "target", "metavar": "PATH", "required": True, "help": text}
    parser.add_argument("-o", "--output", **target)
    text = "print one JSON object: sizes, quantization and losses"
    parser.add_argument("--json", action="store_true", help=text)
    others = {item.name for item in fields(ConvertOptions)} - {*TAKEN}
    add_flags(parser, ConvertOptions, skip=tuple(others))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    folder = given_path(args.adapter_folder)
    if not os.path.exists(folder):  # known before a base is fetched
        remedy = "give the folder of an adapter, as `openelm finetune` writes it"
        raise OptionError(f"--adapter {folder} does not exist; {remedy}")
    report, options = convert.converted(args)
    convert.show(report, options, args.json)
    if report.dequantized and options.format == "mlx" and not args.json:
        what = f"{report.dequantized} matrices that were quantized are now in full precision"
        print(f"{what}; --bits quantizes them again")
    return 0
