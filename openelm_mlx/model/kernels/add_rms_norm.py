"""A sum and its norm, by one kernel: a residual, what a projection adds to it, and the next norm.

A plain matrix has the residual in its own kernel (`project_onto`). A quantized product has not: its
sum waits for the norm that reads it, which is once after attention and once after the feed-forward
network. Not measured on a Mac; docs/performance.md counts what it saves.
"""

from __future__ import annotations

from typing import NamedTuple

from openelm_mlx.device import mx, nn
from openelm_mlx.model.kernels.kernel import (
    MOST_ROWS,
    SIMD,
    TYPES,
    Kernel,
    in_use,
    scalar,
    twins,
)
from openelm_mlx.model.kernels.self_check import difference, noise

EACH = 4  # elements a thread, as MLX's norm has
MOST_THREADS = 1024  # of a threadgroup

# One threadgroup a row. The sum is rounded to T, as that of a kernel of its own would be.
ADD_RMS_NORM = Kernel(
    "add_rms_norm",
    ("x", "added", "weight", "eps"),
    ("sum", "normed"),
    """
    uint row = threadgroup_position_in_grid.y;
    uint first = thread_position_in_threadgroup.x * EACH;
    threadgroup float parts[32];
    threadgroup float scale[1];
    float mine[EACH];
    float squares = 0;
    for (int i = 0; i < EACH; i++) {
        mine[i] = 0;
        if (first + i < uint(D)) {
            uint at = row * uint(D) + first + i;
            T rounded = T(float(x[at]) + float(added[at]));
            sum[at] = rounded;
            mine[i] = float(rounded);
            squares += mine[i] * mine[i];
        }
    }
    squares = simd_sum(squares);
    if (simdgroup_index_in_threadgroup == 0) parts[thread_index_in_simdgroup] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = squares;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
        float total = simd_sum(parts[thread_index_in_simdgroup]);
        if (thread_index_in_simdgroup == 0) {
            scale[0] = metal::precise::rsqrt(total / float(D) + eps);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = 0; i < EACH; i++) {
        if (first + i < uint(D)) {
            float rounded = float(T(mine[i] * scale[0]));
            normed[row * uint(D) + first + i] = T(float(weight[first + i]) * rounded);
        }
    }
    """,
)


class Sum(NamedTuple):
    """A residual [rows, model_dim] and what is yet to be added to it; None if nothing is."""

    residual: mx.array
    added: mx.array | None = None

    def rows(self, numbers: mx.array) -> Sum:
        """Return these rows of the sum."""
        added = None if self.added is None else self.added[numbers]
        return Sum(self.residual[numbers], added)


def sum_and_norm(x: Sum, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
    """Return the sum, and norm(sum), both [rows, model_dim]."""
    residual, added = x
    if added is None:
        return residual, norm(residual)
    if in_use(ADD_RMS_NORM) and type(norm) is nn.RMSNorm and fits(residual, added, norm.weight):
        return by_kernel(residual, added, norm)
    total = residual + added
    return total, norm(total)


def fits(residual: mx.array, added: mx.array, weight: mx.array) -> bool:
    """Return whether the kernel can run: one type, and rows that threadgroups and grids can hold.

    It pays for every number of rows: a launch less, and the sum is not read again.
    """
    rows, width = residual.shape
    one_type = residual.dtype == added.dtype == weight.dtype and weight.dtype in TYPES
    small = width <= EACH * MOST_THREADS and rows <= MOST_ROWS
    return one_type and small and added.shape == residual.shape


def by_kernel(residual: mx.array, added: mx.array, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
    rows, width = residual.shape
    threads = -(-width // (EACH * SIMD)) * SIMD
    total, normed = ADD_RMS_NORM(
        residual,
        added,
        norm.weight,
        scalar(norm.eps),
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        shapes=[residual.shape] * 2,
        dtypes=[residual.dtype] * 2,
        template=(("T", residual.dtype), ("D", width), ("EACH", EACH)),
    )
    return total, normed


def check() -> str:
    """Return how the kernel differs from its twin on two rows with a tail, "" if it does not."""
    for dtype in TYPES:
        norm = nn.RMSNorm(1286, eps=1e-6)
        norm.weight = noise(1, (1286,), dtype)
        x = Sum(noise(2, (2, 1286), dtype), noise(3, (2, 1286), dtype))
        mine = sum_and_norm(x, norm)
        with twins():
            twin = sum_and_norm(x, norm)
        if text := difference(mine, twin):
            return f"{dtype}: {text}"
    return ""
