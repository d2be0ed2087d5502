"""The number types: what each is called by MLX, numpy, PyTorch, safetensors and GGUF, and its size.

MLX, numpy and PyTorch agree on the name, which is the key of the table. Nothing is imported here
until a type of one of these libraries is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.device import mx


@dataclass(frozen=True)
class Dtype:
    """One number type. `numpy` is little-endian; numpy lacks bfloat16 and reads it as bits."""

    name: str
    itemsize: int  # bytes
    safetensors: str
    numpy: str
    storage: str = ""  # the class that torch.save names
    gguf: str = ""  # empty if GGUF is not read in it

    @property
    def mlx(self) -> mx.Dtype:
        from openelm_mlx.device import mx

        return getattr(mx, "bool_" if self.name == "bool" else self.name)  # type: ignore[no-any-return]

    @property
    def torch(self) -> Any:
        import torch

        return getattr(torch, self.name)


DTYPES: dict[str, Dtype] = {
    dtype.name: dtype
    for dtype in (
        Dtype("float64", 8, "F64", "<f8", "DoubleStorage"),
        Dtype("float32", 4, "F32", "<f4", "FloatStorage", "F32"),
        Dtype("float16", 2, "F16", "<f2", "HalfStorage", "F16"),
        Dtype("bfloat16", 2, "BF16", "<u2", "BFloat16Storage", "BF16"),
        Dtype("int64", 8, "I64", "<i8", "LongStorage"),
        Dtype("int32", 4, "I32", "<i4", "IntStorage"),
        Dtype("int16", 2, "I16", "<i2", "ShortStorage"),
        Dtype("int8", 1, "I8", "i1", "CharStorage"),
        Dtype("uint8", 1, "U8", "u1", "ByteStorage"),
        Dtype("uint16", 2, "U16", "<u2"),
        Dtype("uint32", 4, "U32", "<u4"),
        Dtype("uint64", 8, "U64", "<u8"),
        Dtype("bool", 1, "BOOL", "?", "BoolStorage"),
    )
}
FLOATS = ("float32", "bfloat16", "float16")  # what weights are stored and computed in
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES.values()}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES.values() if dtype.storage}
BY_GGUF = {dtype.gguf: dtype for dtype in DTYPES.values() if dtype.gguf}


def itemsize(name: str) -> int:
    """Return the bytes of one number of the type `name`."""
    return DTYPES[name].itemsize


def name_of(dtype: Any) -> str:
    """Return the name of a type of MLX (mlx.core.bfloat16) or PyTorch (torch.bfloat16)."""
    return str(dtype).rpartition(".")[2]
