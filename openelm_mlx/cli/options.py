"""Flags made from option dataclasses, so that names, defaults and help are written once."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

from openelm_mlx.cli.streams import Waiting

T = TypeVar("T")


def add_flags(parser: argparse.ArgumentParser, options: type, skip: tuple[str, ...] = ()) -> None:
    """One `--flag` for each field of the dataclass `options` that has help in its metadata."""
    group = parser.add_argument_group(options.__name__.removesuffix("Options").lower() + " options")
    for item in fields(options):
        if item.name not in skip and "help" in item.metadata:
            add_flag(group, item)


def add_flag(group: Any, item: Field[Any]) -> None:
    kind, default = str(item.type), None if item.default is MISSING else item.default
    flag = item.metadata.get("flag") or "--" + item.name.replace("_", "-")
    text = item.metadata["help"] + ("" if default in (None, (), False, True) else f" (default {default})")
    if kind.startswith("bool"):
        group.add_argument(flag, dest=item.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif kind.startswith("tuple"):
        group.add_argument(flag, dest=item.name, action="append", metavar="TEXT", default=argparse.SUPPRESS, help=text)
    else:
        reads = int if kind.startswith("int") else float if kind.startswith("float") else str
        group.add_argument(
            flag, dest=item.name, type=reads, choices=item.metadata.get("choices"), default=argparse.SUPPRESS, help=text,
            metavar=None if "choices" in item.metadata else {int: "N", float: "X", str: "TEXT"}[reads],
        )  # fmt: skip


def from_args(options: type[T], args: argparse.Namespace, **defaults: Any) -> T:
    """The dataclass, with what was given on the command line over `defaults` over its own defaults."""
    given = {f.name: getattr(args, f.name) for f in fields(options) if hasattr(args, f.name)}  # type: ignore[arg-type]
    return options(**{**defaults, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}})


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, the same for every command that runs one."""
    group = parser.add_argument_group("model options")
    group.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="compute in this type")
    group.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="quantize while loading")
    group.add_argument("--group-size", type=int, choices=(32, 64, 128), default=64, help="with --bits (default 64)")
    group.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model from elsewhere")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub")


def add_draft_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft-model", metavar="MODEL", help="a smaller model that drafts tokens; the text stays the same")


def load_draft(args: argparse.Namespace) -> Any:
    """The engine of `--draft-model`, or None."""
    from openelm_mlx.loading import load

    if args.draft_model is None:
        return None
    with Waiting(f"loading {args.draft_model}"):
        return load(args.draft_model, args.dtype, tokenizer=args.tokenizer)


def load_model(name: str, args: argparse.Namespace) -> Any:
    from openelm_mlx.loading import load

    with Waiting(f"loading {name}"):
        return load(name, args.dtype, args.bits, args.group_size, args.tokenizer, args.revision)
