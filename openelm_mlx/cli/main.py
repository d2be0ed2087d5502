"""`openelm`: finds the command, runs it, and turns a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from openelm_mlx import __version__
from openelm_mlx.errors import OpenELMError

COMMANDS = ("chat", "generate", "convert", "benchmark", "inspect", "doctor")

EXAMPLES = """examples:
  openelm chat                                     talk to the bundled model
  openelm chat 270m-instruct                       talk to Apple's, downloaded once
  openelm generate "Once upon a time" --max-tokens 64
  openelm convert checkpoint.pt -o my-model --bits 4
  openelm benchmark                                tokens per second on this machine
  openelm inspect 1.1b                             heads and widths of every layer

MODEL is a folder, a hub id (owner/name), openelm-tiny, or one of
270m 450m 1.1b 3b, each also with -instruct.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openelm",
        description="Apple's OpenELM language models on MLX.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"openelm-mlx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"openelm_mlx.cli.{name}").register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except OpenELMError as error:
        print(f"openelm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, as `| head` does; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
