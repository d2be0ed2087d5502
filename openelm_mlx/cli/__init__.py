"""The command line: one small file a command, flags made from the option dataclasses.

It reads arguments and shows results, and asks the other rooms for everything that computes.
Nothing here loads MLX before a command runs, and no other room imports from here.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TextIO

from openelm_mlx import __version__
from openelm_mlx.cli.display import all_characters
from openelm_mlx.cli.options import Parser
from openelm_mlx.errors import OpenELMError
from openelm_mlx.model.config import PUBLISHED

COMMANDS = (
    "chat",
    "generate",
    "serve",
    "batch",
    "convert",
    "evaluate",
    "perplexity",
    "compare",
    "finetune",
    "fuse",
    "benchmark",
    "inspect",
    "models",
    "doctor",
)
# errors of a stream that is full or gone
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)

EXAMPLES = f"""examples:
  openelm chat                                     talk to the bundled model
  openelm chat 270m-instruct                       talk to Apple's, downloaded once
  openelm generate "Once upon a time" --max-tokens 64
  openelm serve 270m-instruct                      OpenAI's API, and a page to chat in
  openelm convert checkpoint.pt -o my-model --bits 4
  openelm finetune 270m pairs.jsonl -o my-adapter  it learns from examples of yours
  openelm fuse 270m --adapter my-adapter -o mine   an adapter becomes part of its model
  openelm evaluate 270m                            scores beside those that Apple published
  openelm perplexity 270m --text long.txt          how well a model predicts a text
  openelm compare 270m my-model                    what a quantized model has lost
  openelm benchmark                                tokens per second on this machine
  openelm inspect 1.1b                             heads and sizes of every layer

MODEL is a folder, a .gguf file, a CoreNet checkpoint (.pt), a hub id
(owner/name), openelm-tiny, or one of {" ".join(PUBLISHED)}, each also with
-instruct; `openelm models` lists all names.
"""

# metavars of what a shell completes by the names of files
FILES = ("FILE", "FOLDER", "MODEL", "ORIGINAL", "SOURCE", "TARGET", "PATH", "DATA")
SHELLS = ("bash", "zsh", "fish")
COMPLETION_EXAMPLES = """examples:
  openelm completion bash > ~/.local/share/bash-completion/completions/openelm
  openelm completion zsh > ~/.zfunc/_openelm      with `fpath+=~/.zfunc` before compinit in ~/.zshrc
  openelm completion fish > ~/.config/fish/completions/openelm.fish
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="openelm",
        description="Apple's OpenELM language models on MLX.",
        epilog=EXAMPLES,
    )
    parser.set_defaults(run=lambda args: parser.print_help())
    parser.add_argument("-V", "--version", action="version", version=f"openelm-mlx {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        import_module(f"openelm_mlx.cli.{name}").register(commands)
    completing = commands.add_parser(
        "completion",
        help="completion of commands and options for a shell",
        description="Print the completion script for a shell.",
        epilog=COMPLETION_EXAMPLES,
    )
    completing.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    completing.set_defaults(run=lambda args: print(completion(parser, args.shell)))
    helper = commands.add_parser("help", help="this page, or that of a command")
    names = [*commands.choices]
    helper.add_argument("command", metavar="COMMAND", nargs="?", choices=names)
    helper.set_defaults(run=lambda args: commands.choices.get(args.command, parser).print_help())
    return parser


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script by which `shell` (one of `SHELLS`) completes every command and option."""
    import shtab

    for action in actions(parser):
        if action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    return str(shtab.complete(parser, shell))


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Iterate over the options and arguments of a parser and of the commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 2 for a mistake of the user's and for output that cannot be written.
    """
    occupy_closed_streams()
    if sys.stdout is None:
        what = "standard output is closed, so no result can be shown"
        say(f"openelm: {what}; leave out `>&-`, or write `>/dev/null`")
        return 2
    all_characters(sys.stdout)
    try:
        try:
            args = build_parser().parse_args(argv)
            return int(args.run(args) or 0)
        finally:
            sys.stdout.flush()
    except OpenELMError as error:
        say(f"openelm: {error}")
        return 2
    except KeyboardInterrupt:
        say("")
        return 130
    except BrokenPipeError:  # the reader left, as `| head` does
        abandon(sys.stdout)
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        abandon(sys.stdout)
        say(f"openelm: the output cannot be written: {error.strerror}")
        return 2


def occupy_closed_streams() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed.

    Otherwise a model's file would get that number and be taken for a stream.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # print(file=None) would write to stdout


def say(text: str) -> None:
    """Print one line on stderr, if that can be written; a name of a file need not be UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)


def abandon(stream: TextIO) -> None:
    """Discard what is left in a stream: it would fail once more at exit, with a traceback."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
