"""Keys and values kept, of one sequence and of rows: the same logits as one pass over the whole
text without a cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kept import KINDS, TOKENS, close, prefilled, reference
from small import random_model

from openelm_mlx.device import mx
from openelm_mlx.engine.rows import Rows
from openelm_mlx.errors import CacheError
from openelm_mlx.model import cache_kinds
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import SLACK, CacheKind

OTHERS = [1] + [(5 * i * i + 11 * i) % 64 for i in range(99)]


each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def model():
    return random_model(seed=1)


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


def test_packed_arrays_of_a_step_are_read_as_they_are_on_an_nvidia_gpu(
    model, monkeypatch, tmp_path
):
    """A copy would be made beside the kernel that stores, on which MLX sees no dependence; those of
    a prompt are parts of arrays, and are copied.
    """
    kind, graph = KINDS["8 bits"], str(tmp_path / "graph.dot")
    monkeypatch.setattr(cache_kinds, "kind", lambda: "cuda")

    def copies(tokens, caches):
        mx.export_to_dot(graph, model.hidden(mx.array(tokens), caches))
        return Path(graph).read_text().count("Contiguous")

    assert copies([TOKENS[:9]], KVCache(model.args, kind)) > 0
    cache = prefilled(model, kind, TOKENS[:9])
    mx.eval(cache.arrays)
    assert copies([[5]], step_caches(cache.arrays, mx.array([9]), kind)) == 0
