"""Little-endian bytes in a file -> an MLX array, whatever the strides; half types go by way of their bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import ConversionError


def read_strided(
    path: Path,
    start: int,
    elements: int,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
) -> mx.array:
    """A view of a storage of `elements` at byte `start`; strides and offset count elements and fit
    (caller checks).
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
    """A copy in C order, whatever the strides."""
    if dtype == "bfloat16":
        return mx.array(array).view(mx.bfloat16)
    if (
        dtype == "float64"
    ):  # MLX computes in float32 at most on the GPU; no published checkpoint needs more
        return mx.array(array.astype(np.float32))
    return mx.array(array)


def to_bytes(array: mx.array) -> memoryview:
    """The array's elements in C order, little-endian, as safetensors stores them."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain)).data.cast("B") if plain.size else memoryview(b"")
