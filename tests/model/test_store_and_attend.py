"""Heads stored and attended to by one kernel have the values of the operations, in all types."""

from __future__ import annotations

import pytest
from metal_emulator import ORDERS, Emulator

from openelm_mlx.device import mx
from openelm_mlx.model.cache import Place
from openelm_mlx.model.cache_kinds import CacheKind, Quantized, Window
from openelm_mlx.model.heads import Projection, head_table, rotary
from openelm_mlx.model.kernels.kernel import running
from openelm_mlx.model.kernels.store_and_attend import MOST_SLOTS, fits, store_and_attend

ONLY = frozenset({"store_and_attend"})
APART = frozenset({"norm_rope_store", "attend"})
BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
UNITS = {F32: 8, F16: 2, BF16: 2}


def normal(seed: int, *shape: int, dtype: mx.Dtype = F32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def step(
    heads: tuple[int, int, int],
    starts: list[int],
    slots: int,
    dtype: mx.Dtype,
    norm: bool = True,
    size: float = 1.0,
) -> tuple[Projection, mx.array, Place]:
    """A token of each row; what lies behind it in the buffer is not a number. `size` is that of
    the values.
    """
    q_heads, kv_heads, width = heads
    rows, place = len(starts), Place(mx.array(starts), CacheKind(), slots)
    norms = tuple(1 + 0.3 * normal(seed, width, dtype=dtype) for seed in (1, 2)) if norm else None
    table = head_table(norms or (None, None), *heads)
    raw = (size * normal(3, rows, 1, q_heads + 2 * kv_heads, width)).astype(dtype)
    eps, rotation = 1e-6 if norm else None, rotary(place.positions(1), width, 10000.0)
    one = Projection(raw, table, rotation, q_heads, eps, norms, last=True)
    filled = (mx.arange(slots) < mx.array(starts)[:, None])[None, :, None, :, None]
    buffer = normal(4, 2, rows, kv_heads, slots, width, dtype=dtype)
    buffer = mx.where(filled, buffer, mx.array(mx.nan, dtype))
    mx.eval(buffer)
    return one, buffer, place


def assert_as_twin(*how, orders=(0,), **more) -> None:
    """The kernel writes what the twin writes, and attends as it does, or as two kernels do."""
    one, buffer, place = step(*how, **more)
    dtype = buffer.dtype
    old = mx.where(mx.isnan(buffer), 0, buffer)  # the twin masks, so that it needs numbers
    wanted, (kept,) = store_and_attend(one, [old], place, place.mask(1), 0.125)
    outputs = []
    for names, launches in ((ONLY, 1), (APART, 2)):
        given, emulator = mx.array(buffer), Emulator(orders)
        mx.eval(given)
        with running(emulator, names):
            out, (stored,) = store_and_attend(one, [given], place, None, 0.125)
            mx.eval(out, stored)
        assert emulator.launches == launches and mx.array_equal(stored, given, equal_nan=True)
        outputs.append((out, stored))
    (out, stored), (two, also) = outputs
    assert out.shape == wanted.shape and out.dtype == dtype
    assert mx.array_equal(stored, also, equal_nan=True)
    written = mx.where(mx.isnan(stored), 0, stored)
    gaps = [(out, wanted), (out, two), (written, kept)]
    for a, b in gaps:
        gap = mx.abs(a.astype(F32) - b.astype(F32)).max().item()
        assert gap <= UNITS[dtype] * mx.finfo(dtype).eps * max(1, mx.abs(b).max().item())


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("start", [0, 1, 4, 128, 199])
def test_one_token_after_few_and_many(start, dtype):
    """At the borders of a SIMD group's keys, and of a round of all groups."""
    assert_as_twin((2, 1, 64), [start], 200, dtype)


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("width", [32, 96, 128])
def test_rows_of_their_own_lengths_in_any_order(width):
    assert_as_twin((4, 2, width), [5, 0, 33], 40, F32, orders=ORDERS)
    assert_as_twin((3, 3, width), [7], 8, BF16, norm=False)
    assert_as_twin((1, 1, width), [7], 8, F32, size=1e-3)  # which shows whether eps is added


def test_other_caches_types_and_passes_take_more_kernels():
    one, buffer, place = step((2, 1, 64), [3], 256, F32)
    assert fits(one.raw, [buffer], place)
    assert not fits(one.raw.astype(BF16), [buffer], place)
    assert not fits(mx.zeros((1, 2, 4, 64)), [buffer], place)  # two tokens of a row
    assert not fits(mx.zeros((1, 1, 4, 80)), [buffer], place)
    assert fits(one.raw, [mx.zeros((2, 1, 1, MOST_SLOTS, 64))], place)
    assert not fits(one.raw, [mx.zeros((2, 1, 1, MOST_SLOTS + 256, 64))], place)
    for kind in (CacheKind(Quantized(8, 64)), CacheKind(layout=Window(20, 3))):
        assert not fits(one.raw, [buffer], Place(mx.array([3]), kind, 256))
