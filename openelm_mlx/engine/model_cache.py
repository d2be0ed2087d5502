"""The cache of conversions: a source that only convert can read is converted once, without loss.

    ~/.cache/openelm-mlx/converted/     (~/Library/Caches on macOS; $OPENELM_CACHE moves it)
      checkpoint-1a2b3c4d5e6f7a8b/      a model folder, named for the SHA-256 of what it is made of
      checkpoint-1a2b3c4d5e6f7a8b.lock  shared while it is used, exclusive while made or removed
      index/*.json                      source path -> folder, with size and times of every file

The index saves hashing a file again. A file that is not in it, or that changed since, is hashed: so
a moved or touched copy is found by its content, and a changed file is never taken for the old one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from openelm_mlx import __version__, device
from openelm_mlx.engine.tokenizer import FILES
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import cache_folder, lock, read_own_json, write_json
from openelm_mlx.model.config import GENERATION_CONFIG

if TYPE_CHECKING:
    from openelm_mlx.convert.options import ConvertOptions

WEIGHT_SUFFIXES = (".gguf", ".pt", ".pth", ".ckpt", ".bin", ".safetensors")
# what convert reads beside the weights
SIDE_FILES = ("config.json", "config.yaml", *FILES, "chat_template.jinja", GENERATION_CONFIG)
DEFAULT_LIMIT_GB = 50.0  # four conversions of the 3B in float32
SETTLED_SECONDS = 2.0  # a file changed later may change again in one tick of its file system

_locks: dict[Path, IO[str]] = {}  # on the folders that this process uses, until it ends
_temporary: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Conversion:
    """One folder of the cache."""

    folder: Path
    nbytes: int
    used: float  # seconds since the epoch
    sources: tuple[str, ...]  # paths or names that it was made from


def conversions_folder() -> Path:
    """Return the folder of all conversions."""
    return cache_folder() / "converted"


def limit_bytes() -> float:
    """Return the size to keep the cache under, from $OPENELM_CACHE_GB. Raises `OptionError`."""
    given = os.environ.get("OPENELM_CACHE_GB") or str(DEFAULT_LIMIT_GB)
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        wanted = f"a number of gigabytes, for example {DEFAULT_LIMIT_GB:g}"
        raise OptionError(f"OPENELM_CACHE_GB is {given!r}; give {wanted}")
    return limit * 1e9


def convert_once(
    source: Path, chosen: Path | None, tokenizer: Path | None, name: str | None = None
) -> Path:
    """Convert `source` into the cache, unless a copy of it was, and return the model folder.

    `tokenizer` is the file to use, or None if `source` has one; `chosen` is the one that the user
    named. `name` is the user's name of the source, if that is not a path. Raises an `OpenELMError`
    for what convert cannot read, and if the result cannot be written.
    """
    limit, source = limit_bytes(), Path(os.path.abspath(source))
    from openelm_mlx.convert.opening import open_model
    from openelm_mlx.convert.options import ConvertOptions

    instruct = "instruct" in f"{source.parent.name} {source.name} {name or ''}".lower()
    options = ConvertOptions(
        source,
        source,
        tokenizer=tokenizer,
        source_name=name,
        instruct=instruct or None,
        measure=device.kind() != "cpu",  # where the result of it cannot be used
    )
    opened = open_model(options)
    read = [*opened.source.files, *watched(source)]
    read += [] if chosen is None else [opened.tokenizer.path]
    before = {str(path): state(path) for path in read}
    # a GGUF file contains the rest itself
    names = SIDE_FILES if opened.source.tokenizer is None else SIDE_FILES[-1:]
    beside = [path for path in watched(source) if path.name in names and path.is_file()]
    key = content_key(opened.source.files, beside, opened.tokenizer.data, instruct)
    called = name or (source.stem if source.is_file() else source.name)
    label = re.sub(r"[^\w.-]+", "-", called).strip(".-") or "model"
    copies = filter(complete, conversions_folder().glob(f"*-{key}"))  # under another name
    folder = next(copies, conversions_folder() / f"{label}-{key}")
    if not writable(folder.parent) and not complete(folder):
        folder = temporary_folder(folder)

    def make() -> None:
        convert_into(folder, options, name or str(source), chosen)
        if before != {str(path): state(path) for path in read}:
            remove_folder(folder)
            raise ConversionError(f"{source} changed while it was converted; run the command again")
        shrink_to(limit, folder)

    claim(folder, make)
    remember(source, chosen, folder, before, name)
    return folder


def recall(source: Path, tokenizer: Path | None = None) -> Path | None:
    """Return the conversion of `source` if the index has it and none of its files has changed."""
    source = Path(os.path.abspath(source))
    record = read_own_json(record_path(source, tokenizer))
    files, folder = record.get("files"), conversions_folder() / str(record.get("folder"))
    if record.get("version") != __version__ or not isinstance(files, dict) or not complete(folder):
        return None
    known = files.keys() >= {str(path) for path in watched(source)}
    if not known or any(state(Path(path)) != before for path, before in files.items()):
        return None
    try:
        claim(folder, lambda: None)
    except ConversionError:  # it has just been removed
        return None
    return folder


def convert_into(folder: Path, options: ConvertOptions, shown: str, given: Path | None) -> None:
    """Convert, and say so in one line; `given` is the tokenizer that the user chose."""
    from openelm_mlx.convert.pipeline import convert

    command = ["openelm", "convert", shown, "-o", "FOLDER"]
    if given is not None:
        command += ["--tokenizer", str(given)]
    keep = f"to keep it: {shlex.join(command)}"
    print(f"openelm: converting {shown} once, into {folder}; {keep}", file=sys.stderr)
    try:
        convert(replace(options, target=folder))
    except ConversionError as error:
        if complete(folder):  # another process was faster, on a file system without locks
            return
        if str(folder) not in str(error):
            raise
        remedy = "free some space (`openelm models` shows what is kept), or set OPENELM_CACHE"
        what = str(error).partition("; ")[0]  # its remedy is another target
        raise ConversionError(f"{what}; {remedy} to another folder") from None


def claim(folder: Path, make: Callable[[], None]) -> None:
    """Let one process call `make` if `folder` is not complete, and lock it against removal.

    The lock lasts as long as this process. Raises `ConversionError` if another process removes the
    folder each time.
    """
    if folder in _locks and complete(folder):
        return
    for _ in range(5):  # more than once only if the folder is removed at the same moment
        try:
            file: IO[str] = open(lock_path(folder), "a" if writable(folder.parent) else "r")
        except OSError:  # a cache that somebody has prepared, read-only and without locks
            break
        try:
            waiting = f"openelm: waiting for another process that converts into {folder}"
            lock(file, fcntl.LOCK_SH, waiting)
            if not complete(folder):
                lock(file, fcntl.LOCK_EX)
                if not complete(folder):
                    make()
                lock(file, fcntl.LOCK_SH)
            if complete(folder) and same_file(file, lock_path(folder)):
                with contextlib.suppress(OSError):
                    os.utime(lock_path(folder))  # when it was used last
                _locks[folder], file = file, _locks.get(folder, file)
                return
        finally:
            if _locks.get(folder) is not file:
                file.close()
    if not complete(folder):
        what = "was removed at once by another process"
        raise ConversionError(f"{folder} {what}; run the command again")


def conversions() -> list[Conversion]:
    """Return the conversions in the cache, the least recently used first."""
    root = conversions_folder()
    sources: dict[str, list[str]] = {}
    for path in root.glob("index/*.json"):
        record = read_own_json(path)
        name = str(record.get("name") or record.get("source"))
        sources.setdefault(str(record.get("folder")), []).append(name)
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not folder.name.startswith(".") and complete(folder):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            marked = lock_path(folder) if lock_path(folder).exists() else folder
            names = tuple(sorted(sources.get(folder.name, ())))
            found.append(Conversion(folder, size, marked.stat().st_mtime, names))
    return sorted(found, key=lambda one: one.used)


def shrink_to(limit: float, keep: Path) -> None:
    """Remove the least recently used conversions beyond the limit, but not `keep` or one in use."""
    from openelm_mlx.convert.targets import clear_leftovers

    for path in keep.parent.glob(".*.partial-*"):  # left by runs that were killed
        clear_leftovers(keep.parent / path.name[1:].rsplit(".partial-", 1)[0])
    kept = conversions()
    total = sum(one.nbytes for one in kept)
    for one in kept:
        if total > limit and one.folder != keep and remove(one.folder):
            total -= one.nbytes


def remove(folder: Path) -> bool:
    """Remove a conversion and its entries in the index; return False if a process uses it."""
    try:
        with open(lock_path(folder), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_folder(folder)
            for path in folder.parent.glob("index/*.json"):
                if read_own_json(path).get("folder") == folder.name:
                    path.unlink(missing_ok=True)
            lock_path(folder).unlink(missing_ok=True)
    except OSError:
        return False
    return not folder.exists()


def remove_folder(folder: Path) -> None:
    """Remove a model folder, or what is left of it."""
    with contextlib.suppress(OSError):
        (folder / "config.json").unlink()  # an interrupted removal leaves nothing that loads
    shutil.rmtree(folder, ignore_errors=True)


def complete(folder: Path) -> bool:
    """Return whether a conversion was finished: its config.json is written last."""
    return (folder / "config.json").is_file()


def writable(root: Path) -> bool:
    """Return whether files can be made in the cache, which is made first if need be."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return True
    except OSError:
        return False


def temporary_folder(folder: Path) -> Path:
    """Return a folder for this run only, as the cache is read-only. Raises `ConversionError`."""
    root, remedy = folder.parent, "set OPENELM_CACHE to a folder that can"
    try:
        _temporary.append(tempfile.TemporaryDirectory(prefix="openelm-"))
    except OSError as error:
        what = f"neither {root} nor a temporary folder can be written ({error.strerror or error})"
        raise ConversionError(f"{what}; {remedy}") from None
    what = f"{root} cannot be written, so this conversion is for this run only"
    print(f"openelm: {what}; {remedy}", file=sys.stderr)
    return Path(_temporary[-1].name) / folder.name


def content_key(
    weights: Iterable[Path], beside: Iterable[Path], tokenizer: bytes, instruct: bool
) -> str:
    """Return a hash of everything that a conversion depends on, 16 hex digits."""
    weights = list(weights)
    pieces = hashlib.sha256(tokenizer).hexdigest()
    digest = hashlib.sha256(f"{__version__} {instruct} {pieces}".encode())
    for path in [*weights, *beside]:
        digest.update(f"\n{'' if [path] == weights else path.name} ".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def watched(source: Path) -> list[Path]:
    """Return the files on which the conversion of `source` depends, whether or not they exist."""
    folder, weights = source.parent, [source]
    if source.is_dir():
        folder = source
        weights = [path for path in folder.iterdir() if path.suffix.lower() in WEIGHT_SUFFIXES]
    return [*weights, *(folder / name for name in SIDE_FILES)]


def state(path: Path) -> list[int] | None:
    """Return size, times and inode of a file, one of which changes with it; None without a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def lock_path(folder: Path) -> Path:
    """Return the file that the users of a conversion lock."""
    return folder.with_name(f"{folder.name}.lock")


def record_path(source: Path, tokenizer: Path | None) -> Path:
    """Return the index's file for a source and the tokenizer that the user named for it."""
    what = f"{source}\n{'' if tokenizer is None else os.path.abspath(tokenizer)}"
    digest = hashlib.sha256(os.fsencode(what)).hexdigest()
    return conversions_folder() / "index" / f"{digest[:32]}.json"


def same_file(file: IO[str], path: Path) -> bool:
    """Return whether `path` still names the open `file`: another process may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def remember(
    source: Path, tokenizer: Path | None, folder: Path, files: dict[str, Any], name: str | None
) -> None:
    """Write the index's entry of a source.

    Where a file changed a moment ago the entry lacks `files`, so that the source is hashed again.
    """
    if folder.parent != conversions_folder():
        return
    newest = max((times[1] for times in files.values() if times), default=0) / 1e9
    settled = newest <= time.time() - SETTLED_SECONDS
    path = record_path(source, tokenizer)
    about = {"version": __version__, "source": str(source), "name": name, "folder": folder.name}
    content = {**about, "files": files if settled else None}
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        write_json(path, content)
