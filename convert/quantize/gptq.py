"""Rounding with error feedback (GPTQ: Frantar et al., arXiv:2210.17323), on grids fitted to the
activations.

Columns are rounded one after another; the error of each is passed on to the columns still to come,
so that the product with the inputs seen in calibration changes least. The grid of a group is fitted
when its first column's turn comes, to the weights as they then are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openelm_mlx.convert.quantize.grids import fit_groups, pack
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.quantization import QuantSpec

BLOCK = (
    128  # columns whose errors are gathered before they are passed on; every group size divides it
)
DAMPING = 0.01  # of the mean diagonal, added to all of it


@dataclass
class Codes:
    """A matrix in affine form: codes [rows, columns], scales and biases [rows, groups] float32 as
    stored.
    """

    form: QuantSpec
    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    before: (
        np.ndarray
    )  # the codes before rounding, clipped to their range: where learning by gradient starts

    def dense(self) -> np.ndarray:
        """The float32 weights [rows, columns] these stand for."""
        size = self.form.group_size
        return self.codes * np.repeat(self.scales, size, axis=1) + np.repeat(
            self.biases, size, axis=1
        )

    def arrays(self, name: str, dtype: mx.Dtype) -> dict[str, mx.array]:
        """What is stored for the tensor `name`, as `quantize.planned` promises it."""
        stem = name.removesuffix("weight")
        sides = {stem + "scales": self.scales, stem + "biases": self.biases}
        return {name: pack(self.codes, self.form.bits)} | {
            key: mx.array(a).astype(dtype) for key, a in sides.items()
        }


def error_feedback(
    weights: np.ndarray,
    hessian: np.ndarray,
    form: QuantSpec,
    dtype: mx.Dtype,
    damping: float = DAMPING,
) -> Codes:
    """Codes of `weights` [rows, columns] of small error in the inputs with second moments `hessian`
    [columns, columns].

    Raises `ConversionError` for moments that are not finite.
    """
    factor = inverse_factor(hessian, damping)
    rows, columns = weights.shape
    size, top = form.group_size, 2**form.bits - 1
    work = weights.astype(np.float32).copy()
    scales, biases = (np.zeros((rows, columns // size), np.float32) for _ in ("scales", "biases"))
    result = Codes(
        form,
        np.zeros((rows, columns), np.uint8),
        scales,
        biases,
        np.zeros((rows, columns), np.float32),
    )
    importance = (1.0 / np.diag(factor) ** 2).astype(np.float32)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = np.zeros((rows, end - start), np.float32)
        for column in range(start, end):
            group = column // size
            if column % size == 0:
                values = work[:, None, column : column + size]
                scale, bias = fit_groups(
                    values, importance[None, column : column + size], form, dtype
                )
                result.scales[:, group], result.biases[:, group] = scale[:, 0], bias[:, 0]
            scale, bias = result.scales[:, group], result.biases[:, group]
            place = np.clip((work[:, column] - bias) / np.where(scale == 0, 1.0, scale), 0, top)
            codes = np.rint(place)
            result.before[:, column], result.codes[:, column] = place, codes
            error = (work[:, column] - (codes * scale + bias)) / factor[column, column]
            work[:, column:end] -= error[:, None] * factor[column, column:end]
            errors[:, column - start] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    return result


def inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Upper Cholesky factor, float32, of the inverse of the damped second moments."""
    if not np.isfinite(hessian).all():
        raise ConversionError(
            "calibration gave activations that are not finite; check the source with --verify"
        )
    damped = hessian.astype(np.float64)
    level = max(float(np.mean(np.diag(damped))), 1e-12)
    damped[np.diag_indices_from(damped)] += damping * level
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
