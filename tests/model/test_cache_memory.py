"""The memory of a cache: buffers that grow in blocks and are updated in place."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kept import KINDS, TOKENS, close, prefilled, reference
from small import random_engine, random_model

from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.engine.rows import Rows
from openelm_mlx.errors import CacheError
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import CacheKind, Growing, Quantized, Window
from openelm_mlx.model.config import layer_shapes


@pytest.fixture(scope="module")
def model():
    return random_model(seed=1)


def test_bytes_per_token_are_those_of_the_arrays(model):
    for kind in KINDS.values():
        cache = prefilled(model, kind, TOKENS)
        assert kind.bytes_per_token(model.args, itemsize=4) == cache.nbytes / cache.capacity


def test_room_comes_and_goes_in_blocks(model):
    """Blocks of 256 slots for one row, quarters of a power of two for several; nothing held is
    lost.
    """
    rows = Rows(model.args, CacheKind())
    rows.place(0, prefilled(model, CacheKind(), TOKENS[:40]))
    seen = []
    for end in (41, 256, 257, 300, 255, 600, 400, 41):
        rows.restore(rows.lend([end]))
        seen.append(rows.capacity)
    assert seen == [256, 256, 512, 512, 256, 768, 768, 256]
    rows.resize([0], 2)
    seen = []
    for end in (41, 65, 128, 129, 97, 96, 64):
        rows.restore(rows.lend([end, 5]))
        seen.append(rows.capacity)
    assert seen == [
        64,
        128,
        128,
        192,
        192,
        192,
        64,
    ] and rows.nbytes == 64 * 2 * CacheKind().bytes_per_token(model.args, 4)
    cache = rows.extract(0, 40)
    assert (
        cache.capacity == 40 and rows.extract(1, 6).arrays == [] and rows.extract(1, 5).offset == 5
    )
    assert close(
        CacheKind(),
        model(mx.array([TOKENS[40:60]]), cache),
        reference(model, CacheKind())[:, 40:60],
    )
    rows.restore(rows.lend([300, 0]))
    assert rows.capacity == 384
    rows.resize([0], 1)
    rows.restore(rows.lend([200]))
    assert rows.capacity == 256
    window = Rows(model.args, KINDS["window"])
    window.place(0, prefilled(model, KINDS["window"], TOKENS[:40]))
    window.restore(window.lend([1000]))
    assert window.capacity == KINDS["window"].layout.capacity


def test_a_single_row_takes_over_a_cache_and_gives_it_back_without_a_copy(model):
    cache = prefilled(model, CacheKind(), TOKENS[:40])
    mx.eval(cache.arrays)
    nbytes, before = cache.nbytes, mx.get_active_memory()
    rows = Rows(model.args, CacheKind())
    rows.place(0, cache)
    assert cache.arrays == [] and cache.offset == 0
    mx.eval(rows.buffers)
    assert rows.nbytes == nbytes and mx.get_active_memory() == before
    arrays = rows.buffers
    assert rows.extract(0, 40).arrays is arrays and rows.extract(0, 40).offset == 0


def test_a_copy_does_not_hold_on_to_the_whole(model):
    cache = prefilled(model, CacheKind(), TOKENS * 4)
    rows = Rows(model.args, CacheKind())
    rows.resize([], 2)
    rows.place(0, cache)
    mx.eval(cache.arrays, rows.buffers)
    before = mx.get_active_memory()
    prefix, row = cache.prefix(10), rows.extract(0, 20)
    freed = cache.nbytes + rows.nbytes - prefix.nbytes - row.nbytes
    cache.clear()
    rows.resize([], 1)
    assert mx.get_active_memory() < before - freed + 2**14 and prefix.nbytes * 2 == row.nbytes


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("compiled", [True, False])
def test_steps_update_the_buffers_in_place(model, count, compiled):
    """Unused room costs no memory while rows are stepped: a copy of one layer's buffer would be
    half of it.
    """
    grown, nbytes = [], 0

    def step(token, position, buffers):
        caches = step_caches(buffers, position, CacheKind())
        token = mx.argmax(model.logits(model.hidden(token, caches, last=True)), axis=-1)
        return token, position + 1, [cache.arrays for cache in caches]

    run = mx.compile(step) if compiled else step
    for room in (256, 8192):
        rows = Rows(model.args, CacheKind())
        rows.resize([], count)
        for row in range(count):
            rows.place(row, prefilled(model, CacheKind(), TOKENS[: 10 + row]))
        rows.restore(rows.lend([room] * count))
        mx.eval(rows.buffers)
        nbytes, token, position = rows.nbytes, mx.array([5] * count), mx.arange(10, 10 + count)
        for number in range(20):
            if number == 10:
                held = mx.get_active_memory()
                mx.reset_peak_memory()
            buffers = rows.lend([room] * count)
            token, position, buffers = run(token, position, buffers)
            rows.restore(buffers)
            del buffers
            mx.eval(token)
        grown.append(mx.get_peak_memory() - held)
    assert grown[1] < grown[0] + nbytes / 10


def test_mistakes(model):
    with pytest.raises(
        CacheError, match="an empty cache cannot be enlarged before its first tokens; prefill first"
    ):
        KVCache(model.args).reserve(3)
    with pytest.raises(
        CacheError, match="the cache has 2 entries for a model of 3 layers; make one for this model"
    ):
        random_model(seed=1, layers=3)(mx.array([[1]]), KVCache(model.args))


def test_the_layout_of_arrays(model):
    for kind in KINDS.values():
        cache = prefilled(model, kind, TOKENS[:9])
        for arrays, shape in zip(cache.arrays, layer_shapes(model.args), strict=True):
            assert {array.shape[:4] for array in arrays} == {(2, 1, shape.kv_heads, cache.capacity)}


def test_kinds_that_options_ask_for(model):
    def kind(**settings):
        return CacheKind.of(model.args, EngineOptions(**settings))

    assert kind() == CacheKind() and kind(kv_bits=8).store == Quantized(8, 32)
    layouts = [kind(kv_window=size, kv_bits=8).layout for size in (511, 512, 10**9)]
    assert layouts == [
        Window(511, 4),
        Growing(),
        Growing(),
    ]  # a window that no context fills is none
    assert kind(kv_window=20, kv_keep=0).layout == Window(20, 0)
    with pytest.raises(
        CacheError, match="kv_bits 4 needs heads of a multiple of 32; this model's have 16"
    ):
        CacheKind.of(replace(model.args, head_dim=16), EngineOptions(kv_bits=4))


def test_loss_of_a_kind(tiny):
    from kv_loss import kv_loss

    engine = random_engine(tiny, seed=1)
    losses = [
        kv_loss(engine, [TOKENS], kind, prompt=30)
        for kind in (KINDS["plain"], KINDS["8 bits"], KINDS["4 bits"])
    ]
    plain, eight, four = (loss.mean_kl_divergence for loss in losses)
    assert plain == 0.0 and losses[0].top_1_agreement == 1.0 and 0 < eight < four
