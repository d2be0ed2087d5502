"""Keys and values kept, of one sequence and of rows: the same logits as one pass over the whole
text without a cache.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from small import random_engine, random_model

from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.engine.rows import Rows
from openelm_mlx.errors import CacheError
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import SLACK, CacheKind, Growing, Plain, Quantized, Window
from openelm_mlx.model.config import layer_shapes

KINDS = {
    "plain": CacheKind(),
    "8 bits": CacheKind(Quantized(8, 32)),
    "4 bits": CacheKind(Quantized(4, 32)),
    "window": CacheKind(Plain(), Window(20, 3)),
    "window, 8 bits": CacheKind(Quantized(8, 32), Window(20, 3)),
}
TOKENS = [1] + [(7 * i * i + 3 * i) % 64 for i in range(99)]
OTHERS = [1] + [(5 * i * i + 11 * i) % 64 for i in range(99)]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def model():
    return random_model(seed=1)


def reference(model, kind, tokens=TOKENS):
    """The same attention without any cache: one pass, every token's keys and values packed and
    unpacked, and a mask.
    """

    class Whole:
        def positions(self, length):
            return mx.arange(length)[None]

        def mask(self, length):
            p, h = mx.arange(length)[:, None], mx.arange(length)[None]
            seen = h <= p
            if isinstance(kind.layout, Window):
                seen &= (h < kind.layout.keep) | (h > p - (kind.layout.size - kind.layout.keep))
            return seen

        def attend(self, projection, mask, scale):
            q, kv = projection.heads()
            if isinstance(kind.store, Quantized):
                form = {"group_size": kind.store.group_size, "bits": kind.store.bits}
                kv = mx.dequantize(*mx.quantize(kv, **form), **form)
            return mx.fast.scaled_dot_product_attention(q, kv[0], kv[1], scale=scale, mask=mask)

    return model(mx.array([tokens]), [Whole() for _ in model.layers])


def close(kind, logits, wanted):
    """Equal to rounding; where values are packed, one that lies between two steps may round either
    way.
    """
    distance = mx.abs(logits - wanted)
    mean, most = (1e-4, 1e-4) if isinstance(kind.store, Plain) else (1e-3, 0.1)
    return distance.mean().item() < mean and distance.max().item() < most


def prefilled(model, kind, tokens):
    cache = KVCache(model.args, kind)
    model.hidden(mx.array([tokens]), cache, last=True)
    return cache


def fed(model, buffers, kind, start, tokens):
    """Logits of a step over these tokens [B, L], and the buffers after it."""
    caches = step_caches(buffers, start, kind)
    return model(tokens, caches), [cache.arrays for cache in caches]


@each_kind
def test_chunks_and_steps_equal_one_masked_pass(model, kind):
    """100 tokens through a ring of 17 + 32 slots: in chunks of any size, then token by token, then
    several at once.
    """
    wanted = reference(model, kind)
    for chunk in (1, 7, 64, 100):
        cache = KVCache(model.args, kind)
        parts = [
            model(mx.array([TOKENS[i : i + chunk]]), cache) for i in range(0, len(TOKENS), chunk)
        ]
        assert close(kind, mx.concatenate(parts, axis=1), wanted) and cache.offset == len(TOKENS)
    cache = prefilled(model, kind, TOKENS[:60])
    assert close(
        kind,
        model.logits(model.hidden(mx.array([TOKENS[60:]]), cache.layers, last=True)),
        wanted[:, -1],
    )
    cache = prefilled(model, kind, TOKENS[:10])
    cache.reserve(len(TOKENS))
    arrays, position = cache.arrays, 10
    for length in [1] * 60 + [5] * 6:
        logits, arrays = fed(
            model,
            arrays,
            kind,
            mx.array([position]),
            mx.array([TOKENS[position : position + length]]),
        )
        assert close(kind, logits, wanted[:, position : position + length])
        position += length


@each_kind
def test_several_sequences_of_equal_length_equal_each_alone(model, kind):
    cache = KVCache(model.args, kind)
    both = mx.array([TOKENS[:60], OTHERS[:60]])
    parts = [model(both[:, i : i + 13], cache) for i in range(0, 60, 13)]
    for row, tokens in enumerate((TOKENS, OTHERS)):
        wanted = reference(model, kind, tokens[:70])
        assert close(kind, mx.concatenate(parts, axis=1)[row], wanted[0, :60])
        alone = cache.row(row, 60)
        assert close(kind, model(mx.array([tokens[60:70]]), alone), wanted[:, 60:])
    assert cache.offset == 60


@each_kind
def test_rows_of_any_length_equal_each_alone(model, kind):
    """Rows come, go and move; a step feeds one token, or a draft of up to 17, of which each row
    keeps some.
    """
    rows, texts = Rows(model.args, kind), {0: (TOKENS, 70), 2: (OTHERS, 7), 3: (TOKENS[3:], 21)}
    rows.resize([], 4)
    for row, (tokens, length) in texts.items():
        rows.place(row, prefilled(model, kind, tokens[:length]))
    wanted = {row: reference(model, kind, tokens) for row, (tokens, _) in texts.items()}
    position = {row: length for row, (_, length) in texts.items()}

    def step(length, drafts):
        """Feed `length` tokens of each text, or in place of the last ones as many that are
        wrong.
        """
        starts = [position.get(row, 0) for row in range(rows.count)]
        tokens = mx.array(
            [
                (texts[row][0][start : start + length - drafts.get(row, 0)] + [5] * 20)[:length]
                if row in texts
                else [9] * length
                for row, start in enumerate(starts)
            ]
        )
        buffers = rows.lend(
            [starts[row] + length if row in texts else 0 for row in range(rows.count)]
        )
        assert buffers[0][0].shape[:2] == (2, rows.count)
        logits, buffers = fed(model, buffers, kind, mx.array(starts), tokens)
        rows.restore(buffers)
        for row in texts:
            kept = length - drafts.get(row, 0)
            assert close(
                kind, logits[row, :kept], wanted[row][0, position[row] : position[row] + kept]
            ), row
            position[row] += kept

    for _ in range(4):
        step(1, {})
    step(17, {0: 16, 2: 13, 3: 5})
    step(3, {0: 0, 2: 2, 3: 1})
    cache = rows.extract(3, position[3])  # goes on alone
    tokens = texts.pop(3)[0]
    part = model(mx.array([tokens[position[3] : position[3] + 9]]), cache)
    assert close(kind, part, wanted[3][:, position[3] : position[3] + 9])
    rows.resize([2, 0], 2)
    texts, wanted, position = ({0: d[2], 1: d[0]} for d in (texts, wanted, position))
    step(1, {})
    rows.resize([1], 4)
    texts, wanted, position = ({0: d[1]} for d in (texts, wanted, position))
    step(2, {0: 1})
    rows.resize([0], 1)
    step(1, {})
    step(8, {0: 3})
    cache = rows.extract(0, position[0])
    assert rows.buffers == [] and rows.capacity == rows.nbytes == 0 and cache.offset == position[0]
    rest = model(mx.array([texts[0][0][position[0] :]]), cache)
    assert close(kind, rest, wanted[0][:, position[0] :])


@each_kind
def test_drafts_ahead_at_every_place_of_the_ring_leave_it_intact(model, kind):
    """Sixteen wrong tokens, written ahead and taken back at every step, change nothing that
    follows.
    """
    wanted = reference(model, kind)
    cache = prefilled(model, kind, TOKENS[:40])
    cache.reserve(len(TOKENS) + 17)
    arrays = cache.arrays
    for position in range(40, 95):
        _, arrays = fed(model, arrays, kind, mx.array([position]), mx.array([[5] * 17]))
        logits, arrays = fed(
            model, arrays, kind, mx.array([position]), mx.array([[TOKENS[position]]])
        )
        assert close(kind, logits[:, 0], wanted[:, position])


def test_a_step_takes_the_position_of_each_token_too(model):
    wanted = reference(model, CacheKind())
    cache = prefilled(model, CacheKind(), TOKENS[:10])
    positions = mx.array([[10, 11, 12]])
    logits, _ = fed(model, cache.arrays, CacheKind(), positions, mx.array([TOKENS[10:13]]))
    assert close(CacheKind(), logits, wanted[:, 10:13])
    caches = step_caches(cache.arrays, positions, CacheKind())
    last = model.logits(model.hidden(mx.array([TOKENS[10:13]]), caches, last=True))
    assert close(CacheKind(), last, wanted[:, 12])


@each_kind
def test_several_rows_may_ask_for_the_last_token_only(model, kind):
    rows = Rows(model.args, kind)
    rows.resize([], 2)
    for row, length in enumerate((30, 50)):
        rows.place(row, prefilled(model, kind, TOKENS[:length]))
    caches = step_caches(rows.lend([33, 53]), mx.array([30, 50]), kind)
    hidden = model.hidden(mx.array([TOKENS[30:33], TOKENS[50:53]]), caches, last=True)
    assert close(kind, model.logits(hidden), reference(model, kind)[0, mx.array([32, 52])])


@each_kind
def test_prefixes_are_copies(model, kind):
    """Both go on, with other tokens, and neither sees the other's."""
    cache = prefilled(model, kind, TOKENS[:40])
    prefixes = [cache.prefix(length) for length in (40, 30)]
    assert [prefix.offset for prefix in prefixes] == [40, 30]
    for prefix in prefixes:
        model(mx.array([OTHERS[:30]]), prefix)
    assert close(kind, model(mx.array([TOKENS[40:]]), cache), reference(model, kind)[:, 40:])
    for prefix, length in zip(prefixes, (40, 30), strict=True):
        wanted = reference(model, kind, TOKENS[:length] + OTHERS[:40])
        assert close(kind, model(mx.array([OTHERS[30:40]]), prefix), wanted[:, -10:])
    assert cache.prefix(0) is cache.prefix(101) is None


class Stopped(Exception):
    pass


def stopped_at(model, layer, run):
    """`run()` until this layer is called; an exception there."""
    kind, wanted = type(model.layers[layer]), model.layers[layer]
    whole = kind.__call__

    def call(self, *arguments):
        if self is wanted:
            raise Stopped
        return whole(self, *arguments)

    kind.__call__ = call
    try:
        with pytest.raises(Stopped):
            run()
    finally:
        kind.__call__ = whole


@each_kind
@pytest.mark.parametrize("held", [0, 5, 40, 250])
@pytest.mark.parametrize("more", [5, 30])
def test_a_pass_that_was_interrupted_leaves_a_true_cache(model, kind, held, more):
    """A layer is a pass, and a block of slots, ahead of the next. What was held gives right
    answers, or is refused.
    """
    text = TOKENS * 3
    cache = prefilled(model, kind, text[:held]) if held else KVCache(model.args, kind)
    stopped_at(model, 1, lambda: model(mx.array([OTHERS[:more]]), cache))
    assert (cache.offset, cache.written) == (held, held + more)
    for length in (held, held - 1) if held and cache.can_trim(1) else (held,):
        part = cache.prefix(length) if length else cache
        tokens = text[:held] + OTHERS[50:60]
        assert close(
            kind,
            model(mx.array([tokens[length:]]), part),
            reference(model, kind, tokens)[:, length:],
        )


@pytest.mark.parametrize("count", [1, 2])
def test_a_cache_after_an_interrupted_pass_may_be_placed(model, count):
    text, kind, rows = TOKENS * 3, CacheKind(), Rows(model.args, CacheKind())
    cache = prefilled(model, kind, text[:250])
    stopped_at(model, 1, lambda: model(mx.array([OTHERS[:30]]), cache))
    assert cache.capacity == 256 and cache.arrays[0][0].shape[-2] == 512
    rows.resize([], count)
    rows.place(0, cache)
    starts, tokens = mx.array([250, 0][:count]), mx.array([text[250:260], [5] * 10][:count])
    logits, _ = fed(model, rows.lend([260, 0][:count]), kind, starts, tokens)
    assert close(kind, logits[:1], reference(model, kind, text[:260])[:, 250:])


def test_rows_know_what_was_written_and_forget_it_with_the_row(model):
    """A window's rows, each with drafts that were written before and after it was placed."""
    for count in (1, 2):
        kind, rows = KINDS["window"], Rows(model.args, KINDS["window"])
        rows.resize([], count)
        for row in range(count):
            cache = prefilled(model, kind, TOKENS[:80])
            cache.offset -= 10
            rows.place(row, cache)
        rows.restore(rows.lend([75] * count))
        assert rows.written == [80] * count
        rows.restore(rows.lend([90] + [0] * (count - 1)))
        assert rows.written == [90] + [0] * (count - 1)
        assert [rows.extract(row, 70).offset for row in range(1, count)] == [0] * (count - 1)
        cache = rows.extract(0, 70)
        assert (
            cache.offset,
            cache.written,
            cache.can_trim(SLACK - 20),
            cache.can_trim(SLACK - 19),
        ) == (70, 90, True, False)
        rows.resize([0], 4)
        rows.resize([], 2)
        assert (rows.written, rows.buffers, rows.nbytes) == ([0, 0], [], 0)


def test_a_window_that_an_interrupted_pass_has_overwritten_is_refused(model):
    kind = KINDS["window"]
    for held, more in ((5, SLACK + 20), (40, SLACK + 1)):
        cache = prefilled(model, kind, TOKENS[:held])
        stopped_at(model, 1, lambda: model(mx.array([OTHERS[:more]]), cache))  # noqa: B023
        with pytest.raises(
            CacheError, match="an interrupted pass has overwritten tokens of this cache; clear it"
        ):
            model(mx.array([TOKENS[held:]]), cache)
        assert cache.prefix(held) is None
        cache.clear()
        assert close(kind, model(mx.array([TOKENS]), cache), reference(model, kind))


def test_a_window_forgets_only_what_it_can_take_back(model):
    cache = KVCache(model.args, KINDS["window"], [], 500)
    assert cache.can_trim(SLACK) and not cache.can_trim(SLACK + 1)
    cache = KVCache(
        model.args, KINDS["window"], [], 480, written=500
    )  # 20 drafts were written, and none was kept
    assert cache.can_trim(SLACK - 20) and not cache.can_trim(SLACK - 19)
    assert cache.prefix(480 - SLACK + 19) is None
    cache.clear()
    assert (cache.arrays, cache.offset, cache.written, cache.capacity) == ([], 0, 0, 0)


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
    arrays, before = [layer[0] for layer in cache.arrays], mx.get_active_memory()
    rows = Rows(model.args, CacheKind())
    rows.place(0, cache)
    assert cache.arrays == [] and cache.offset == 0
    assert [layer[0] for layer in rows.buffers] == arrays and mx.get_active_memory() == before
    assert [layer[0] for layer in rows.extract(0, 40).arrays] == arrays and rows.extract(
        0, 40
    ).offset == 0


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
