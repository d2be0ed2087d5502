"""Attention told how many slots are filled has the values of attention with a mask."""

from __future__ import annotations

import pytest
from metal_emulator import ORDERS, Emulator

from openelm_mlx.device import mx
from openelm_mlx.model.cache import Place
from openelm_mlx.model.cache_kinds import CacheKind, Quantized, Window
from openelm_mlx.model.kernels.attend import attend, fits
from openelm_mlx.model.kernels.kernel import running

ONLY = frozenset({"attend"})
UNITS = {mx.float32: 5, mx.float16: 1, mx.bfloat16: 1}  # OpenBLAS adds as the processor does best


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def assert_as_twin(
    start, shape, slots, dtype=mx.float32, length=None, orders=(0,), kv_heads=1
) -> None:
    """The kernel and the twin, over slots of which those behind the tokens are not a number."""
    rows, heads, asked, head_dim = shape
    place, length = Place(mx.array(start), CacheKind(), slots), length or asked
    q = normal(1, *shape, dtype=dtype)
    clean = normal(2, 2, rows, kv_heads, slots, head_dim, dtype=dtype)
    filled = place.positions(length).max(axis=1, keepdims=True) >= mx.arange(slots)
    poisoned = mx.where(filled[None, :, None, :, None], clean, mx.array(mx.nan, dtype))
    mx.eval(poisoned)
    mask = place.mask(length)[..., -asked:, :]
    wanted = attend(q, [clean], place, length, mask, 0.125).astype(mx.float32)
    emulator = Emulator(orders)
    with running(emulator, ONLY):
        found = attend(q, [poisoned], place, length, mask, 0.125)
    assert emulator.launches == 1 and found.dtype == dtype and found.shape == shape
    gap = mx.abs(found.astype(mx.float32) - wanted).max().item()
    assert gap <= UNITS[dtype] * mx.finfo(dtype).eps * max(1, mx.abs(wanted).max().item())


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("start", [0, 3, 4, 127, 128, 199])
def test_one_token(start, dtype):
    """At the borders of a SIMD group's keys, and of a round of all groups."""
    assert_as_twin([start], (1, 2, 1, 64), 200, dtype)


@pytest.mark.needs("emulated kernels")
def test_rows_of_their_own_lengths_and_several_tokens():
    assert_as_twin([5, 0, 130], (3, 4, 2, 32), 140, orders=ORDERS, kv_heads=2)
    assert_as_twin(
        [[7, 9, 2], [0, 1, 20]], (2, 2, 3, 96), 24
    )  # each token has a position of its own
    assert_as_twin([11], (1, 1, 17, 128), 40)
    assert_as_twin([30, 2], (2, 2, 1, 64), 64, length=9)  # the last of nine tokens only


def test_other_caches_types_and_passes_take_the_mask():
    q, buffer = mx.zeros((1, 4, 1, 64)), [mx.zeros((2, 1, 1, 256, 64))]
    place = Place(mx.array([3]), CacheKind(), 256)
    assert fits(q, buffer, place)
    assert not fits(q.astype(mx.bfloat16), buffer, place)
    assert not fits(mx.zeros((1, 4, 33, 64)), buffer, place)
    assert not fits(mx.zeros((1, 4, 1, 80)), buffer, place)
    assert not fits(mx.zeros((4096, 4, 16, 64)), buffer, place)  # more than a grid has
    assert not fits(q, buffer, Place(mx.array([3]), CacheKind(Quantized(8, 64)), 256))
    assert not fits(q, buffer, Place(mx.array([3]), CacheKind(layout=Window(20, 3)), 256))
