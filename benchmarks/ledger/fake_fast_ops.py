"""One primitive for each `mx.fast` call, as on a GPU, so that a graph traced on any device has the
GPU's kernels.

On the CPU backend `mx.fast.rms_norm` and its kin expand into many primitives (mlx/fast.cpp:
`use_fallback`). Inside `one_primitive_each` each of them becomes one `mx.depends`, which has the
right shape, reads what the call reads and computes nothing. Graphs made so are for counting and for
timing the host; their numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from openelm_mlx.device import mx

TAGS = {
    "RMSNorm": 7001.0,
    "RoPE": 7002.0,
    "ScaledDotProductAttention": 7003.0,
    "Dequantize": 7004.0,
    "Compiled": 7005.0,
}
NAMES = {value: name for name, value in TAGS.items()}


@contextmanager
def one_primitive_each(tagged: bool = False) -> Iterator[None]:
    """Patch `mx.fast` and `mx.dequantize`; `tagged` marks each with a constant that tells what it
    stands for.

    The tag is an input more, so leave it out where the host is timed.
    """
    tags = {name: [tag(value)] if tagged else [] for name, value in TAGS.items()}
    norm, rope, attention = tags["RMSNorm"], tags["RoPE"], tags["ScaledDotProductAttention"]
    packed = tags["Dequantize"]

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        return mx.depends(x, norm if weight is None else [weight, *norm])

    def rotary(x: mx.array, dims: int, *, offset: Any = None, **_: Any) -> mx.array:
        return mx.depends(x, [offset, *rope] if isinstance(offset, mx.array) else rope)

    def sdpa(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **_: Any
    ) -> mx.array:
        return mx.depends(
            q, [k, v, mask, *attention] if isinstance(mask, mx.array) else [k, v, *attention]
        )

    def dequantize(
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        group_size: int | None = None,
        bits: int | None = None,
        **_: Any,
    ) -> mx.array:
        width = w.shape[-1] * 32 // (bits or 4)
        dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
        shape = like((*w.shape[:-1], width), dtype)
        return mx.depends(shape, [a for a in (w, scales, biases) if a is not None] + packed)

    patches = [
        (mx.fast, "rms_norm", rms_norm),
        (mx.fast, "rope", rotary),
        (mx.fast, "scaled_dot_product_attention", sdpa),
        (mx, "dequantize", dequantize),
    ]
    kept = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, stand_in in patches:
        setattr(place, name, stand_in)
    try:
        yield
    finally:
        for place, name, real in kept:
            setattr(place, name, real)


def fused(out: mx.array, *reads: mx.array) -> mx.array:
    """The stand-in of a function that is compiled by itself: one kernel of the shape of `out`."""
    return mx.depends(out, [*reads, tag(TAGS["Compiled"])])


@cache
def tag(value: float) -> mx.array:
    array = mx.array(value)
    mx.eval(array)
    return array


def blank(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of this shape that takes no memory: not a kernel of a graph."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


like = cache(blank)  # for constants; what is written into must be an array of its own
