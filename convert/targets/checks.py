"""What is known before a conversion works: whether its target may be written, and has room.

`--force` replaces only what this program wrote and nobody has changed since. The check is made
twice, before the work and when the old target has been moved aside to be removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.recipes import find_recipe
from openelm_mlx.convert.record import TOOL
from openelm_mlx.device import memory_bytes
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import read_own_json, read_text, write_json
from openelm_mlx.model.config import RECORD

CONFIG, UNFINISHED_CONFIG = "config.json", "config.json.partial"
# all that was ever written into a model folder: records of earlier versions do not list it
OWN = re.compile(
    r"config\.json(\.partial)?|conversion\.json|generation_config\.json|chat_template\.jinja"
    r"|tokenizer(_config)?\.json|tokenizer\.model|README\.md|LICEN[SC]E[^/]*"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|adapter|adapter/(adapter[\w.]*|chat_template\.jinja)"
)
# the first entry of a GGUF file by llama.cpp's tools and by ours
GGUF_HEAD, ARCHITECTURE = 256, b"general.architecture\x08\0\0\0\x07\0\0\0\0\0\0\0openelm"
LEFT_BY_MACOS = re.compile(r"\.DS_Store|\._.*")  # in folders that it has shown or copied
MOST_NAMED = 3  # of the files that an error is about
_digests: dict[tuple[int, ...], str] = {}  # by what changes with a file


def check_apart(target: Path, inputs: Iterable[Path]) -> None:
    """Raise `ConversionError` if one of the inputs is the target, or lies in it.

    They are compared as files, not by name: a folder has several names through links, bind mounts
    and letter case. (A file in the target may have another name elsewhere, which stays.)
    """
    if not os.path.lexists(target):
        return
    inside = [path for path in target.iterdir() if path.is_dir()] if target.is_dir() else []
    own = {identity(path) for path in (target, *inside)} - {None}
    for path in inputs:
        real = path.resolve()
        if any(identity(place) in own for place in (real, *real.parents)):
            raise ConversionError(
                f"{target} contains what is to be read ({path}), so it is not replaced; choose "
                "another target"
            )


def identity(path: Path) -> tuple[int, int] | None:
    """Return what two names of one file have in common, None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def check_replaceable(target: Path, is_gguf: bool, shown: Path | None = None) -> None:
    """Raise `ConversionError`, which calls the target `shown`, for what this program did not write,
    and for what somebody has changed or added to since.
    """
    try:
        problem = why_kept_file(target) if is_gguf else why_kept_folder(target)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem is not None:
        other = "file" if is_gguf else "folder"
        raise ConversionError(
            f"{shown or target} {problem}, so --force does not replace it; choose another {other}"
        )


def why_kept_file(path: Path) -> str | None:
    """Return why this is not to be replaced by a GGUF file, None if it may be."""
    if path.is_symlink() or not path.is_file():
        return "is not a GGUF file"
    with open(path, "rb") as file:
        head = file.read(GGUF_HEAD)
    if head and not head.startswith(b"GGUF"):
        return "is not a GGUF file"
    if head and ARCHITECTURE not in head:
        return "is a GGUF file of another model than OpenELM"
    return None


def why_kept_folder(folder: Path) -> str | None:
    """Return why this is not to be replaced by a model folder, None if it may be."""
    if folder.is_symlink() or not folder.is_dir():
        return "is not a model folder"
    names = list(names_in(folder))
    if not names:
        return None
    record = read_own_json(folder / RECORD)
    if record.get("tool") != TOOL:
        return f"is not a folder that openelm convert wrote (it contains {listed(names)})"
    written = record.get("files")
    known = written if isinstance(written, dict) else dict.fromkeys(filter(OWN.fullmatch, names))
    parents = {name.rpartition("/")[0] for name in known}
    if added := [name for name in names if name not in (RECORD, *known, *parents)]:
        return f"contains {listed(added)}, which openelm convert did not write"
    changed = [
        name
        for name, digest in known.items()
        if digest is not None
        and name in names
        and digest != (own_hash(record) if name == RECORD else sha256(folder / name))
    ]
    return f"has a changed {listed(changed)}" if changed else None


def names_in(folder: Path) -> Iterator[str]:
    """Yield the names of all files and folders in a folder, but for those that macOS leaves."""
    for path in sorted(folder.rglob("*")):
        if not LEFT_BY_MACOS.fullmatch(path.name):
            yield path.relative_to(folder).as_posix()


def listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def sha256(path: Path) -> str | None:
    """Return the hash of a file, None for anything else. An unchanged file is read once."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return None
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key not in _digests:
        with open(path, "rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write conversion.json, the last file of a folder. It has the hash of every file under its
    final name, and of itself.
    """
    found = {name: sha256(folder / name) for name in names_in(folder)}
    files = {
        CONFIG if name == UNFINISHED_CONFIG else name: digest
        for name, digest in found.items()
        if digest is not None
    }
    files[RECORD] = own_hash({**record, "files": files})
    write_json(folder / RECORD, {**record, "files": files})


def own_hash(record: Mapping[str, Any]) -> str:
    """Return the hash of a record without the entry of that hash."""
    files = {name: digest for name, digest in record["files"].items() if name != RECORD}
    text = json.dumps({**record, "files": files}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_space(target: Path, nbytes: int) -> None:
    """Raise `ConversionError` if the disk of `target` has less than `nbytes` left.

    A target that is replaced frees nothing: the new one is complete before the old one goes.
    """
    place = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise ConversionError(
            f"{target} cannot be written: its weights take {nbytes:,} bytes, but {place} has "
            f"{free:,} left; free some space, or choose a place on another disk"
        )


def check_memory(nbytes: int, options: ConvertOptions) -> None:
    """Raise `ConversionError` if a conversion needs more memory than this machine has."""
    if nbytes <= (memory := memory_bytes()):
        return
    asked = {
        f"--calibrate {options.calibrate}": options.calibrate,
        "--target-bpw": options.target_bpw,
        "--verify": options.verifies,
    }
    flags = " and ".join(flag for flag, value in asked.items() if value)
    remedy = f"leave out {flags}, or use" if flags else "use"
    raise ConversionError(
        f"this conversion needs about {nbytes / 1e9:.1f} GB of memory, but this machine has "
        f"{memory / 1e9:.1f}; {remedy} a machine with more"
    )


def check_inputs(options: ConvertOptions) -> None:
    """Raise an error for a text or recipe that cannot be read, before anything is fetched.

    It raises `OptionError`, `ConfigError`, and `ConversionError` for an empty text.
    """
    texts = {"--verify-text": options.verify_text, "--calibration-text": options.calibration_text}
    for flag, path in texts.items():
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue  # a pipe can be read only once
        if not read_text(path, flag).strip():
            raise ConversionError(f"{flag} {path} has no text; give another file")
    if options.recipe is not None:
        find_recipe(options.recipe)
