"""Targets of a conversion: a model folder (`folder`), or a file for llama.cpp (`gguf`).

A `Target` states how a model is written in one format, and writes it. It is `staged`: it appears,
or replaces the old one, in one step of the file system, or not at all. Work goes on in a hidden
neighbour `.NAME.partial-PID-*`, which no tool loads: its config.json gets that name last. The next
run to the same target removes what a killed run left behind, or undoes a replacement that it left
half done. Reading sources and choosing a plan belong to other rooms.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from openelm_mlx.convert.options import ConvertOptions, Progress
from openelm_mlx.convert.quantize.plan import find_recipe
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import check_writable, read_text

if TYPE_CHECKING:
    from openelm_mlx.convert.quantize.plan import Quantization
    from openelm_mlx.convert.record import ConversionReport
    from openelm_mlx.device import mx
    from openelm_mlx.quantization import Plan

CONFIG, UNFINISHED_CONFIG = "config.json", "config.json.partial"
LINUX_EXCHANGE, LINUX_AT_FDCWD, MACOS_SWAP = 2, -100, 2  # renameat2(2), renamex_np(2)


class Target(Protocol):
    """One model in one format. Making a target raises an error, before any work, for what the
    format cannot store.
    """

    keeps_record: bool
    """True if the format can store the record of a conversion."""

    def plan(self, progress: Progress | None) -> Quantization:
        """Choose how MLX quantizes every matrix, and learn its rounding."""
        ...

    def nbytes(self, plan: Plan) -> int:
        """Return the bytes of the weights."""
        ...

    def write(self, folder: Path, plan: Plan, arrays: Iterable[tuple[str, mx.array]]) -> Path:
        """Write into `folder` all but the record, and return what there is to verify.

        `arrays` come in the order of `expected_tensors`, quantized as `plan` says.
        """
        ...

    def write_record(
        self, folder: Path, report: ConversionReport, hashes: Mapping[str, str]
    ) -> None:
        """Write the record: the report with its losses, and the hashes of the source's files."""


def check_target(options: ConvertOptions) -> None:
    """Raise an error before any work if the target cannot be what was asked for.

    It raises `ConversionError` for a target that stands in the way, is not a model, or contains the
    source, and `OptionError` for one that cannot be written, or that is to be a folder with the
    name of a GGUF file.
    """
    target, what = options.target, "file" if options.target_format == "gguf" else "folder"
    if options.target_format != "gguf" and target.suffix.lower() == ".gguf":
        raise OptionError(
            f"--output {target} names a GGUF file, but a folder was asked for; give --to gguf too"
        )
    if not options.dry_run:
        check_writable(target, "--output", folder=True)
    if target.absolute().parent.is_dir() and not options.dry_run:
        clear_leftovers(target.absolute())
    if not os.path.lexists(target):
        return
    if not options.force:
        raise ConversionError(f"{target} exists; choose another {what}, or replace it with --force")
    known = target.is_file() if what == "file" else may_be_replaced(target)
    if target.is_symlink() or not known:
        kind = "a GGUF file" if what == "file" else "a model folder"
        raise ConversionError(
            f"{target} is not {kind}, so --force does not replace it; choose another {what}"
        )
    given = (options.source, options.config, options.tokenizer, options.adapter_folder)
    inputs = [path.resolve() for path in given if path is not None]
    if any(path == target.resolve() or target.resolve() in path.parents for path in inputs):
        raise ConversionError(f"{target} contains what is to be converted; choose another {what}")


def may_be_replaced(folder: Path) -> bool:
    """Return whether this is a model folder, or an empty one."""
    return folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))


def check_inputs(options: ConvertOptions) -> None:
    """Raise `OptionError` or `ConfigError` for a text or recipe that cannot be read, before
    anything is fetched.
    """
    texts = {"--verify-text": options.verify_text, "--calibration-text": options.calibration_text}
    for flag, path in texts.items():
        if path is None or (os.path.exists(path) and not os.path.isfile(path)):
            continue  # a pipe can be read only once
        read_text(path, flag)
    if options.recipe is not None:
        find_recipe(options.recipe)


@contextlib.contextmanager
def staged(options: ConvertOptions) -> Iterator[Path]:
    """Yield a folder beside the target that becomes the target on success and vanishes on any
    failure.

    With a GGUF target, the one file of that name in the folder becomes the target.
    """
    target = options.target.absolute()
    made = [p for p in reversed(target.parents) if not p.exists()]
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=target.parent)
        )
        partial.chmod(0o755)
        yield partial
        finish(partial, target, options)
    except OSError as error:
        discard(partial, made)
        reason = error.strerror or f"{error}; is the disk full?"  # numpy tells the bytes only
        raise ConversionError(f"{options.target} cannot be written: {reason}") from None
    except BaseException:
        discard(partial, made)
        raise


def finish(partial: Path, target: Path, options: ConvertOptions) -> None:
    """Rename the finished folder or file to the target."""
    if os.path.lexists(target) and not options.force:
        raise ConversionError(
            f"{target} has appeared meanwhile; choose another one, or replace it with --force"
        )
    if options.target_format == "gguf":
        (partial / target.name).replace(target)
        partial.rmdir()
        return
    (partial / UNFINISHED_CONFIG).rename(partial / CONFIG)
    if not target.exists():
        partial.rename(target)
    elif exchange(partial, target):
        remove(partial)  # it contains what stood in the target
    else:
        replace_in_two_steps(partial, target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap names at once. Return False if the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(names[0], names[1], ctypes.c_uint(MACOS_SWAP)) == 0)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        at = ctypes.c_int(LINUX_AT_FDCWD)
        return bool(libc.renameat2(at, names[0], at, names[1], ctypes.c_uint(LINUX_EXCHANGE)) == 0)
    return False


def replace_in_two_steps(partial: Path, target: Path) -> None:
    """Replace the target if names cannot be swapped. `clear_leftovers` makes good a kill
    between the two renames.
    """
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-{os.getpid()}-", dir=target.parent))
    target.rename(old)  # an empty folder may be replaced by a rename
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`, and give an old model that they had moved
    aside its name back.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-(\d{1,9})-\w+")
    with contextlib.suppress(OSError):  # what cannot be seen or moved stays
        for path in target.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match is None or path.is_symlink() or alive(int(match[2])):
                continue
            if match[1] == "old" and not target.exists() and (path / CONFIG).is_file():
                path.rename(target)
            else:
                remove(path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def remove(folder: Path) -> None:
    """Delete a folder. A kill may come in the middle: without its config.json nothing loads the
    rest.
    """
    with contextlib.suppress(OSError):
        (folder / CONFIG).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def discard(partial: Path | None, made: list[Path]) -> None:
    if partial is not None:
        remove(partial)
    for folder in reversed(made):
        with contextlib.suppress(OSError):
            folder.rmdir()


def config_of(folder: Path) -> Path:
    """Return the path of a model folder's configuration, also while it is being written."""
    unfinished = folder / UNFINISHED_CONFIG
    return unfinished if unfinished.exists() else folder / CONFIG
