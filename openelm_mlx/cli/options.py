"""Makes flags from option dataclasses, so that names, defaults and help are written once."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, Field, asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from openelm_mlx.cli.display import Waiting
from openelm_mlx.engine.options import GenerationOptions, ModelOptions
from openelm_mlx.errors import OptionError, PromptError
from openelm_mlx.fields import nearest

T = TypeVar("T")
MODEL_HELP = "a name from `openelm models`, a folder or a file (default openelm-tiny)"
# what other programs call it: commands, then flags, then settings
OTHER_NAMES = {
    "bench": "benchmark",
    "complete": "generate",
    "info": "inspect",
    "list": "models",
    "lora": "finetune",
    "ls": "models",
    "merge": "fuse",
    "ppl": "perplexity",
    "pull": "models",
    "quantize": "convert",
    "rm": "models",
    "run": "chat",
    "show": "inspect",
    "train": "finetune",
    "-n": "--max-tokens",
    "--adapter-path": "--adapter",
    "--batch-size": "--batch",
    "--ctx-size": "--context",
    "--iters": "--steps",
    "--lr": "--learning-rate",
    "--lora": "--adapter",
    "--max-num-seqs": "--slots",
    "--model-draft": "--draft-model",
    "--n-predict": "--max-tokens",
    "--parallel": "--slots",
    "--q-bits": "--bits",
    "-q": "--bits",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
}


class Paragraphs(argparse.HelpFormatter):
    """Fits paragraphs to the terminal, and leaves indented lines, such as examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        for apart, lines in groupby(text.splitlines(), lambda line: line[:1] in ("", " ")):
            if not apart:
                lines = iter(textwrap.wrap(" ".join(lines), width, break_on_hyphens=False))
            filled += lines
        return "\n".join(indent + line for line in filled)


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with the nearest option, command or choice if there is one.

    `of_stray_words` ends the error about an unexpected argument: it says where the command expects
    such words.
    """

    of_stray_words = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Paragraphs, **kwargs})

    def error(self, message: str) -> NoReturn:
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{self.prog}: {message}{see} {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or a version. Unlike the base class, raise if it cannot be written."""
        if message:
            (file or sys.stderr).write(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base class does, and refuse leftovers here, where the options are known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest and rest[0].startswith("-"):
            flag = rest[0].partition("=")[0]
            positional = {action.dest for action in self._actions if not action.option_strings}
            if flag in ("-m", "--model") and positional & {"model", "models"}:
                self.error(f"{flag} is not an option here; give MODEL without it")
            if flag in self._option_string_actions:
                self.error(f"{flag} comes after --, where nothing is an option; give it before")
            self.error(f"unknown option {flag}{did_you_mean(flag, self._option_string_actions)}")
        if rest:
            self.error(f"unexpected argument {rest[0]!r}{self.of_stray_words}")
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        hint = did_you_mean(str(value), choices) or f"; allowed: {', '.join(choices)}"
        if action.option_strings:
            raise argparse.ArgumentError(None, f"{action.option_strings[0]} is {value!r}{hint}")
        noun = str(action.metavar).lower().strip("[]")
        what = f"{value!r} is not {'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        raise argparse.ArgumentError(None, f"{what}{hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End an error message with the known word that was meant, or with nothing if none is near."""
    known, near = list(known), OTHER_NAMES.get(word)
    if near not in known:
        dashes = "--" if word.startswith("--") else ""  # which make no flag like another
        names = [one.removeprefix(dashes) for one in known if one.startswith(dashes)]
        found = nearest(word.removeprefix(dashes), names)
        near = found and dashes + found
    return f"; did you mean {near}?" if near else ""


def integer(text: str) -> int:
    """Parse the value of a flag that takes an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def real(text: str) -> float:
    """Parse the value of a flag that takes a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def contents(name: str) -> str:
    """Read the file that a flag names. Raises an `OpenELMError`."""
    return text_of(given_path(name))


def given_path(name: str) -> Path:
    """Return the path that was typed, without quotes around it; ~ is the home folder."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise OptionError(f"{name} is in a home folder that is not known; give its path") from None


def text_of(path: Path, most: int | None = None) -> str:
    """Return the text of a file of at most `most` bytes. Raises `PromptError`."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise PromptError(f"{path} is not a regular file; give a file of text")
        if most is not None and path.stat().st_size > most:
            what = f"{path} has {path.stat().st_size:,} bytes, far more than fits the context"
            raise PromptError(f"{what}; give a part")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        if b"\0" in error.object:
            raise PromptError(f"{path} is not text; give a file of text") from None
        what = f"{path} is not UTF-8 text (byte {error.start})"
        raise PromptError(f"{what}; convert it, as with iconv -f latin1 -t utf-8") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise PromptError(f"cannot read {path}: {why}") from None


# by the annotation of a field: how its flag is parsed, and what help calls its value
VALUES = {"int": (integer, "N"), "float": (real, "X"), "str": (str, "TEXT"), "Path": (str, "FILE")}


def add_flags(parser: argparse.ArgumentParser, options: type, skip: tuple[str, ...] = ()) -> None:
    """Add one `--flag` for each field of the dataclass `options` that has help in its metadata.

    Help shows them in one group, or in those that fields with a `group` in their metadata begin.
    """
    title, groups = options.__name__.removesuffix("Options").lower(), {}
    for item in fields(options):
        title = item.metadata.get("group", title)
        if item.name not in skip and has_flag(item):
            if title not in groups:
                groups[title] = parser.add_argument_group(f"{title} options")
            add_flag(groups[title], item)


def has_flag(item: Field[Any]) -> bool:
    """Return whether an option can be given as text: some are for Python only."""
    return "help" in item.metadata and item.metadata.get("flag", "") is not None


def add_flag(group: Any, item: Field[Any]) -> None:
    """Add the flag of one option; its value is absent unless it is given."""
    known, kind = item.metadata, str(item.type)
    flag, text = known.get("flag") or "--" + item.name.replace("_", "-"), known["help"]
    if item.default is not MISSING and item.default not in (None, (), False, True):
        default = item.default
        text += f" (default {' '.join(default) if isinstance(default, tuple) else default})"
    how: dict[str, Any]
    if kind.startswith("bool"):
        how = {"action": argparse.BooleanOptionalAction}
    elif kind.startswith("tuple"):
        several = "nargs" in known
        if several:
            text += "; blanks or commas between them" if known.get("commas") else ""
        else:
            text += "; may be given several times"
            text += ", or once with commas between them" if known.get("commas") else ""
        how = {"action": "extend" if several else "append", "nargs": known.get("nargs")}
        how |= {"type": integer if kind.startswith("tuple[int") else str}
        how |= {"metavar": known.get("metavar", "TEXT")}
    else:
        parse, metavar = VALUES[kind.partition(" | ")[0]]
        file = kind.startswith("str") and known.get("metavar") == "FILE"
        how = {"type": contents if file else parse, "choices": known.get("choices")}
        how |= {"metavar": known.get("metavar", None if "choices" in known else metavar)}
    group.add_argument(flag, dest=item.name, default=argparse.SUPPRESS, help=text, **how)


def from_args(options: type[T], args: argparse.Namespace, **defaults: Any) -> T:
    """Make the dataclass: the command line goes over `defaults`, which go over its own."""
    return options(**{**defaults, **given_fields(options, args)})


def given_fields(options: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the dataclass that were given on the command line."""
    given = {}
    for item in fields(options):
        if hasattr(args, item.name) and item.metadata.get("flag", "") is not None:
            value, commas = getattr(args, item.name), item.metadata.get("commas")
            if commas and {"choices", "nargs"} & {*item.metadata}:  # words; texts may have commas
                value = [word.strip() for word in ",".join(value).split(",") if word.strip()]
            elif commas and len(value) == 1:
                value = value[0].split(",")
            given[item.name] = tuple(value) if isinstance(value, list) else value
    return given


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for loading a model, the same for every command that runs one."""
    add_flags(parser, ModelOptions)


def add_draft_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="a smaller model that drafts tokens; the text stays the same",
    )


def load_draft(args: argparse.Namespace) -> Any:
    """Load the engine of `--draft-model`; None if the flag was not given."""
    return None if args.draft_model is None else load_beside(args.draft_model, args)


def load_beside(name: str, args: argparse.Namespace) -> Any:
    """Load the engine of a second model: type and tokenizer are asked for both."""
    from openelm_mlx.engine.loading import load

    options = from_args(ModelOptions, args)
    with Waiting(f"loading {name}"):
        return load(name, options.dtype, tokenizer=options.tokenizer)


def load_model(name: str, args: argparse.Namespace) -> Any:
    """Load the engine of `name`. Raises `OptionError` first, for options that would do nothing."""
    options = from_args(ModelOptions, args)
    from_args(GenerationOptions, args).check_draft(getattr(args, "draft_model", None) is not None)
    from openelm_mlx.engine.loading import load

    with Waiting(f"loading {name}"):
        return load(name, **asdict(options))
