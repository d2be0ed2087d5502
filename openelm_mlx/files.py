"""Files: JSON, YAML and safetensors headers are checked as they are read; writes are atomic."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from openelm_mlx.dtypes import BY_SAFETENSORS, itemsize
from openelm_mlx.errors import CheckpointError, ConfigError, OptionError, reason
from openelm_mlx.fields import fit_path

MAX_JSON_BYTES = 4 << 20  # a sharded 3B's index has 40 KB
MAX_YAML_BYTES = 1 << 18  # CoreNet's recipes have 5 KB
# the 3B's has 40 KB; the format allows 100 MB, which as JSON would take gigabytes
MAX_HEADER_BYTES = 2 << 20
MAX_TEXT_BYTES = 256 << 20
MAX_NUMBER = 1 << 62
# errors of file systems that cannot lock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


class TensorInfo(NamedTuple):
    """The type and shape of a tensor, as a file states them before its data."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * itemsize(self.dtype)


class TensorPlace(NamedTuple):
    """The file of a tensor, its first byte there, and its type and shape."""

    file: Path
    start: int
    info: TensorInfo


def cache_folder() -> Path:
    """Return $OPENELM_CACHE, or the folder `openelm-mlx` where the system keeps caches."""
    if own := os.environ.get("OPENELM_CACHE"):
        return Path(os.path.expanduser(own))
    usual = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "openelm-mlx"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises `ConfigError` with the file's name."""

    def parse(text: str) -> Any:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a character, as "\\ud800"
        return value

    raw = parsed(path, "JSON", MAX_JSON_BYTES, parse)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must contain an object, not {type(raw).__name__}")
    return raw


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file. Raises `ConfigError`, also for endless ones."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: Any) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                # nested, they double with every level
                raise yaml.YAMLError("merge keys (<<) are not read here")

    def parse(text: str) -> Any:
        try:
            return yaml.load(text, Loader)
        except yaml.YAMLError as error:
            raise ValueError(reason(error)) from None

    return parsed(path, "YAML", MAX_YAML_BYTES, parse)


def parsed(path: str | Path, kind: str, most: int, parse: Callable[[str], Any]) -> Any:
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise ConfigError(f"{path} is not a configuration: it has more than {most} bytes")
        return parse(data.decode("utf-8-sig"))  # some editors begin a file with a mark
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a {kind} file, perhaps one in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as {kind}: {error}") from None


def read_own_json(path: Path) -> dict[str, Any]:
    """Return the object in one of this project's own files, {} if it is missing or damaged."""
    try:
        return read_json(path)
    except ConfigError:
        return {}


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON: all of it or nothing."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    with replacing(path) as new:
        new.write_text(text + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the shard that contains each tensor, None if there is no index.

    Raises `CheckpointError`; a shard must be a plain file of the folder.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map")
    for shard in weight_map.values():
        plain = isinstance(shard, str) and shard.endswith(".safetensors")
        if not plain or set(shard) & set("/\\\0"):
            allowed = "shards must be .safetensors files of this folder"
            raise CheckpointError(f"{path} points to {shard!r}; {allowed}")
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """Return model.safetensors, or the shards that the index lists. Raises `CheckpointError`."""
    return listed_files(folder, read_index(folder))


def listed_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        if weight_map is not None:
            raise CheckpointError(f"{folder} lacks {', '.join(missing[:3])}, which its index lists")
        remedy = "`openelm convert` makes a complete model folder"
        raise CheckpointError(f"{folder} has no {WEIGHTS}; {remedy}")
    return [folder / name for name in names]


def read_places(folder: Path, files: Iterable[Path] | None = None) -> dict[str, TensorPlace]:
    """Return every tensor of a folder and its place, from the headers of its safetensors files.

    `files` are read if there is no index. Raises `CheckpointError`.
    """
    weight_map = read_index(folder)
    places: dict[str, TensorPlace] = {}
    if files is None or weight_map is not None:
        files = listed_files(folder, weight_map)
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise CheckpointError(f"{folder} contains tensor {name} twice, in {file.name} too")
            if weight_map is None or weight_map.get(name) == file.name:
                places[name] = place
    if weight_map is not None and (missing := sorted(weight_map.keys() - places.keys())):
        listed = ", ".join(missing[:3])
        raise CheckpointError(f"{folder}: the index lists tensors no shard contains: {listed}")
    return places


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Return the tensors of one safetensors file, each checked to lie within it.

    Raises `CheckpointError`.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path} is truncated or not a safetensors file")
            if length > MAX_HEADER_BYTES:
                allowed = f"no OpenELM needs above {MAX_HEADER_BYTES}"
                raise CheckpointError(f"{path} has a header of {length} bytes; {allowed}")
            raw: Any = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
    if not isinstance(raw, dict):
        what = "its header is not an object"
        raise CheckpointError(f"{path} cannot be read as safetensors: {what}")
    raw.pop("__metadata__", None)
    base = 8 + length
    return {name: checked_place(path, name, entry, base, size) for name, entry in raw.items()}


def checked_place(path: Path, name: str, entry: Any, base: int, size: int) -> TensorPlace:
    """Return the place that a header's entry states, in a file of `size` bytes with data from
    `base` on. Raises `CheckpointError`.
    """
    malformed = f"{path}: the header's entry of tensor {name} is malformed"
    try:
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(malformed) from None
    if not isinstance(code, str) or code not in BY_SAFETENSORS:
        what = f"{path}: tensor {name} has type {str(code):.40}"
        raise CheckpointError(f"{what}; readable are {', '.join(BY_SAFETENSORS)}")
    numbers = (*shape, start, end)
    if len(shape) > 8 or any(type(n) is not int or not 0 <= n < MAX_NUMBER for n in numbers):
        raise CheckpointError(malformed)
    info = TensorInfo(BY_SAFETENSORS[code].name, shape)
    if end - start != info.nbytes:
        what = f"tensor {name} of shape {shape} does not take {end - start} bytes"
        raise CheckpointError(f"{path}: {what}")
    if base + end > size:
        what = f"tensor {name} ends at byte {base + end} of {size}"
        raise CheckpointError(f"{path} is truncated: {what}")
    return TensorPlace(path, base + start, info)


@contextmanager
def replacing(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """Yield a new file to write. It takes the place of `path` when the block ends without an error.

    A symbolic link stays one, a device or pipe (/dev/stdout) is written to. Raises `OSError` if
    no file can be made or moved; what was at `path` then stays as it was.
    """
    import tempfile

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


def lock(file: IO[str], kind: int, notice: str = "") -> None:
    """Lock `file`, and print `notice` if it must wait. Some file systems cannot lock."""
    import fcntl  # here, as `openelm --help` does not need it

    try:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if notice:
                print(notice, file=sys.stderr)
            fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def name_for_mlx(path: str | Path) -> str:
    """Return the path as MLX takes it. Raises `OptionError` if MLX would say "std::bad_cast"."""
    if not fit_path(path):
        what = f"{str(path)!r} is not a name in UTF-8, and MLX opens no other"
        raise OptionError(f"{what}; rename it, or its folder")
    return str(path)


def check_writable(path: str | Path, flag: str, folder: bool = False) -> None:
    """Raise `OptionError`, which names `flag`, if `path` could not be written after the work.

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


def check_new(path: str | Path, flag: str) -> None:
    """Raise `OptionError`, which names `flag`, if there is a file with something in it."""
    if os.path.isfile(path) and os.path.getsize(path):
        raise OptionError(f"{flag} {path} exists already; give another name, or remove it")


def why_not_writable(path: Path, folder: bool) -> str | None:
    """Return what prevents writing, if anything.

    A file is made to find out, because the system grants root access to everything.
    """
    found = path.stat() if path.exists() else None
    if found is not None and not folder:
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
        return f"{above} is not a folder; give another place"
    import tempfile

    with tempfile.TemporaryFile(dir=above):
        return None


def read_text(path: str | Path, flag: str) -> str:
    """Return the text of a file that the user named. Raises `OptionError` that names `flag`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        check_text_size(len(data), path, flag)
        return data.decode("utf-8-sig")
    except OSError as error:
        problem = f"{error.strerror}; give a text file"
        raise OptionError(f"{flag} {path} cannot be read: {problem}") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; convert it, for example with iconv"
        raise OptionError(f"{flag} {path} cannot be read as UTF-8 text: {problem}") from None


def check_text_size(size: int, path: str | Path, flag: str) -> None:
    """Raise `OptionError` for a text that is longer than is read: /dev/zero has no end."""
    if size > MAX_TEXT_BYTES:
        most = f"{MAX_TEXT_BYTES >> 20} MiB"
        raise OptionError(f"{flag} {path} has more than {most}; give a part of it")
