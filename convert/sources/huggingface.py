"""Read a Hugging Face folder: one safetensors file, or shards with an index. Headers first, data on
demand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from openelm_mlx.config_files import read_json
from openelm_mlx.convert.sources import TensorInfo, TensorSource, canonical, weights_by_kind
from openelm_mlx.convert.sources.raw import itemsize, read_strided
from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
SAFETENSORS_DTYPE = {name: code for code, name in DTYPES.items()}
MAX_HEADER_BYTES = (
    2 << 20
)  # the 3B's has 40 KB; the format allows 100 MB, which as JSON would take gigabytes
MAX_NUMBER = 1 << 62


class Located(NamedTuple):
    file: Path
    start: int
    info: TensorInfo


class HuggingFaceFolder(TensorSource):
    """The tensors of a folder, listed on opening and read one at a time. Raises
    `ConversionError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        found: dict[str, Located] = {}
        self.instruct = (self.path / "chat_template.jinja").is_file()
        weight_map = read_index(self.path)
        for file in weight_files(self.path, weight_map):
            for name, located in read_header(file).items():
                if name in found:
                    raise ConversionError(
                        f"{self.path} holds tensor {name} twice, in {file.name} too"
                    )
                if weight_map is None or weight_map.get(name) == file.name:
                    found[name] = located
        if weight_map is not None and (missing := sorted(weight_map.keys() - found.keys())):
            raise ConversionError(
                f"{self.path}: the index lists tensors no shard holds: {', '.join(missing[:3])}"
            )
        self._located = canonical(found)
        self.tensors = {name: located.info for name, located in self._located.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({located.file for located in self._located.values()}))

    def load(self, name: str) -> mx.array:
        """The tensor `name` in the type it is stored in."""
        return load_located(self._located[name])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        file, begin, (dtype, shape) = self._located[name]
        row = math.prod(shape[1:]) * itemsize(dtype)
        return load_located(
            Located(file, begin + start * row, TensorInfo(dtype, (stop - start, *shape[1:])))
        )


def load_located(located: Located) -> mx.array:
    file, start, (dtype, shape) = located
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return read_strided(file, start, math.prod(shape), dtype, shape, strides, 0)


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard of a sharded model, or None. A shard's name must be a plain file name."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{path} has no weight_map")
    for shard in weight_map.values():
        plain = (
            isinstance(shard, str)
            and shard.endswith(".safetensors")
            and not set(shard) & set("/\\\0")
        )
        if not plain:
            raise ConversionError(
                f"{path} points to {shard!r}; shards must be .safetensors files of this folder"
            )
    return weight_map


def weight_files(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        files = [folder / shard for shard in sorted(set(weight_map.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ConversionError(f"{folder} lacks {', '.join(missing[:3])}, which its index lists")
        return files
    files = weights_by_kind(folder).get("safetensors", [])
    if (folder / "model.safetensors") in files:
        return [folder / "model.safetensors"]
    if len(files) != 1:
        raise ConversionError(
            f"{folder} holds {len(files)} safetensors files and no model.safetensors.index.json"
        )
    return files


def read_header(path: Path) -> dict[str, Located]:
    """The tensors of one file with their places, each checked to lie within it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ConversionError(f"{path} is truncated or no safetensors file")
            if length > MAX_HEADER_BYTES:
                raise ConversionError(
                    f"{path} has a header of {length} bytes; no OpenELM needs above {MAX_HEADER_BYTES}"
                )
            raw: Any = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} cannot be read as safetensors: {error}") from None
    if not isinstance(raw, dict):
        raise ConversionError(f"{path} cannot be read as safetensors: its header is no object")
    raw.pop("__metadata__", None)
    return {name: locate(path, name, entry, 8 + length, size) for name, entry in raw.items()}


def locate(path: Path, name: str, entry: Any, base: int, size: int) -> Located:
    try:
        code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ConversionError(f"{path}: the header's entry of tensor {name} is malformed") from None
    if not isinstance(code, str) or code not in DTYPES:
        raise ConversionError(
            f"{path}: tensor {name} has type {str(code):.40}; readable are {', '.join(DTYPES)}"
        )
    if len(shape) > 8 or any(
        type(n) is not int or not 0 <= n < MAX_NUMBER for n in (*shape, start, end)
    ):
        raise ConversionError(f"{path}: the header's entry of tensor {name} is malformed")
    if end - start != math.prod(shape) * itemsize(DTYPES[code]):
        raise ConversionError(
            f"{path}: tensor {name} of shape {shape} does not take {end - start} bytes"
        )
    if base + end > size:
        raise ConversionError(
            f"{path} is truncated: tensor {name} ends at byte {base + end} of {size}"
        )
    return Located(path, base + start, TensorInfo(DTYPES[code], shape))
