"""Every name that a model has, what of it lies on this disk, and its removal."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from openelm_mlx.engine import model_cache
from openelm_mlx.engine.hub import (
    BUNDLED,
    SHORT_NAMES,
    cached_repositories,
    is_published,
    remove_repository,
)
from openelm_mlx.errors import HubError


@dataclass(frozen=True)
class Kept:
    """A name and what it stands for. `path` is None and `nbytes` 0 where nothing of it is here.

    `kind` is bundled, hub, corenet or converted. `partial` says that a download was cut, and goes
    on when the model is asked for again. A conversion has `used`, in seconds since the epoch, and
    `sources`, the paths or names it is from.
    """

    kind: str
    name: str
    about: str
    path: Path | None = None
    nbytes: int = 0
    partial: bool = False
    used: float | None = None
    sources: tuple[str, ...] = ()


def inventory() -> list[Kept]:
    """All names, in the order they are shown in; what is converted comes last, the one used last
    before the others.
    """
    models = [Kept("bundled", "openelm-tiny", "comes with openelm-mlx", BUNDLED, size_of(BUNDLED))]
    return models + on_the_hub() + from_corenet() + converted()


def on_the_hub() -> list[Kept]:
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
    from openelm_mlx.convert.fetch.catalog import CATALOG, fetched_folder

    models = []
    for entry in CATALOG.values():
        folder = fetched_folder(entry)
        if folder.is_dir():
            cut = any(folder.glob("*.part"))
            models.append(Kept("corenet", entry.name, entry.about, folder, size_of(folder), cut))
        else:
            models.append(Kept("corenet", entry.name, entry.about))
    return models


def converted() -> list[Kept]:
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
        for one in reversed(model_cache.conversions())
    ]


def matching(name: str) -> list[Kept]:
    """List what `name` stands for on this disk, with the conversions made from it.

    Raises `HubError` where there is nothing.
    """
    if name == "openelm-tiny":
        raise HubError("openelm-tiny comes with openelm-mlx and stays as long as it does")
    if is_published(name):
        from openelm_mlx.convert.fetch.catalog import published

        name = published(name).name  # or the nearest names are told
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


def remove(one: Kept) -> None:
    """Remove from this disk what `matching` found. Raises `HubError` where it is in use or cannot
    be removed.
    """
    try:
        if one.kind == "hub":
            remove_repository(SHORT_NAMES.get(one.name, one.name))
        elif one.kind == "corenet" and one.path is not None:
            shutil.rmtree(one.path)
        elif one.path is not None and not model_cache.remove(one.path):
            raise HubError(f"{one.path} stays: a process uses it; end that first")
    except OSError as error:
        raise HubError(f"{one.path} cannot be removed: {error.strerror or error}") from None


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, each counted once: the hub's cache links to them."""
    return sum(
        path.lstat().st_size
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def size_text(nbytes: float) -> str:
    """A size for people, in decimal units: 25.3 GB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while nbytes >= 999.95 and unit != "TB":
        nbytes, unit = nbytes / 1000, next(units)
    return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
