"""`openelm serve`: an API like OpenAI's, and a page to chat in."""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

from openelm_mlx.cli.options import MODEL_HELP, add_flags, from_args
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.server.options import ServerOptions

EXAMPLES = """examples:
  openelm serve                                  the bundled model, at http://127.0.0.1:8080
  openelm serve 270m-instruct 450m-instruct      several models; a request names one
  openelm serve 270m-instruct --adapter story=FOLDER         also as 270m-instruct:story
  openelm serve 1.1b-instruct --bits 4 --slots 8
  openelm serve --host 0.0.0.0 --api-key-file keys.txt       for other machines too
"""

DESCRIPTION = """Answer requests of OpenAI's clients, and show a page to chat in. What a request
asks for is done exactly, or refused by name."""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's clients and browsers",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help=MODEL_HELP)
    add_flags(parser, ServerOptions)
    add_flags(parser, EngineOptions)
    add_flags(parser, ModelOptions, skip=("adapter",))  # the server's own flag has several
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until uvicorn takes it
    try:
        return served(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def served(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit status."""
    options, loading = from_args(ServerOptions, args), from_args(ModelOptions, args)
    running = from_args(EngineOptions, args)
    try:
        from openelm_mlx.server.run import serve
    except ImportError as error:
        what = f"openelm serve needs the package {error.name}"
        raise OptionError(f"{what}; pip install 'openelm-mlx[server]'") from None
    return serve(args.models or ["openelm-tiny"], options, loading, running)
