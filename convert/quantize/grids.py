"""The values a weight can take in affine mode, fitted to what matters, and codes packed as MLX
packs them.

A grid is a scale and a bias for each group: value = scale * code + bias. numpy, because rounding
column by column is work for the host.
"""

from __future__ import annotations

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.quantization import QuantSpec

SHRINKS = np.linspace(
    1.0, 0.5, 26
)  # of a group's range: values cut off buy a finer grid for the rest
REFITS = 3  # alternations of rounding and least squares


def as_stored(array: np.ndarray, dtype: mx.Dtype) -> tuple[mx.array, np.ndarray]:
    """The array in its storage type, and the float32 numbers that then stand there."""
    stored = mx.array(array.astype(np.float32)).astype(dtype)
    return stored, np.array(stored.astype(mx.float32))


def fit_groups(
    values: np.ndarray, importance: np.ndarray, form: QuantSpec, dtype: mx.Dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias [rows, groups], as stored in `dtype`, of least weighted square error for
    values [rows, groups, group_size].

    `importance` [groups, group_size] weighs the columns. Ranges from the full one down to half are
    tried, each with scale and bias refitted by weighted least squares to the codes they give; the
    best of each group is kept.
    """
    top = 2**form.bits - 1
    low, high = values.min(-1), values.max(-1)
    best_error = np.full(low.shape, np.inf)
    best = np.zeros_like(low), np.zeros_like(low)
    weight = np.broadcast_to(importance, values.shape)
    total = weight.sum(-1)
    for shrink in SHRINKS:
        middle = (low + high) / 2
        scale = np.maximum((high - low) * shrink / top, 1e-8)
        bias = middle - scale * top / 2
        for _ in range(REFITS):
            codes = np.clip(np.rint((values - bias[..., None]) / scale[..., None]), 0, top)
            mean_c, mean_v = (weight * codes).sum(-1) / total, (weight * values).sum(-1) / total
            spread = (weight * codes * codes).sum(-1) / total - mean_c**2
            joint = (weight * codes * values).sum(-1) / total - mean_c * mean_v
            fits = (spread > 1e-6) & (joint > 0)
            scale = np.where(fits, joint / np.where(fits, spread, 1.0), scale)
            bias = np.where(fits, mean_v - scale * mean_c, bias)
        kept_scale, kept_bias = as_stored(scale, dtype)[1], as_stored(bias, dtype)[1]
        safe = np.where(kept_scale == 0, 1.0, kept_scale)
        codes = np.clip(np.rint((values - kept_bias[..., None]) / safe[..., None]), 0, top)
        error = (weight * (values - kept_bias[..., None] - kept_scale[..., None] * codes) ** 2).sum(
            -1
        )
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best = np.where(better, kept_scale, best[0]), np.where(better, kept_bias, best[1])
    return best


def pack(codes: np.ndarray, bits: int) -> mx.array:
    """Codes [rows, columns] as MLX's packed uint32 [rows, columns * bits / 32]: one stream of bits,
    lowest first.
    """
    rows, columns = codes.shape
    spread = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    packed = np.packbits(spread.reshape(rows, columns * bits), axis=-1, bitorder="little")
    return mx.array(packed.view("<u4").astype(np.uint32))
