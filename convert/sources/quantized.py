"""Folders whose matrices MLX quantized: mlx-lm's, mlx-community's, this project's, and those of
CoreNet's MLX port.

A quantized matrix lies there as packed `weight` with `scales` and, in affine mode, `biases`;
config.json says bits, group size and mode, for all layers or layer by layer. What lies so is given
out whole, dequantized one tensor at a time; `packed` hands over the stored arrays for a target of
the very same form. (What MLX 0.10 packed for CoreNet's folders means the same today.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import TensorSource, canonical_name
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES, FLOATS
from openelm_mlx.errors import ConfigError, ConversionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.quantization import QuantSpec, spec_of


class QuantizedFolder(TensorSource):
    """A folder of safetensors seen as one of whole matrices. Raises `ConversionError` where the
    parts do not fit.
    """

    def __init__(self, source: TensorSource, quantization: Mapping[str, Any] | None) -> None:
        self.path = source.path
        self._source, self.instruct = source, source.instruct
        self._specs: dict[str, QuantSpec] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.forms: dict[str, QuantSpec] = {}
        plain = next(
            (i.dtype for i in source.tensors.values() if len(i.shape) == 1 and i.dtype in FLOATS),
            "bfloat16",
        )
        stems = {
            name.removesuffix(".scales") for name in source.tensors if name.endswith(".scales")
        }
        if stems and quantization is None:
            raise ConversionError(
                f"{self.path} holds quantized weights, but its config.json has no quantization"
            )
        if isinstance(quantization, Mapping):
            quantization = {canonical_name(str(key)): of for key, of in quantization.items()}
        for name, info in source.tensors.items():
            stem, _, part = name.rpartition(".")
            if stem not in stems:
                self.tensors[name] = info
            elif part == "weight":
                spec = self._spec(stem, quantization or {})
                self._specs[stem] = spec
                self.tensors[name] = self._unpacked(stem, spec, plain)
                if spec.writable:  # a matrix in another spec is written unquantized
                    self.forms[stem] = spec
            elif part not in ("scales", "biases"):
                self.tensors[name] = info
        if lost := sorted(stems - self._specs.keys()):
            raise ConversionError(f"{self.path}: {lost[0]}.scales has no weight beside it")

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        """The tensor `name`; dequantized in float32 and rounded once to the type of its scales."""
        stem = name.removesuffix(".weight")
        if stem not in self._specs:
            return self._source.load(name)
        arrays = self.packed(name)
        scales, biases = arrays[f"{stem}.scales"], arrays.get(f"{stem}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(
            arrays[name],
            scales,
            biases,
            **self._specs[stem].as_config(),
            dtype=mx.float32,
        )
        return weight.astype(DTYPES[self.tensors[name].dtype].mlx)

    def packed(self, name: str) -> dict[str, mx.array]:
        """The stored arrays of a quantized matrix: weight, scales and perhaps biases, under their
        names.
        """
        stem = name.removesuffix(".weight")
        names = [f"{stem}.{part}" for part in ("weight", "scales", "biases")]
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
        """Type and shape of the whole matrix, once its parts are seen to fit."""
        bits, group_size, mode = spec.bits, spec.group_size, spec.mode
        stored = self._source.tensors
        weight, scales, biases = (
            stored.get(f"{stem}.{part}") for part in ("weight", "scales", "biases")
        )
        rows, columns = (
            (weight.shape[0], weight.shape[1] * 32 // bits)
            if weight and len(weight.shape) == 2
            else (0, 0)
        )
        affine = mode == "affine"
        side = TensorInfo(
            scales.dtype if affine and scales else "uint8", (rows, columns // group_size)
        )
        fits = (
            weight is not None
            and weight.dtype == "uint32"
            and columns % group_size == 0
            and rows > 0
            and columns > 0
            and scales == side
            and biases == (side if affine else None)
            and (not affine or side.dtype in FLOATS)
        )
        if not fits:
            raise ConversionError(
                f"{self.path}: the parts of {stem} (weight {describe(weight)}, scales {describe(scales)}, biases "
                f"{describe(biases)}) do not make a matrix of {bits} bits in groups of {group_size} ({mode})"
            )
        return TensorInfo(side.dtype if affine else plain, (rows, columns))


def describe(info: TensorInfo | None) -> str:
    return "none" if info is None else f"{info.dtype} {list(info.shape)}"
