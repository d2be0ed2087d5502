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
from openelm_mlx.convert.targets.checks import (
    CONFIG,
    OWN,
    UNFINISHED_CONFIG,
    check_apart,
    check_replaceable,
    names_in,
)
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import check_writable, name_for_mlx
from openelm_mlx.model.config import RECORD
from openelm_mlx.model.peft import SETTINGS

if TYPE_CHECKING:
    from openelm_mlx.convert.quantize.plan import Quantization
    from openelm_mlx.convert.record import ConversionReport
    from openelm_mlx.device import mx
    from openelm_mlx.quantization import Plan

LINUX_EXCHANGE, LINUX_AT_FDCWD, MACOS_SWAP = 2, -100, 2  # renameat2(2), renamex_np(2)


class Target(Protocol):
    """One model in one format. Making a target raises an error, before any work, for what the
    format cannot store.
    """

    keeps_record: bool
    """True if the format can store the record of a conversion."""
    notes: tuple[str, ...] = ()
    """Sentences for the summary: what is not quite as it was asked for."""

    def plan(self, progress: Progress | None) -> Quantization:
        """Choose how MLX quantizes every matrix, and learn its rounding."""
        ...

    def nbytes(self, plan: Plan | None = None) -> int:
        """Return the bytes of the weights; without a plan those that are known before `plan`
        measures, which it does not exceed.
        """
        ...

    def types(self, plan: Plan) -> dict[str, list[str]]:
        """Return the tensors that are written in each type, by stem: in a folder the type of the
        numbers, where a quantized matrix has that of its scales, in a GGUF file llama.cpp's.
        """
        ...

    def rounds(self, plan: Plan) -> set[str]:
        """Return the stems of the matrices that are written quantized."""
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

    It raises `ConversionError` for a target that stands in the way and may not be replaced, or
    that has what is to be read, and `OptionError` for one that cannot be written.
    """
    target = options.target
    if not options.is_gguf:
        name_for_mlx(os.path.abspath(target))
    check_length(target)
    if not options.dry_run:
        check_writable(target, "--output", folder=True)
        if target.absolute().parent.is_dir():
            clear_leftovers(target.absolute())
    if not os.path.lexists(target):
        return
    if not options.force:
        other = "file" if options.is_gguf else "folder"
        raise ConversionError(
            f"{target} exists; choose another {other}, or replace it with --force"
        )
    check_apart(target, options.inputs)
    check_replaceable(target, options.is_gguf)


def check_length(target: Path) -> None:
    """Raise `OptionError` for a name that leaves no room for what a neighbour's has beside it."""
    longest = 255 - len(f"..partial-{os.getpid()}-12345678")  # bytes, on all usual file systems
    if len(os.fsencode(target.name)) > longest:
        raise OptionError(
            f"--output {target.name:.30} ... is a name of more than {longest} bytes; give a "
            "shorter one"
        )


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
    new = partial / target.name if options.is_gguf else partial
    if (partial / UNFINISHED_CONFIG).exists():  # an adapter has none
        (partial / UNFINISHED_CONFIG).rename(partial / CONFIG)
    if not os.path.lexists(target):
        new.rename(target)
    elif not options.force:
        raise ConversionError(
            f"{target} has appeared meanwhile; choose another one, or replace it with --force"
        )
    else:
        check_replaceable(target, options.is_gguf)
        replace(new, target, options.is_gguf)
    if partial.exists():
        remove(partial)  # it contains what stood in the target


def replace(new: Path, target: Path, is_gguf: bool) -> None:
    """Replace the target at once, and put it back if somebody was adding to it in that moment."""
    if exchange(new, target):
        try:
            check_replaceable(new, is_gguf, shown=target)
        except ConversionError:
            exchange(new, target)
            raise
    elif is_gguf:
        new.replace(target)
    else:
        replace_in_two_steps(new, target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders or files swap names at once. Return False if the system cannot."""
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
        check_replaceable(old, False, shown=target)
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def clear_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`, and give an old model that they had moved
    aside its name back. A folder with a file that they cannot have written stays.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(partial|old)-(\d{1,9})-\w+")
    own = rf"{OWN.pattern}|adapter[\w.]*|(adapter/)?\.[^/]+|{re.escape(target.name)}"
    with contextlib.suppress(OSError):  # what cannot be seen or moved stays
        for path in target.parent.iterdir():
            match = pattern.fullmatch(path.name)
            if match is None or path.is_symlink() or alive(int(match[2])):
                continue
            # an adapter has no config.json, but settings of its own
            marks = ({CONFIG}, {SETTINGS, RECORD})
            whole = any(all((path / name).is_file() for name in names) for names in marks)
            if match[1] == "old" and not target.exists() and whole:
                path.rename(target)
            elif all(map(re.compile(own).fullmatch, names_in(path))):
                remove(path)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def remove(folder: Path) -> None:
    """Delete a folder. A kill may come in the middle: nothing loads the rest or puts it back."""
    for name in (CONFIG, RECORD):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
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
