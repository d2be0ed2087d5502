"""What a tensor becomes in its form: the arrays to write, and the float weights they stand for."""

from __future__ import annotations

from collections.abc import Mapping

from openelm_mlx.device import mx
from openelm_mlx.files import TensorInfo
from openelm_mlx.quantization import QuantSpec

PARTS = ("weight", "scales", "biases")


def planned(name: str, info: TensorInfo, form: QuantSpec | None) -> dict[str, TensorInfo]:
    """What is written for the tensor `name`: itself, or packed weights with scales and perhaps
    biases.
    """
    if form is None:
        return {name: info}
    rows, columns = info.shape
    stem = name.removesuffix("weight")
    groups = (rows, columns // form.group_size)
    result = {name: TensorInfo("uint32", (rows, columns * form.bits // 32))}
    if form.mode != "affine":
        return result | {stem + "scales": TensorInfo("uint8", groups)}
    return result | {stem + part: TensorInfo(info.dtype, groups) for part in ("scales", "biases")}


def quantized(name: str, array: mx.array, form: QuantSpec | None) -> dict[str, mx.array]:
    """The arrays that `planned` promised, rounded to the nearest value of each group's grid
    (mlx.core.quantize).
    """
    if form is None:
        return {name: array}
    stem = name.removesuffix("weight")
    packed = mx.quantize(array, group_size=form.group_size, bits=form.bits, mode=form.mode)
    return {stem + part: value for part, value in zip(PARTS, packed, strict=False)}


def restored(name: str, arrays: Mapping[str, mx.array], form: QuantSpec | None) -> mx.array:
    """The float32 weights that the stored arrays of a tensor stand for."""
    array = arrays[name]
    if form is None:
        return array.astype(mx.float32)
    stem = name.removesuffix("weight")
    scales, biases = arrays[stem + "scales"], arrays.get(stem + "biases")
    if biases is not None:  # in float32: half types are rounded on the way otherwise
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weights = mx.dequantize(
        array,
        scales,
        biases,
        group_size=form.group_size,
        bits=form.bits,
        mode=form.mode,
        dtype=mx.float32,
    )
    return weights


def rounded(array: mx.array, form: QuantSpec | None, dtype: mx.Dtype) -> mx.array:
    """The float32 weights that `array`, stored as `form` with scales in `dtype`, stands for."""
    array = array.astype(dtype)
    return restored("weight", quantized("weight", array, form), form)
