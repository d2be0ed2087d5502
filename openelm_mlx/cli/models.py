"""`openelm models`: every name a model has, what of it is on this disk, and its removal."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.cli.inventory import Kept

EXAMPLES = """examples:
  openelm models                       all names, and what is on this disk
  openelm models remove 270m           free the space that it takes
  openelm models remove corenet:3b checkpoint-40fb0a99d8088065 --yes

A file or a corenet: name that is given as MODEL is converted once, and the conversion is kept here.
When all of them take more than $OPENELM_CACHE_GB (50 unless set), those not used for longest go.
`openelm convert` makes a folder of your own.
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        help="names of models, and what is on this disk",
        description="List every name of a model with what it takes on this disk, or remove it from there.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="actions", metavar="[ACTION]")
    removing = actions.add_parser(
        "remove",
        help="remove models from this disk",
        description="Remove what was fetched or converted; it asks first.",
    )
    removing.add_argument(
        "names",
        metavar="NAME",
        nargs="+",
        help="a name from the list, a hub id, or a converted file",
    )
    removing.add_argument("-y", "--yes", action="store_true", help="do not ask")
    removing.set_defaults(run=remove)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.cli.inventory import inventory
    from openelm_mlx.engine.hub import hub_cache
    from openelm_mlx.engine.model_cache import conversions_folder, limit_bytes

    models, limit = inventory(), limit_bytes()
    if args.json:
        places = {
            "hub_cache": hub_cache(),
            "converted_cache": conversions_folder(),
            "converted_limit_bytes": int(limit),
        }
        print(json.dumps({"models": [asdict(one) for one in models], **places}, default=str))
    else:
        show(models, limit)
    return 0


def show(models: list[Kept], limit: float) -> None:
    """Names, sizes and meanings; the many names of one checkpoint in training share a line unless
    they are here.
    """
    from openelm_mlx.cli.inventory import size_text
    from openelm_mlx.engine.hub import hub_cache
    from openelm_mlx.engine.model_cache import cache_folder, conversions_folder

    rows = [("MODEL", "ON DISK", "")]
    for one in models:
        if one.kind != "converted" and (one.path is not None or "@" not in one.name):
            size = "-" if one.path is None else size_text(one.nbytes)
            rows.append((one.name, size, one.about + (" (fetched in part)" if one.partial else "")))
    iterations = sorted(
        {int(one.name.rpartition("@")[2][:-1]) for one in models if "@" in one.name}
    )
    steps = ", ".join(f"@{n}k" for n in iterations)
    rows.append(
        ("corenet:SIZE@50k", "-", f"CoreNet's checkpoints in training, of each size: {steps}")
    )
    print_rows(rows)
    kept = [one for one in models if one.kind == "converted"]
    if kept:
        total = size_text(sum(one.nbytes for one in kept))
        print(f"\nconverted, {total} of at most {size_text(limit)} in {conversions_folder()}:")
        print_rows([(one.name, size_text(one.nbytes), one.about) for one in kept])
    print(
        f"\nfetched models lie in {hub_cache()} and {cache_folder()}; `openelm models remove NAME` frees their space"
    )


def print_rows(rows: list[tuple[str, str, str]]) -> None:
    width = max(len(row[0]) for row in rows)
    for name, size, about in rows:
        print(f"{name:<{width}}  {size:>9}  {about}".rstrip())


def remove(args: argparse.Namespace) -> int:
    from openelm_mlx.cli import inventory
    from openelm_mlx.cli.inventory import size_text
    from openelm_mlx.errors import OptionError

    found = list(dict.fromkeys(one for name in args.names for one in inventory.matching(name)))
    for one in found:
        print(f"{one.name}: {size_text(one.nbytes)} in {one.path}", file=sys.stderr)
    if not args.yes:
        if not sys.stdin.isatty():
            raise OptionError("nothing was removed: nobody can be asked here; give --yes")
        print("remove? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed", file=sys.stderr)
            return 1
    for one in found:
        inventory.remove(one)
        print(f"removed {one.name}")
    return 0
