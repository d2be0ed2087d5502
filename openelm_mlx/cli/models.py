"""`openelm models`: every name that a model has, what of it is on this disk, and its removal."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from openelm_mlx.errors import HubError, OptionError

EXAMPLES = """examples:
  openelm models                       all names, and what is on this disk
  openelm models remove 270m           free the space that it takes
  openelm models remove corenet:3b checkpoint-40fb0a99d8088065 --yes

A file or a corenet: name that is given as MODEL is converted once, and the conversion is kept here.
When all of them take more than $OPENELM_CACHE_GB (50 unless set), those not used for longest go.
`openelm convert` makes a folder of your own.
"""


@dataclass(frozen=True)
class Kept:
    """A name and what it stands for; `path` is None and `nbytes` 0 if nothing of it is here.

    `kind` is bundled, hub, corenet or converted. `partial` marks an interrupted download, which
    continues when the model is asked for again. A conversion has `used`, in seconds since the
    epoch, and `sources`, the paths or names it was made from.
    """

    kind: str
    name: str
    about: str
    path: Path | None = None
    nbytes: int = 0
    partial: bool = False
    used: float | None = None
    sources: tuple[str, ...] = ()


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "models",
        help="names of models, and what is on this disk",
        description="List every name of a model with its size on this disk, "
        "or remove models from there.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(title="actions", metavar="[ACTION]")
    removing = actions.add_parser(
        "remove",
        help="remove models from this disk",
        description="Remove what was fetched or converted; it asks first.",
    )
    text = "a name from the list, a hub id, or a converted file"
    removing.add_argument("names", metavar="NAME", nargs="+", help=text)
    removing.add_argument("-y", "--yes", action="store_true", help="do not ask")
    removing.set_defaults(run=remove)


def run(args: argparse.Namespace) -> int:
    from openelm_mlx.engine.hub import hub_cache
    from openelm_mlx.engine.model_cache import conversions_folder, limit_bytes
    from openelm_mlx.evaluate.store import answers_folder

    models, limit = inventory(), limit_bytes()
    if args.json:
        places = {
            "hub_cache": hub_cache(),
            "answers": {"path": answers_folder(), "nbytes": size_of(answers_folder())},
            "converted_cache": conversions_folder(),
            "converted_limit_bytes": int(limit),
        }
        print(json.dumps({"models": [asdict(one) for one in models], **places}, default=str))
    else:
        show(models, limit)
    return 0


def show(models: list[Kept], limit: float) -> None:
    """Print names, sizes and meanings; checkpoints in training that are not here share a line."""
    from openelm_mlx.engine.hub import hub_cache
    from openelm_mlx.engine.model_cache import conversions_folder
    from openelm_mlx.evaluate.store import KEPT_DAYS, answers_folder
    from openelm_mlx.files import cache_folder

    rows = [("MODEL", "ON DISK", "")]
    for one in models:
        if one.kind != "converted" and (one.path is not None or "@" not in one.name):
            size = "-" if one.path is None else size_text(one.nbytes)
            rows.append((one.name, size, one.about + (" (fetched in part)" if one.partial else "")))
    iterations = {int(one.name.rpartition("@")[2][:-1]) for one in models if "@" in one.name}
    steps = ", ".join(f"@{n}k" for n in sorted(iterations))
    about = f"CoreNet's checkpoints in training, of each size: {steps}"
    rows.append(("corenet:SIZE@50k", "-", about))
    about = "the same with the state of the optimizer: three times the bytes, the same weights"
    print_rows([*rows, ("corenet:SIZE-training@50k", "-", about)])
    kept = [one for one in models if one.kind == "converted"]
    if kept:
        total = size_text(sum(one.nbytes for one in kept))
        print(f"\nconverted, {total} of at most {size_text(limit)} in {conversions_folder()}:")
        print_rows([(one.name, size_text(one.nbytes), one.about) for one in kept])
    if answers := size_of(answers_folder()):
        what = f"answers of evaluations that were stopped, {size_text(answers)}"
        print(f"\n{what} in {answers_folder()}: they go after {KEPT_DAYS:g} days")
    remedy = "`openelm models remove NAME` frees their space"
    print(f"\nfetched models are in {hub_cache()} and {cache_folder()}; {remedy}")


def print_rows(rows: list[tuple[str, str, str]]) -> None:
    width = max(len(row[0]) for row in rows)
    for name, size, about in rows:
        print(f"{name:<{width}}  {size:>9}  {about}".rstrip())


def remove(args: argparse.Namespace) -> int:
    found = list(dict.fromkeys(one for name in args.names for one in matching(name)))
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
        delete(one)
        print(f"removed {one.name}")
    return 0


def inventory() -> list[Kept]:
    """List all names, conversions last, the most recently used of them first."""
    from openelm_mlx.engine.hub import BUNDLED

    models = [Kept("bundled", "openelm-tiny", "comes with openelm-mlx", BUNDLED, size_of(BUNDLED))]
    return models + on_the_hub() + from_corenet() + converted()


def on_the_hub() -> list[Kept]:
    from openelm_mlx.engine.hub import SHORT_NAMES, cached_repositories

    found = cached_repositories()
    names = {hub_id: name for name, hub_id in SHORT_NAMES.items()}
    names |= {
        hub_id: hub_id
        for hub_id in sorted(found)
        if "openelm" in hub_id.lower() and hub_id not in names
    }
    models = []
    for hub_id, name in names.items():
        about = hub_id if name != hub_id else "from the hub"
        path = found.get(hub_id)
        cut = path is not None and any(path.glob("blobs/*.incomplete"))
        models.append(Kept("hub", name, about, path, 0 if path is None else size_of(path), cut))
    return models


def from_corenet() -> list[Kept]:
    from openelm_mlx.convert.fetch import CATALOG, fetched_folder

    models = []
    for entry in CATALOG.values():
        one, folder = Kept("corenet", entry.name, entry.about), fetched_folder(entry)
        if folder.is_dir():
            cut = any(folder.glob("*.part"))
            one = replace(one, path=folder, nbytes=size_of(folder), partial=cut)
        models.append(one)
    return models


def converted() -> list[Kept]:
    from openelm_mlx.engine.model_cache import conversions

    return [
        Kept(
            "converted",
            one.folder.name,
            ", ".join(one.sources) or "from an earlier version",
            one.folder,
            one.nbytes,
            used=one.used,
            sources=one.sources,
        )
        for one in reversed(conversions())
    ]


def matching(name: str) -> list[Kept]:
    """List what `name` stands for on this disk, conversions of it included. Raises `HubError`."""
    from openelm_mlx.engine.hub import SHORT_NAMES, cached_repositories, is_published

    if name == "openelm-tiny":
        raise HubError("openelm-tiny comes with openelm-mlx and stays as long as it does")
    if is_published(name):
        from openelm_mlx.convert.fetch import published

        name = published(name).name  # raises an error with the nearest names
    hub_id = SHORT_NAMES.get(name.lower(), name)
    names = {name, hub_id, str(Path(os.path.abspath(os.path.expanduser(name))))}
    found = [
        one
        for one in on_the_hub() + from_corenet() + converted()
        if one.path is not None
        and names & {one.name, SHORT_NAMES.get(one.name, one.name), *one.sources}
    ]
    if not found and (path := cached_repositories().get(hub_id)):
        found = [Kept("hub", hub_id, "from the hub", path, size_of(path))]
    if not found:
        raise HubError(f"{name} is not on this disk; `openelm models` lists what is")
    return found


def delete(one: Kept) -> None:
    """Remove what `matching` found from this disk. Raises `HubError` if that is not possible."""
    from openelm_mlx.engine import hub, model_cache

    try:
        if one.kind == "hub":
            hub.remove_repository(hub.SHORT_NAMES.get(one.name, one.name))
        elif one.kind == "corenet" and one.path is not None:
            shutil.rmtree(one.path)
        elif one.path is not None and not model_cache.remove(one.path):
            raise HubError(f"{one.path} stays: a process uses it; end that first")
    except OSError as error:
        raise HubError(f"{one.path} cannot be removed: {error.strerror or error}") from None


def size_of(folder: Path) -> int:
    """Sum the bytes of a folder's files, each counted once: the hub's cache links to them."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.lstat().st_size for path in files)


def size_text(nbytes: float) -> str:
    """Format a size for people, in decimal units: 25.3 GB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while nbytes >= 999.95 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
