"""Folders of safetensors: Hugging Face's, mlx-lm's, this project's and those of CoreNet's MLX port.

The headers are read first, data on demand. A matrix that MLX quantized lies there as packed
`weight` with `scales` and, in affine mode, `biases`; config.json states its bits, group size and
mode. Such a matrix is given out dequantized; `packed` hands over the stored arrays for a target of
the very same spec. (What MLX 0.10 packed for CoreNet's folders means the same today.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from openelm_mlx.convert.sources import TensorSource, weights_by_kind
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES, itemsize
from openelm_mlx.engine.prompts import TEMPLATE
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import INDEX, WEIGHTS, TensorInfo, TensorPlace, read_json, read_places
from openelm_mlx.model.checkpoint import PARTS, unpacked
from openelm_mlx.model.names import canonical, frequencies
from openelm_mlx.quantization import QuantSpec, quantization_of, stem_of


class HuggingFaceFolder(TensorSource):
    """A folder of safetensors. Raises `CheckpointError` or `ConfigError` if its parts do not fit
    together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.instruct = (self.path / TEMPLATE).is_file()
        found = read_places(self.path, unindexed_files(self.path))
        self._places = canonical(found)
        if place := frequencies(found):
            self.rotary = place.info, partial(load_place, place)
        stored = {name: place.info for name, place in self._places.items()}
        config, packed = self.path / "config.json", any(name.endswith(".scales") for name in stored)
        stated = quantization_of(read_json(config)) if packed and config.is_file() else None
        self.tensors, self._specs = unpacked(stored, stated)
        self.quantized = {stem: str(spec) for stem, spec in self._specs.items()}
        self.plan = {stem: spec for stem, spec in self._specs.items() if spec.writable}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({place.file for place in self._places.values()}))

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`. A quantized one is dequantized in float32 and rounded once, to
        the type of its scales.
        """
        stem = stem_of(name)
        if stem not in self._specs:
            return load_place(self._places[name])
        weight = dequantized(name, self.packed(name), self._specs[stem])
        return weight.astype(DTYPES[self.tensors[name].dtype].mlx)

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        if stem_of(name) in self._specs:
            return super().reader(name)
        return partial(load_rows, self._places[name])

    def packed(self, name: str) -> dict[str, mx.array]:
        parts = (f"{stem_of(name)}.{part}" for part in PARTS)
        return {part: load_place(self._places[part]) for part in parts if part in self._places}


def unindexed_files(folder: Path) -> list[Path] | None:
    """Return the one file of weights in a folder without an index, whatever its name is."""
    if (folder / INDEX).exists():
        return None
    files = weights_by_kind(folder).get("safetensors", [])
    if (folder / WEIGHTS) in files:
        return [folder / WEIGHTS]
    if len(files) != 1:
        raise ConversionError(f"{folder} contains {len(files)} safetensors files and no {INDEX}")
    return files


def dequantized(name: str, arrays: Mapping[str, mx.array], spec: QuantSpec | None) -> mx.array:
    """Return the float32 weights that the stored arrays of a tensor stand for."""
    array = arrays[name]
    if spec is None:
        return array.astype(mx.float32)
    stem = name.removesuffix("weight")
    scales, biases = arrays[stem + "scales"], arrays.get(stem + "biases")
    if biases is not None:  # in half precision the products would be rounded on the way
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(array, scales, biases, **spec.as_config(), dtype=mx.float32)


def load_place(place: TensorPlace) -> mx.array:
    file, start, (dtype, shape) = place
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return read_strided(file, start, math.prod(shape), dtype, shape, strides, 0)


def load_rows(place: TensorPlace, start: int, stop: int) -> mx.array:
    file, begin, (dtype, shape) = place
    row = math.prod(shape[1:]) * itemsize(dtype)
    info = TensorInfo(dtype, (stop - start, *shape[1:]))
    return load_place(TensorPlace(file, begin + start * row, info))


def read_strided(
    path: Path,
    start: int,
    elements: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
) -> mx.array:
    """Return a copy in C order of a view on `elements` numbers that begin at byte `start`.

    Strides and offset count elements; the caller has checked that they fit. Raises
    `ConversionError`.
    """
    code = np.dtype(DTYPES[dtype].numpy)
    if 0 in shape:
        return to_mlx(np.zeros(shape, code), dtype)
    try:
        storage = np.memmap(path, dtype=code, mode="r", offset=start, shape=(elements,))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from None
    steps = tuple(step * code.itemsize for step in strides)
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], shape=shape, strides=steps, writeable=False
    )
    return to_mlx(view, dtype)


def to_mlx(array: np.ndarray, dtype: str) -> mx.array:
    if dtype == "bfloat16":  # which numpy lacks: its bits travel
        return mx.array(array).view(mx.bfloat16)
    if dtype == "float64":  # a GPU computes in float32 at most
        return mx.array(array.astype(np.float32))
    return mx.array(array)
