"""Uniform affine quantization: which tensors it takes, what they become, and the settings config.json records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from openelm_mlx.convert.sources import TensorInfo

from openelm_mlx.errors import ConversionError


def check_quantizable(shapes: Mapping[str, tuple[int, ...]], group_size: int) -> None:
    """Raise `ConversionError` naming the first matrix whose rows do not divide into groups."""
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[1] % group_size:
            fits = [
                str(size)
                for size in (128, 64, 32)
                if all(s[-1] % size == 0 for s in shapes.values() if len(s) == 2)
            ]
            remedy = (
                f"use --group-size {' or '.join(fits)}"
                if fits
                else "no group size fits: convert without --bits"
            )
            raise ConversionError(
                f"{name} has rows of {shape[1]} weights, no multiple of group size {group_size}; {remedy}"
            )


def planned(name: str, info: TensorInfo, bits: int | None, group_size: int) -> dict[str, TensorInfo]:
    """What is written for the tensor `name`: itself, or packed weights with scales and biases (mx.quantize)."""
    if bits is None or len(info.shape) != 2:
        return {name: info}
    rows, columns = info.shape
    side = TensorInfo(info.dtype, (rows, columns // group_size))
    stem = name.removesuffix("weight")
    return {
        name: TensorInfo("uint32", (rows, columns * bits // 32)),
        stem + "scales": side,
        stem + "biases": side,
    }


def quantized(name: str, array: mx.array, bits: int | None, group_size: int) -> dict[str, mx.array]:
    """The arrays that `planned` promised."""
    if bits is None or array.ndim != 2:
        return {name: array}
    stem = name.removesuffix("weight")
    packed = mx.quantize(array, group_size=group_size, bits=bits)
    return dict(zip((name, stem + "scales", stem + "biases"), packed, strict=True))


def config_entry(bits: int, group_size: int) -> dict[str, Any]:
    """mlx-lm's form of `quantization` in config.json."""
    return {"group_size": group_size, "bits": bits, "mode": "affine"}
