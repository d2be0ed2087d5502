"""The kernel that norms, rotates and stores in place has the values of the operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
from metal_emulator import ORDERS, Emulator

from openelm_mlx.device import mx
from openelm_mlx.model.cache import Place
from openelm_mlx.model.cache_kinds import CacheKind, Growing, Plain, Quantized, Window
from openelm_mlx.model.heads import VALUE, Projection, rotary
from openelm_mlx.model.kernels.kernel import running
from openelm_mlx.model.kernels.norm_rope_store import check, fits, store_heads

ONLY = frozenset({"norm_rope_store"})
F16, BF16, F32 = mx.float16, mx.bfloat16, mx.float32
needs_compiler = pytest.mark.needs("emulated kernels")


def normal(seed: int, *shape: int, dtype: mx.Dtype = F32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def projection(
    place: Place, shape: tuple[int, int, int, int], dtype: mx.Dtype, last: bool, norm: bool = True
) -> Projection:
    """The projection of rows and tokens to heads, [B, L, q + 2 kv, D], of 2 key heads."""
    B, L, heads, D = shape
    norms = (1 + 0.3 * normal(1, D, dtype=dtype), 1 + 0.3 * normal(2, D, dtype=dtype))
    q, k = (w.astype(F32) if norm else mx.ones(D) for w in norms)
    table = mx.stack([q] * (heads - 4) + [k] * 2 + [mx.full(D, VALUE)] * 2).reshape(heads, 2, -1)
    rotation = rotary(place.positions(L), D, 10000.0)
    eps, norms = (1e-6, norms) if norm else (None, None)
    raw = normal(3, *shape, dtype=dtype)
    return Projection(raw, table + 1j * table[:, ::-1], rotation, heads - 4, eps, norms, last)


def both(kind: CacheKind, start: mx.array, one: Projection, slots: int):
    """Queries and arrays of the twin, and of the kernel, which has written to the old arrays."""
    B, _, _, D = one.raw.shape
    place = Place(start, kind, slots)
    old = kind.store.pack(normal(4, 2, B, 2, slots, D, dtype=one.raw.dtype))
    given = [mx.concatenate(mx.split(array, 2)) for array in old]
    mx.eval(given)
    wanted = store_heads(one, old, place)
    emulator = Emulator(ORDERS)
    with running(emulator, ONLY):
        q, found = store_heads(one, given, place)
    assert emulator.launches == 1
    assert all(mx.array_equal(a, b) for a, b in zip(found, given, strict=True))
    return (wanted[0], *wanted[1]), (q, *found)


def assert_equal(wanted, found, dtype: mx.Dtype) -> None:
    for a, b in zip(wanted, found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if dtype == BF16 or a.dtype == mx.uint32:
            assert mx.array_equal(a, b)
            continue
        unit = mx.finfo(dtype).eps * (1 if dtype == F16 else 8)
        a, b = a.astype(F32), b.astype(F32)
        assert (mx.abs(a - b) / mx.maximum(mx.abs(a), 1)).max().item() <= unit


GROWING, WINDOW = Growing(), Window(20, 3)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_one_token_of_one_row(dtype, head_dim):
    start = mx.array([5])
    place = Place(start, CacheKind(), 9)
    one = projection(place, (1, 1, 6, head_dim), dtype, last=True)
    assert_equal(*both(CacheKind(), start, one, 9), dtype)


def test_pairs_of_one_type_fit():
    raw, buffer = mx.zeros((1, 1, 5, 64)), mx.zeros((2, 1, 1, 256, 64))
    assert fits(raw, [buffer])
    assert not fits(raw, [buffer.astype(BF16)])
    assert not fits(raw.astype(mx.int32), [buffer.astype(mx.int32)])
    assert not fits(mx.zeros((1, 1, 5, 63)), [buffer])
    assert not fits(mx.zeros((4096, 16, 5, 64)), [buffer])  # more than a grid has
    assert not fits(mx.zeros((1, 1, 5, 264)), [buffer])
    assert not fits(mx.zeros((1, 1, 5, 2)), [mx.zeros((2, 1, 1, 1, 2))])


KINDS = {
    "plain": CacheKind(),
    "window": CacheKind(Plain(), WINDOW),
    "8 bits": CacheKind(Quantized(8, 64)),
    "4 bits": CacheKind(Quantized(4, 32)),
    "window, 5 bits": CacheKind(Quantized(5, 32), WINDOW),
}


@needs_compiler
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["rows", "places"])
def test_tokens_of_rows(kind, last, each):
    """Three rows of four tokens at positions of their own, at the window's borders too."""
    start = mx.array([0, 2, 33 + 17])
    if each:
        start = start[:, None] + mx.array([0, 1, 2, 3])
    slots = kind.layout.slots_for(54, 8)
    one = projection(Place(start, kind, slots), (3, 4, 7, 64), BF16, last)
    assert_equal(*both(kind, start, one, slots), BF16)


@needs_compiler
def test_the_check_of_first_use_tells_a_kernel_that_rotates_or_packs_wrongly():
    emulator = Emulator()

    def with_source(old, new):
        def run(kernel, inputs, launch):
            source = kernel.source.replace(old, new)
            return emulator(replace(kernel, source=source), inputs, launch)

        with running(run, ONLY):
            return check()

    assert with_source("", "") == ""
    assert "output 0 differs" in with_source("u * c - v * s", "u * c + v * s")
    assert "output 1 differs" in with_source("/ kv_heads * rows", "/ kv_heads * 1")
    assert with_source("bits << shift", "bits >> shift").startswith("Quantized(bits=8")
