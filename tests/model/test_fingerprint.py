"""The fingerprint of a model's weights is that of the same model in any type, and of no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from formats import TINY

from openelm_mlx.device import mx
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.fingerprint import PREFIX, fingerprint, same_base

CONFIG = replace(TINY, num_transformer_layers=4)
TYPES = (mx.float32, mx.float16, mx.bfloat16)


def tensors(seed: int = 0, shift: float = 0.0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(CONFIG).items()
    arrays = {
        name: mx.array(rng.normal(0, 0.2, shape).astype(np.float32)) for name, shape in shapes
    }
    return {name: array * (1 + shift) for name, array in arrays.items()}


def made(weights: dict[str, mx.array], dtype: mx.Dtype, quantized: bool = False) -> str:
    def rows(name: str) -> mx.array | None:
        array = weights[name].astype(dtype)
        return None if quantized and array.ndim == 2 else array

    return fingerprint(CONFIG, rows)


@pytest.mark.parametrize("one", TYPES)
@pytest.mark.parametrize("other", TYPES)
@pytest.mark.parametrize("quantized", [False, True])
def test_types_and_quantization_do_not_change_it(one, other, quantized):
    ours = made(tensors(), one)
    assert same_base(ours, made(tensors(), other, quantized))
    assert not same_base(ours, made(tensors(seed=1), other, quantized))
    assert not same_base(made(tensors(shift=0.01), one), made(tensors(), other, quantized))


def test_training_that_went_on_shows_where_types_allow_it():
    for dtype in TYPES[:2]:
        assert not same_base(made(tensors(), dtype), made(tensors(shift=1e-3), dtype))
    assert not same_base(made(tensors(), mx.float32), made(tensors(shift=1e-6), mx.float32))


def test_rows_that_pad_the_vocabulary_and_a_head_of_its_own_do_not_count():
    weights = tensors()
    padded = replace(CONFIG, vocab_size=80, share_input_output_layers=False)
    assert made(weights, mx.float32) == fingerprint(padded, weights.get)


def test_what_is_not_a_fingerprint():
    ours = made(tensors(), mx.float32)
    assert not same_base(ours, ours[: len(PREFIX) + 16])
    for text in ("", PREFIX, "sha256:00", PREFIX + "*", PREFIX + "AAA=", "openelm-2:AAAAAA=="):
        with pytest.raises(ValueError, match="not a fingerprint of this version"):
            same_base(ours, text)
