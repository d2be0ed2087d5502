"""Read a Hugging Face folder: one safetensors file, or shards with an index. The headers are read
first, data on demand.
"""

from __future__ import annotations

import math
from pathlib import Path

from openelm_mlx.convert.sources import TensorSource, canonical, weights_by_kind
from openelm_mlx.convert.sources.raw import read_strided
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import CheckpointError, ConversionError
from openelm_mlx.files import INDEX, WEIGHTS, TensorInfo, TensorPlace, read_places


class HuggingFaceFolder(TensorSource):
    """The tensors of a folder, listed on opening and read one at a time. Raises
    `ConversionError`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.instruct = (self.path / "chat_template.jinja").is_file()
        try:
            self._places = canonical(read_places(self.path, weight_files(self.path)))
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        self.tensors = {name: place.info for name, place in self._places.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({place.file for place in self._places.values()}))

    def load(self, name: str) -> mx.array:
        """The tensor `name` in the type it is stored in."""
        return load_place(self._places[name])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        file, begin, (dtype, shape) = self._places[name]
        row = math.prod(shape[1:]) * itemsize(dtype)
        info = TensorInfo(dtype, (stop - start, *shape[1:]))
        return load_place(TensorPlace(file, begin + start * row, info))


def load_place(place: TensorPlace) -> mx.array:
    file, start, (dtype, shape) = place
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return read_strided(file, start, math.prod(shape), dtype, shape, strides, 0)


def weight_files(folder: Path) -> list[Path] | None:
    """Return the one file of weights in a folder without an index, whatever its name is."""
    if (folder / INDEX).exists():
        return None
    files = weights_by_kind(folder).get("safetensors", [])
    if (folder / WEIGHTS) in files:
        return [folder / WEIGHTS]
    if len(files) != 1:
        raise ConversionError(f"{folder} holds {len(files)} safetensors files and no {INDEX}")
    return files
