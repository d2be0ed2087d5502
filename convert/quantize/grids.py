"""Grids of affine groups, fitted to the weights: value = scale * code + bias.

MLX takes a grid that meets zero and the larger end of a group. One that is fitted by least squares
lowers the squared error by a tenth at 8 bits and by a third at 2, and is stored in as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from openelm_mlx.device import mx
from openelm_mlx.quantization import QuantSpec

SHRINKS = tuple(1 - n / 50 for n in range(26))  # of a group's range: cut ends, a finer grid
FEW_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.75, 0.65)  # nearly as good
WIDE_BITS = 6  # from which on no cut of the range pays
REFITS = 3  # alternations of rounding and least squares
PART = 1 << 20  # weights that are fitted at a time
TRIED = 1 << 18  # weights, as often as ranges are tried for them at once

Grid = tuple[mx.array, mx.array]  # scales and biases [rows, groups]


def fitted_parts(
    array: mx.array, spec: QuantSpec, dtype: mx.Dtype
) -> Iterator[tuple[mx.array, Grid]]:
    """Yield codes [rows, groups, group_size] and grid of some rows of a matrix at a time."""
    rows, columns = array.shape
    step = max(1, PART // columns)
    for start in range(0, rows, step):
        values = array[start : start + step].astype(mx.float32)
        values = values.reshape(len(values), -1, spec.group_size)
        grid = fit_groups(values, spec, dtype)
        codes = codes_of(values, grid, 2**spec.bits - 1)
        mx.eval(codes)
        yield codes, grid


def fit_groups(
    values: mx.array,
    spec: QuantSpec,
    dtype: mx.Dtype,
    importance: mx.array | None = None,
    shrinks: Sequence[float] | None = None,
) -> Grid:
    """Return scale and bias [rows, groups] in float32, as stored in `dtype`, of least weighted
    square error for values [rows, groups, group_size].

    `importance` [groups, group_size] weighs the columns, None all alike. Ranges from the full one
    down are tried, each with scale and bias refitted by weighted least squares to the codes they
    give; the best of each group is kept, or MLX's own grid if no fit is better.
    """
    top = 2**spec.bits - 1
    if shrinks is None:
        shrinks = FEW_SHRINKS if spec.bits < WIDE_BITS else FEW_SHRINKS[:1]
    share = None if importance is None else importance / importance.sum(axis=-1, keepdims=True)

    def mean(x: mx.array) -> mx.array:
        return x.mean(axis=-1) if share is None else (share * x).sum(axis=-1)

    def error(grid: Grid) -> mx.array:
        return mean(mx.square(on_grid(codes_of(values, grid, top), grid) - values))

    low, high, middle = values.min(axis=-1), values.max(axis=-1), mean(values)
    best = grid_of_mlx(values, spec, dtype)
    least = error(best)
    together = max(1, TRIED // values.size)
    for start in range(0, len(shrinks), together):
        ratios = mx.array([shrink / top for shrink in shrinks[start : start + together]])
        scale = mx.maximum((high - low) * ratios[:, None, None], 1e-8)  # [tried, rows, groups]
        bias = (low + high) / 2 - scale * (top / 2)
        for _ in range(REFITS):
            codes = codes_of(values, (scale, bias), top)
            centre = mean(codes)
            spread = mean(mx.square(codes)) - mx.square(centre)
            joint = mean(codes * values) - centre * middle
            fits = (spread > 1e-6) & (joint > 0)
            scale = mx.where(fits, joint / mx.where(fits, spread, 1.0), scale)
            bias = mx.where(fits, middle - scale * centre, bias)
        tried = as_stored(scale, dtype), as_stored(bias, dtype)
        errors = error(tried)
        first = mx.argmin(errors, axis=0, keepdims=True)
        found, *grid = (mx.take_along_axis(x, first, axis=0)[0] for x in (errors, *tried))
        better = found < least
        least = mx.where(better, found, least)
        best = mx.where(better, grid[0], best[0]), mx.where(better, grid[1], best[1])
        mx.eval(least, best)
    return best


def grid_of_mlx(values: mx.array, spec: QuantSpec, dtype: mx.Dtype) -> Grid:
    rows = values.reshape(len(values), -1).astype(dtype)
    _, scale, bias = mx.quantize(rows, **spec.as_config())
    return scale.astype(mx.float32), bias.astype(mx.float32)


def codes_of(values: mx.array, grid: Grid, top: int) -> mx.array:
    """Return the codes from 0 to `top`, in float32, of values [rows, groups, group_size]."""
    scale, bias = (side[..., None] for side in grid)
    return mx.clip(mx.round((values - bias) / mx.where(scale == 0, 1.0, scale)), 0, top)


def on_grid(codes: mx.array, grid: Grid) -> mx.array:
    """Return the values that codes [rows, groups, group_size] stand for."""
    scale, bias = (side[..., None] for side in grid)
    return codes * scale + bias


def as_stored(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return the float32 numbers that stand in a file once the array is stored in this type."""
    return array.astype(dtype).astype(mx.float32)
