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

from openelm_mlx.convert.quantize.forms import Form
from openelm_mlx.convert.sources import TensorInfo, TensorSource, canonical_name
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError, OptionError

FLOATS = ("float32", "float16", "bfloat16")
BLOCK_FORMATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode -> bits, group size
AFFINE_BITS, AFFINE_GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)


class QuantizedFolder(TensorSource):
    """A folder of safetensors seen as one of whole matrices. Raises `ConversionError` where the
    parts do not fit.
    """

    def __init__(self, source: TensorSource, quantization: Any) -> None:
        self.path = source.path
        self._source, self.instruct = source, source.instruct
        self._settings: dict[str, tuple[int, int, str]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.forms: dict[str, Form] = {}
        plain = next(
            (i.dtype for i in source.tensors.values() if len(i.shape) == 1 and i.dtype in FLOATS),
            "bfloat16",
        )
        stems = {
            name.removesuffix(".scales") for name in source.tensors if name.endswith(".scales")
        }
        if stems and not isinstance(quantization, Mapping):
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
                settings = settings_of(self.path, stem, quantization)
                self._settings[stem] = settings
                self.tensors[name] = self._unpacked(stem, settings, plain)
                try:
                    self.forms[stem] = Form(*settings)
                except (
                    OptionError
                ):  # readable, but no form this project writes: such matrices become whole
                    continue
            elif part not in ("scales", "biases"):
                self.tensors[name] = info
        if lost := sorted(stems - self._settings.keys()):
            raise ConversionError(f"{self.path}: {lost[0]}.scales has no weight beside it")

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    def load(self, name: str) -> mx.array:
        """The tensor `name`; dequantized in float32 and rounded once to the type of its scales."""
        stem = name.removesuffix(".weight")
        if stem not in self._settings:
            return self._source.load(name)
        bits, group_size, mode = self._settings[stem]
        arrays = self.packed(name)
        scales, biases = arrays[f"{stem}.scales"], arrays.get(f"{stem}.biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        weight = mx.dequantize(
            arrays[name],
            scales,
            biases,
            group_size=group_size,
            bits=bits,
            mode=mode,
            dtype=mx.float32,
        )
        return weight.astype(getattr(mx, self.tensors[name].dtype))

    def packed(self, name: str) -> dict[str, mx.array]:
        """The stored arrays of a quantized matrix: weight, scales and perhaps biases, under their
        names.
        """
        stem = name.removesuffix(".weight")
        names = [f"{stem}.{part}" for part in ("weight", "scales", "biases")]
        return {name: self._source.load(name) for name in names if name in self._source.tensors}

    def _unpacked(self, stem: str, settings: tuple[int, int, str], plain: str) -> TensorInfo:
        """Type and shape of the whole matrix, once its parts are seen to fit."""
        bits, group_size, mode = settings
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


def settings_of(path: Path, stem: str, quantization: Mapping[str, Any]) -> tuple[int, int, str]:
    """Bits, group size and mode of one layer: its own entry, else the common one (mlx-lm's
    form).
    """
    own = quantization.get(stem)
    entry = own if isinstance(own, Mapping) else quantization
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in (*BLOCK_FORMATS, "affine"):
        raise ConversionError(
            f"{path}: config.json quantizes {stem} in mode {mode!r}; MLX has affine, "
            f"{', '.join(BLOCK_FORMATS)}"
        )
    default = BLOCK_FORMATS.get(mode, (None, None))
    bits, group_size = (entry.get(key, default[n]) for n, key in enumerate(("bits", "group_size")))
    allowed = (
        (bits, group_size) == default
        if mode in BLOCK_FORMATS
        else bits in AFFINE_BITS and group_size in AFFINE_GROUPS
    )
    if not allowed or type(bits) is not int or type(group_size) is not int:
        raise ConversionError(
            f"{path}: config.json quantizes {stem} to {bits!r} bits in groups of {group_size!r}, "
            f"which MLX does not have in mode {mode}"
        )
    return bits, group_size, mode


def quantization_of(raw: Mapping[str, Any]) -> Any:
    """The entry of config.json, under either of the keys mlx-lm writes."""
    return raw.get("quantization") or raw.get("quantization_config")
