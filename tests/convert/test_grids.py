"""Fitted grids: never worse than MLX's own, and stored as they were fitted."""

from __future__ import annotations

import numpy as np
import pytest

from openelm_mlx.convert.quantize.grids import SHRINKS, fit_groups
from openelm_mlx.convert.quantize.rounding import fitted, fitted_weights, rounded
from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.quantization import QuantSpec

SPECS = [QuantSpec(2, 32), QuantSpec(3, 64), QuantSpec(4, 128), QuantSpec(8, 64)]


def gaussian(rows, columns, seed=0):
    return mx.random.normal((rows, columns), key=mx.random.key(seed))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_group_is_farther_from_the_weights_than_on_mlx_grids(spec, dtype):
    weights = gaussian(32, 256)

    def errors(other):
        return mx.square(other - weights).reshape(32, -1, spec.group_size).sum(axis=-1)

    ours = errors(fitted_weights(weights, spec, dtype))
    theirs = errors(rounded(weights, spec, dtype))
    # MLX rounds to codes in the type of the weights: on its grid ours are at least as near
    assert mx.all(ours <= theirs * 1.0001)
    assert ours.sum().item() < {2: 0.75, 3: 0.85, 4: 0.9, 8: 0.97}[spec.bits] * theirs.sum().item()


@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_a_fitted_grid_is_better_than_any_mere_cut_of_the_range(spec):
    groups = np.array(gaussian(16, 256)).reshape(16, -1, spec.group_size)
    importance = np.random.default_rng(1).uniform(0.1, 4, groups.shape[1:]).astype(np.float32)
    top, (low, high) = 2**spec.bits - 1, (groups.min(-1), groups.max(-1))

    def errors(scale, bias):
        codes = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, top)
        return (importance * (codes * scale[..., None] + bias[..., None] - groups) ** 2).sum(-1)

    cuts = [
        errors((high - low) * part / top, (low + high) / 2 - (high - low) * part / 2)
        for part in np.linspace(0.5, 1, 51)
    ]
    given = mx.array(groups), spec, mx.float16, mx.array(importance)
    few, many = (
        errors(*map(np.array, fit_groups(*given, shrinks))).mean() for shrinks in (None, SHRINKS)
    )
    assert many < few < 1.02 * many and many < 0.97 * np.min(cuts, axis=0).mean()


@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(4, 32, "mxfp4"), None], ids=str)
def test_what_is_stored_stands_for_the_fitted_weights(spec):
    weights = gaussian(9000, 128)  # more than are fitted at a time
    stored = dequantized("a.weight", fitted("a.weight", weights, spec, mx.bfloat16), spec)
    assert mx.abs(stored - fitted_weights(weights, spec, mx.bfloat16)).max().item() < 1e-6
    last = fitted_weights(weights[-7:], spec, mx.bfloat16)  # no row depends on another
    assert mx.abs(stored[-7:] - last).max().item() < 1e-6


def test_groups_of_one_value_keep_it():
    for spec in SPECS:
        flat = mx.full((2, 128), 0.3)
        assert mx.abs(fitted_weights(flat, spec, mx.float16) - flat).max().item() < 1e-4
        assert mx.abs(fitted_weights(0 * flat, spec, mx.float16)).max().item() < 1e-6
