"""Adapters applied at run time: the same logits as those of the merged model."""

from __future__ import annotations

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.model.adapters import LowRank


def test_merging_follows_the_formulas_of_lora_and_dora():
    draw = np.random.default_rng(0).standard_normal
    weight, a, b, lengths = draw((6, 4)), draw((2, 4)), draw((6, 2)), draw(6)
    sum_ = weight + 0.5 * b @ a
    dora = sum_ * (lengths / np.sqrt((sum_**2).sum(axis=1)))[:, None]
    arrays = [mx.array(part.astype(np.float32)) for part in (weight, a, b, lengths)]
    lora = LowRank(arrays[1], arrays[2], 0.5)
    assert lora.rank == 2
    assert np.allclose(lora.merged(arrays[0]), sum_, atol=1e-5)
    with_lengths = LowRank(arrays[1], arrays[2], 0.5, arrays[3])
    assert np.allclose(with_lengths.merged(arrays[0]), dora, atol=1e-5)
