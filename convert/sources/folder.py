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
from typing import Any

import numpy as np

from openelm_mlx.convert.sources import TensorSource, canonical, canonical_name, weights_by_kind
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES, FLOATS, itemsize
from openelm_mlx.errors import CheckpointError, ConfigError, ConversionError
from openelm_mlx.files import INDEX, WEIGHTS, TensorInfo, TensorPlace, read_json, read_places
from openelm_mlx.quantization import QuantSpec, quantization_of, spec_of, stem_of

PARTS = ("weight", "scales", "biases")  # of a quantized matrix, in the order of mlx.core.quantize


def safetensors_folder(path: Path) -> TensorSource:
    """Return the reader for a folder, quantized or not. Raises `ConversionError`."""
    source = HuggingFaceFolder(path)
    if not any(name.endswith(".scales") for name in source.tensors):
        return source
    config = path / "config.json"
    return QuantizedFolder(source, quantization_of(read_json(config)) if config.is_file() else None)


class HuggingFaceFolder(TensorSource):
    """The tensors of a folder as they are stored. Raises `ConversionError`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.instruct = (self.path / "chat_template.jinja").is_file()
        try:
            self._places = canonical(read_places(self.path, unindexed_files(self.path)))
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        self.tensors = {name: place.info for name, place in self._places.items()}

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({place.file for place in self._places.values()}))

    def load(self, name: str) -> mx.array:
        return load_place(self._places[name])

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        return partial(load_rows, self._places[name])


class QuantizedFolder(TensorSource):
    """A folder of quantized matrices, seen as one of unquantized ones. Raises `ConversionError`
    if their parts do not fit together.
    """

    def __init__(self, source: TensorSource, quantization: Mapping[str, Any] | None) -> None:
        self.path, self.instruct = source.path, source.instruct
        self._source = source
        self._specs: dict[str, QuantSpec] = {}
        self.tensors: dict[str, TensorInfo] = {}
        stems = {
            name.removesuffix(".scales") for name in source.tensors if name.endswith(".scales")
        }
        if stems and quantization is None:
            raise ConversionError(
                f"{self.path} contains quantized weights, but its config.json has no quantization"
            )
        entries = {canonical_name(str(key)): value for key, value in (quantization or {}).items()}
        vectors = (info.dtype for info in source.tensors.values() if len(info.shape) == 1)
        plain = next((dtype for dtype in vectors if dtype in FLOATS), "bfloat16")
        for name, info in source.tensors.items():
            stem, _, part = name.rpartition(".")
            if stem in stems and part == "weight":
                self._specs[stem] = self._spec(stem, entries)
                self.tensors[name] = self._unpacked(stem, self._specs[stem], plain)
            elif stem not in stems or part not in PARTS:
                self.tensors[name] = info
        if lost := sorted(stems - self._specs.keys()):
            raise ConversionError(f"{self.path}: {lost[0]}.scales has no weight beside it")
        self.quantized = {stem: str(spec) for stem, spec in self._specs.items()}
        self.plan = {stem: spec for stem, spec in self._specs.items() if spec.writable}

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`. A quantized one is dequantized in float32 and rounded once, to
        the type of its scales.
        """
        stem = stem_of(name)
        if stem not in self._specs:
            return self._source.load(name)
        weight = dequantized(name, self.packed(name), self._specs[stem])
        return weight.astype(DTYPES[self.tensors[name].dtype].mlx)

    def packed(self, name: str) -> dict[str, mx.array]:
        names = [f"{stem_of(name)}.{part}" for part in PARTS]
        return {name: self._source.load(name) for name in names if name in self._source.tensors}

    def _spec(self, stem: str, quantization: Mapping[str, Any]) -> QuantSpec:
        try:
            spec = spec_of(quantization, stem)
        except ConfigError as error:
            raise ConversionError(f"{self.path}: {error}") from None
        if spec is None:
            what = f"{stem} is quantized, but its config.json says that it is not"
            raise ConversionError(f"{self.path}: {what}")
        return spec

    def _unpacked(self, stem: str, spec: QuantSpec, plain: str) -> TensorInfo:
        """Return type and shape of the unquantized matrix, once its parts are seen to fit."""
        stored, affine = self._source.tensors, spec.mode == "affine"
        parts = {part: stored.get(f"{stem}.{part}") for part in PARTS}
        weight, scales, biases = parts.values()
        rows = columns = 0
        if weight is not None and len(weight.shape) == 2 and weight.dtype == "uint32":
            rows, columns = weight.shape[0], weight.shape[1] * 32 // spec.bits
        dtype = scales.dtype if affine and scales else "uint8"
        side = TensorInfo(dtype, (rows, columns // spec.group_size))
        sizes_fit = rows > 0 and columns > 0 and columns % spec.group_size == 0
        sides_fit = scales == side and biases == (side if affine else None)
        if not sizes_fit or not sides_fit or (affine and dtype not in FLOATS):
            listed = ", ".join(f"{name} {describe(info)}" for name, info in parts.items())
            raise ConversionError(
                f"{self.path}: the parts of {stem} ({listed}) do not make a matrix of {spec.bits} "
                f"bits in groups of {spec.group_size} ({spec.mode})"
            )
        return TensorInfo(dtype if affine else plain, (rows, columns))


def describe(info: TensorInfo | None) -> str:
    return "none" if info is None else f"{info.dtype} {list(info.shape)}"


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
