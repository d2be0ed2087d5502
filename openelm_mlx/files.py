"""Files that are there whole or not at all; what cannot be written or read is said beforehand."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openelm_mlx.errors import OptionError
from openelm_mlx.fields import fit_path


@contextmanager
def replacing(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends without an error.

    A symbolic link stays one, a device or pipe (/dev/stdout) is written to. Raises `OSError` where
    no file can be made or moved; what was at `path` then stays as it was.
    """
    direct = os.path.exists(path) and not os.path.isfile(path)
    place = Path(path) if direct else Path(os.path.realpath(path))
    mode = stat.S_IMODE(place.stat().st_mode) if place.exists() else 0o644
    folder = tempfile.gettempdir() if direct else place.parent
    handle, name = tempfile.mkstemp(prefix=f".{place.name[:100]}.", suffix=suffix, dir=folder)
    os.close(handle)
    try:
        yield Path(name)
        if direct:
            with open(name, "rb") as new, open(place, "wb") as there:
                shutil.copyfileobj(new, there)
            os.unlink(name)
        else:
            os.chmod(name, mode)
            os.replace(name, place)
    except BaseException:  # Ctrl-C too
        Path(name).unlink(missing_ok=True)
        raise


def name_for_mlx(path: str | Path) -> str:
    """The path as MLX takes it. Raises `OptionError` where MLX would say "std::bad_cast"."""
    if not fit_path(path):
        what = f"{str(path)!r} is no name in UTF-8, and MLX opens no other"
        raise OptionError(f"{what}; rename it, or its folder")
    return str(path)


def check_writable(path: str | Path, flag: str, folder: bool = False) -> None:
    """Raise `OptionError`, which names `flag`, where `path` could not be written after the work.

    With `folder` it is to become a folder, and missing folders above it may be made too.
    """
    if not str(path):
        raise OptionError(f"{flag} is empty; give a path")
    try:
        problem = why_not_writable(Path(path), folder)
    except OSError as error:
        problem = f"{error.strerror}; give another place"
    if problem is not None:
        raise OptionError(f"{flag} {path} cannot be written: {problem}")


def why_not_writable(path: Path, folder: bool) -> str | None:
    """Return what stands in the way, if anything.

    A file is made to find out, because root is told that it may write anywhere.
    """
    try:
        found = None if folder else path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is not None:
        if stat.S_ISDIR(found.st_mode):
            return "it is a folder; give the name of a file"
        if not os.access(path, os.W_OK):
            return "it is write-protected; give another file"
        if not stat.S_ISREG(found.st_mode):
            return None
    above = Path(os.path.realpath(path)).parent
    while folder and not above.exists():
        above = above.parent
    if not above.exists():
        return "its folder does not exist; make it first"
    if not above.is_dir():
        return f"{above} is no folder; give another place"
    with tempfile.TemporaryFile(dir=above):
        return None


def read_text(path: str | Path, flag: str) -> str:
    """A text file that the user named. Raises `OptionError` that names `flag` and `path`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        problem = f"{error.strerror}; give a text file"
        raise OptionError(f"{flag} {path} cannot be read: {problem}") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; convert it, for example with iconv"
        raise OptionError(f"{flag} {path} cannot be read as UTF-8 text: {problem}") from None
