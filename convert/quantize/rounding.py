"""One matrix rounded: to nearest on MLX's grids or on fitted ones, or with error feedback.

A grid is a scale and a bias for each group (grids.py). Error feedback (GPTQ: Frantar et al.,
arXiv:2210.17323) rounds columns one after another and passes the error of each on to the columns
still to come, so that the product with the inputs seen in calibration changes least. The grid of a
group is fitted when its first column's turn comes, to the weights as they then are. This is numpy's
work: column by column leaves nothing to do for a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from openelm_mlx.convert.quantize import LazyWeights, Weights
from openelm_mlx.convert.quantize.grids import PART as FITTED
from openelm_mlx.convert.quantize.grids import SHRINKS, fit_groups, fitted_parts, on_grid
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.checkpoint import PARTS
from openelm_mlx.quantization import Plan, QuantSpec, planned

PART = 1 << 24  # weights that are rounded or packed at a time
BLOCK = 128  # columns whose errors are passed on together; every group size divides it
DAMPING = 0.01  # of the mean diagonal of the second moments, added to all of it


def layout(name: str, info: TensorInfo, spec: QuantSpec | None) -> dict[str, TensorInfo]:
    """Return what is stored for the tensor `name`: itself, or packed weights with scales and, in
    affine mode, biases.
    """
    if spec is None:
        return {name: info}
    rows, columns = info.shape
    stem = name.removesuffix("weight")
    groups = (rows, columns // spec.group_size)
    result = {name: TensorInfo("uint32", (rows, columns * spec.bits // 32))}
    if spec.mode != "affine":
        return result | {stem + "scales": TensorInfo("uint8", groups)}
    return result | {stem + part: TensorInfo(info.dtype, groups) for part in PARTS[1:]}


def quantized(name: str, array: mx.array, spec: QuantSpec | None) -> dict[str, mx.array]:
    """Return the arrays of `layout`, rounded to the nearest value of each group's grid."""
    if spec is None:
        return {name: array}
    stem = name.removesuffix("weight")
    packed = mx.quantize(array, **spec.as_config())
    return {stem + part: value for part, value in zip(PARTS, packed, strict=False)}


def rounded(array: mx.array, spec: QuantSpec | None, dtype: mx.Dtype) -> mx.array:
    """Return the float32 weights that `array` stands for once it is stored in this spec.

    Some rows are rounded at a time: block formats take thirteen times as much memory on the way.
    """
    if spec is None:
        return array.astype(dtype).astype(mx.float32)
    step, parts = max(1, FITTED // array.shape[1]), []
    for start in range(0, len(array), step):
        stored = quantized("weight", array[start : start + step].astype(dtype), spec)
        parts.append(dequantized("weight", stored, spec))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def fitted(
    name: str, array: mx.array, spec: QuantSpec | None, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """Return the arrays of `layout`, affine ones on grids fitted to the weights (grids.py)."""
    if spec is None or spec.mode != "affine":
        return quantized(name, array.astype(dtype), spec)
    stem, parts = name.removesuffix("weight"), []
    for codes, grid in fitted_parts(array, spec, dtype):
        packed = pack(np.array(codes.astype(mx.uint8)).reshape(len(codes), -1), spec.bits)
        parts.append((packed, *(side.astype(dtype) for side in grid)))
    together = (mx.concatenate(list(sides)) for sides in zip(*parts, strict=True))
    return {stem + part: value for part, value in zip(PARTS, together, strict=True)}


def fitted_weights(array: mx.array, spec: QuantSpec | None, dtype: mx.Dtype) -> mx.array:
    """Return the float32 weights that `array` stands for once it is stored as `fitted` has it."""
    if spec is None or spec.mode != "affine":
        return rounded(array, spec, dtype)
    parts = [
        on_grid(*part).reshape(-1, array.shape[1]) for part in fitted_parts(array, spec, dtype)
    ]
    return mx.concatenate(parts)


@dataclass
class Codes:
    """An affine matrix: codes [rows, columns], scales and biases [rows, groups] in float32.

    The scales and biases are numbers that the storage type has. `before` are the codes before they
    were rounded, clipped to their range: where learning by gradient starts.
    """

    SIDES: ClassVar = ("codes", "scales", "biases", "before")
    spec: QuantSpec
    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    before: np.ndarray

    def weights(self) -> np.ndarray:
        """Return the float32 weights [rows, columns] that these stand for."""
        size = self.spec.group_size
        scales, biases = (np.repeat(a, size, axis=1) for a in (self.scales, self.biases))
        return self.codes * scales + biases

    def arrays(self, name: str, dtype: mx.Dtype) -> dict[str, mx.array]:
        """Return what is stored for the tensor `name`, as `layout` has it."""
        stem = name.removesuffix("weight")
        sides = {stem + "scales": self.scales, stem + "biases": self.biases}
        return {name: pack(self.codes, self.spec.bits)} | {
            key: mx.array(a).astype(dtype) for key, a in sides.items()
        }


def pack(codes: np.ndarray, bits: int) -> mx.array:
    """Return codes [rows, columns] as MLX packs them, uint32 [rows, columns * bits / 32]: one
    stream of bits, the lowest first.
    """
    parts = []
    for rows in in_parts(codes):  # a byte for every bit is eight times what is packed
        spread = (rows.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
        packed = np.packbits(spread.reshape(len(rows), -1), axis=-1, bitorder="little")
        parts.append(mx.array(packed.view("<u4").astype(np.uint32)))
    return mx.concatenate(parts)


def in_parts(matrix: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views on some rows at a time."""
    step = max(1, PART // matrix.shape[1])
    yield from (matrix[start : start + step] for start in range(0, len(matrix), step))


def error_feedback(
    weights: np.ndarray, factor: np.ndarray, spec: QuantSpec, dtype: mx.Dtype
) -> Codes:
    """Round `weights` [rows, columns] for the inputs of which `inverse_factor` made the factor.

    Rows do not depend on each other, so some are rounded at a time.
    """
    parts = [feed_back(rows, factor, spec, dtype) for rows in in_parts(weights)]
    if len(parts) == 1:
        return parts[0]
    sides = ([getattr(part, side) for part in parts] for side in Codes.SIDES)
    return Codes(spec, *map(np.concatenate, sides))


def feed_back(weights: np.ndarray, factor: np.ndarray, spec: QuantSpec, dtype: mx.Dtype) -> Codes:
    rows, columns = weights.shape
    size, top = spec.group_size, 2**spec.bits - 1
    work = np.array(weights, np.float32)
    scales, biases = (np.zeros((rows, columns // size), np.float32) for _ in range(2))
    codes, before = (np.zeros((rows, columns), kind) for kind in (np.uint8, np.float32))
    importance = (1.0 / np.diag(factor) ** 2).astype(np.float32)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = np.zeros((rows, end - start), np.float32)
        for column in range(start, end):
            group = column // size
            if column % size == 0:
                those = slice(column, column + size)
                values, weight = (
                    mx.array(a) for a in (work[:, None, those], importance[None, those])
                )
                grid = fit_groups(values, spec, dtype, weight, SHRINKS)
                scales[:, group], biases[:, group] = (np.array(side)[:, 0] for side in grid)
            scale, bias = scales[:, group], biases[:, group]
            place = np.clip((work[:, column] - bias) / np.where(scale == 0, 1.0, scale), 0, top)
            nearest = np.rint(place)
            before[:, column], codes[:, column] = place, nearest
            error = (work[:, column] - (nearest * scale + bias)) / factor[column, column]
            work[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return Codes(spec, codes, scales, biases, before)


def inverse_factor(moments: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """Return the upper factor U, in float32, of the inverse U^T U of the damped second moments
    [columns, columns] of a matrix's inputs.

    With rows and columns in reverse their lower Cholesky factor is made and inverted; in reverse
    again it is U. Two matrices in float64 are in memory. Raises `ConversionError` for moments that
    are not finite.
    """
    if not np.isfinite([moments.min(), moments.max()]).all():
        raise ConversionError(
            "calibration gave activations that are not finite; check the source with --verify"
        )
    damped = moments[::-1, ::-1].astype(np.float64)
    level = max(float(np.mean(np.diag(damped))), 1e-12)
    damped[np.diag_indices_from(damped)] += damping * level
    factor = mx.array(damped, dtype=mx.float64)
    del damped
    for step in (mx.linalg.cholesky, mx.linalg.tri_inv):
        factor = step(factor, stream=mx.cpu)  # a GPU has no float64
        mx.eval(factor)
    return np.array(factor)[::-1, ::-1].astype(np.float32)


@dataclass
class Learned:
    """The arrays to store for the tensors that calibration changed; all others are rounded to
    nearest, with scales in `dtype`.
    """

    plan: Plan
    dtype: str
    stored: dict[str, dict[str, mx.array]] = field(default_factory=dict)  # by tensor
    codes: dict[str, Codes] = field(default_factory=dict)  # by stem, if distillation goes on

    def weights(self, exact: Weights) -> LazyWeights:
        """Return the float32 weights that everything stored stands for."""

        def read(name: str) -> mx.array:
            spec = planned(self.plan, name)
            if name in self.stored:
                return dequantized(name, self.stored[name], spec)
            return rounded(exact[name], spec, DTYPES[self.dtype].mlx)

        return LazyWeights(exact, read)
