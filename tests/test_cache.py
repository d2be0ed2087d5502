from __future__ import annotations

import copy
import json
from dataclasses import replace

import mlx.core as mx
import pytest
from small import random_engine

from openelm_mlx import Conversation, stream_generate
from openelm_mlx.cache import KVCache, make_caches, step_caches
from openelm_mlx.errors import CacheError, OptionError
from openelm_mlx.kv import SLACK, CacheKind, Plain, Quantized, Window
from openelm_mlx.options import GenerationOptions
from openelm_mlx.prompt_cache import PromptCache

KINDS = {
    "plain": CacheKind(),
    "8 bits": CacheKind(Quantized(8, 32)),
    "4 bits": CacheKind(Quantized(4, 32)),
    "window": CacheKind(Plain(), Window(20, 3)),
    "window, 8 bits": CacheKind(Quantized(8, 32), Window(20, 3)),
}
TOKENS = [1] + [(7 * i * i + 3 * i) % 64 for i in range(99)]


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


def reference(engine, kind):
    """The same attention without any cache: one pass, every token's keys and values packed and unpacked, and a mask."""

    class Whole:
        offset = nbytes = 0

        def positions(self, length):
            return mx.arange(length)[None]

        def mask(self, length):
            p, h = mx.arange(length)[:, None], mx.arange(length)[None]
            seen = h <= p
            if isinstance(kind.layout, Window):
                seen &= (h < kind.layout.keep) | (h > p - (kind.layout.size - kind.layout.keep))
            return seen

        def attend(self, q, kv, mask, scale):
            if isinstance(kind.store, Quantized):
                form = {"group_size": kind.store.group_size, "bits": kind.store.bits}
                kv = mx.dequantize(*mx.quantize(kv, **form), **form)
            k, v = mx.split(kv, 2, axis=1)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    return engine.model(mx.array([TOKENS]), [Whole() for _ in engine.model.layers])


def close(kind, logits, wanted):
    """Equal to rounding; where values are packed, one that lies between two steps may round either way."""
    distance = mx.abs(logits - wanted)
    mean, most = (1e-4, 1e-4) if isinstance(kind.store, Plain) else (1e-3, 0.1)
    return distance.mean().item() < mean and distance.max().item() < most


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_chunks_and_steps_equal_one_masked_pass(engine, kind):
    """100 tokens through a ring of 17 + 32 slots: in chunks of any size, then token by token, then several at once."""
    wanted = reference(engine, kind)
    for chunk in (1, 7, 64, 100):
        caches = make_caches(engine.config, kind)
        parts = [engine.model(mx.array([TOKENS[i : i + chunk]]), caches) for i in range(0, len(TOKENS), chunk)]
        assert close(kind, mx.concatenate(parts, axis=1), wanted)
    caches = make_caches(engine.config, kind)
    engine.model.hidden(mx.array([TOKENS[:60]]), caches, last=True)
    assert close(kind, engine.model.logits(engine.model.hidden(mx.array([TOKENS[60:]]), caches, last=True)), wanted[:, -1])
    caches = make_caches(engine.config, kind)
    engine.model(mx.array([TOKENS[:10]]), caches)
    for cache in caches:
        cache.reserve(len(TOKENS))
    arrays, position = [cache.arrays for cache in caches], 10
    for length in [1] * 60 + [5] * 6:
        fixed = step_caches(arrays, mx.array([position]), kind)
        logits = engine.model(mx.array([TOKENS[position : position + length]]), fixed)
        arrays = [cache.arrays for cache in fixed]
        assert close(kind, logits, wanted[:, position : position + length])
        position += length


def test_rejected_drafts_leave_a_full_window_intact(engine):
    """Wrong tokens, written ahead and taken back at every step, change nothing that follows."""
    kind = KINDS["window"]
    wanted = reference(engine, kind)
    caches = make_caches(engine.config, kind)
    engine.model(mx.array([TOKENS[:60]]), caches)
    arrays = [cache.arrays for cache in caches]
    for position in range(60, 90):
        wrong = step_caches(arrays, mx.array([position]), kind)
        engine.model(mx.array([[5] * 17]), wrong)
        right = step_caches([cache.arrays for cache in wrong], mx.array([position]), kind)
        logits = engine.model(mx.array([[TOKENS[position]]]), right)
        arrays = [cache.arrays for cache in right]
        assert mx.abs(logits[0, 0] - wanted[0, position]).max().item() < 1e-4


@pytest.mark.parametrize("kind", [{"kv_bits": 8}, {"kv_window": 24}, {"kv_bits": 4, "kv_window": 24, "kv_keep": 0}])
def test_compiled_equals_eager_for_every_kind(engine, kind):
    runs = [
        [event.token for event in stream_generate(engine, TOKENS[:30], max_tokens=50, compiled=compiled, ignore_eos=True, **kind)]
        for compiled in (True, False)
    ]
    assert runs[0] == runs[1]


def test_a_window_forgets_only_what_it_can_take_back():
    cache = KVCache(KINDS["window"])
    cache.settle(500)
    assert cache.can_trim(SLACK) and not cache.can_trim(SLACK + 1)
    cache.trim(20)
    with pytest.raises(CacheError, match="cannot forget 20 tokens: the window has already dropped what came before"):
        cache.trim(20)


def test_a_full_window_starts_anew_for_another_prompt(engine):
    options = {"kv_window": 24, "max_tokens": 4, "ignore_eos": True}
    cache = PromptCache.for_config(engine.config, CacheKind.of(engine.config, GenerationOptions(kv_window=24)))
    for prompt in (TOKENS, TOKENS[:40], TOKENS[:45]):
        shared = [event.token for event in stream_generate(engine, prompt, prompt_cache=cache, **options)]
        assert shared == [event.token for event in stream_generate(engine, prompt, **options)]


def test_what_a_cache_forgot_or_overwrote():
    cache = KVCache(KINDS["window"])
    cache.settle(500)
    cache.settle(480)  # of 20 drafts none was kept, but they were written
    assert cache.can_trim(SLACK - 20) and not cache.can_trim(SLACK - 19)
    cache.clear()
    cache.settle(10)
    assert cache.can_trim(10)


def test_a_window_that_no_context_fills_is_a_plain_cache(engine):
    kinds = [CacheKind.of(engine.config, GenerationOptions(kv_window=size, kv_bits=8)).layout for size in (511, 512, 10**9)]
    assert kinds == [Window(511, 4), KINDS["plain"].layout, KINDS["plain"].layout]


def test_bytes_per_token_are_those_of_the_arrays(engine):
    for kind in KINDS.values():
        caches = make_caches(engine.config, kind)
        engine.model(mx.array([TOKENS]), caches)
        per_slot = sum(cache.nbytes for cache in caches) / caches[0].capacity
        assert kind.bytes_per_token(engine.config, itemsize=4) == per_slot


@pytest.mark.parametrize("kind", [{}, {"kv_bits": 8}, {"kv_window": 24}])
def test_a_saved_cache_goes_on_where_it_ended(engine, tmp_path, kind):
    options = GenerationOptions(ignore_eos=True, max_tokens=10, **kind)
    cache = PromptCache.for_config(engine.config, CacheKind.of(engine.config, options))
    said = [event.token for event in stream_generate(engine, TOKENS[:50], None, options, prompt_cache=cache)]
    for layer in cache.layers:
        layer.settle(layer.offset, layer.offset + 3)  # as after drafts that were rejected
    cache.save(tmp_path / "talk.safetensors", engine)
    again = PromptCache.load(tmp_path / "talk.safetensors", engine, cache.kind)
    assert again.tokens == cache.tokens and again.layers[0].written == cache.layers[0].written
    events = list(stream_generate(engine, [*TOKENS[:50], *said, 5], None, options, prompt_cache=again))
    assert events[-1].stats.reused_tokens == 59
    assert [e.token for e in events] == [e.token for e in stream_generate(engine, [*TOKENS[:50], *said, 5], None, options)]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


def test_saved_caches_are_refused_where_they_do_not_belong(tiny, engine, tmp_path):
    path = tmp_path / "talk.safetensors"
    cache = PromptCache.for_config(engine.config)
    with pytest.raises(CacheError, match="the cache is empty"):
        cache.save(path, engine)
    list(stream_generate(engine, TOKENS[:9], max_tokens=2, prompt_cache=cache))
    with pytest.raises(CacheError, match="cannot be written"):
        cache.save(tmp_path / "missing" / "talk.safetensors", engine)
    cache.save(path, engine)
    with pytest.raises(CacheError, match="made with other weights or another tokenizer than random-2's"):
        PromptCache.load(path, random_engine(tiny, seed=2))
    weight = engine.model.layers[0].ffn.proj_1.weight
    before = weight[3, 5].item()
    weight[3, 5] = before + 1e-3  # a single weight
    with pytest.raises(CacheError, match="other weights"):
        PromptCache.load(path, engine)
    weight[3, 5], weight[3, 6] = weight[3, 6].item(), before  # two that changed places
    with pytest.raises(CacheError, match="other weights"):
        PromptCache.load(path, engine)
    weight[3, 6], weight[3, 5] = weight[3, 5].item(), before
    for other in (replace(engine, quantization={"bits": 8}), replace(engine, tokenizer=copy.copy(engine.tokenizer))):
        other.tokenizer.fingerprint += "0" * (other.quantization is None)
        with pytest.raises(CacheError, match="other weights or another tokenizer"):
            PromptCache.load(path, other)
    with pytest.raises(CacheError, match="holds plain keys and values; asked for are 8-bit keys and values, group 32"):
        PromptCache.load(path, engine, CacheKind(Quantized(8, 32)))
    data = path.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "noise": b"\x00" * 99, "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CacheError, match=r"is no saved cache.*give another file|is damaged"):
            PromptCache.load(tmp_path / name, engine)
    mx.save_safetensors(str(path), {"a": mx.zeros(3)}, {"format": "other"})
    with pytest.raises(CacheError, match="no saved cache of this version"):
        PromptCache.load(path, engine)
    with pytest.raises(CacheError, match="no saved cache"):
        PromptCache.load(tmp_path / "nowhere", engine)


def test_a_cache_saved_between_the_tokens_of_one_draft_is_whole(engine, tmp_path):
    cache = PromptCache.for_config(engine.config)
    stream = stream_generate(engine, TOKENS[:9], draft=engine, draft_tokens=4, adaptive_draft=False, prompt_cache=cache)
    seen = [next(stream).token for _ in range(3)]
    stream.close()
    cache.save(tmp_path / "talk.safetensors", engine)
    assert PromptCache.load(tmp_path / "talk.safetensors", engine).tokens == cache.tokens == TOKENS[:9] + seen


@pytest.mark.parametrize("kind", [CacheKind(), CacheKind(Quantized(8, 32)), CacheKind(Plain(), Window(20, 3))], ids=str)
def test_saved_caches_that_someone_changed_are_refused(engine, tmp_path, kind):
    cache = PromptCache(make_caches(engine.config, kind))
    options = {"kv_bits": getattr(kind.store, "bits", None), "max_tokens": 2}
    options |= {"kv_window": 20, "kv_keep": 3} if isinstance(kind.layout, Window) else {}
    list(stream_generate(engine, TOKENS[:9], prompt_cache=cache, **options))
    cache.save(tmp_path / "whole.safetensors", engine)
    arrays, about = mx.load(str(tmp_path / "whole.safetensors"), return_metadata=True)
    assert PromptCache.load(tmp_path / "whole.safetensors", engine, kind).tokens == cache.tokens
    tokens = cache.tokens
    for change, fields, what in (
        (lambda a: a[..., :5, :], {}, "layer 0 have the shape"), (lambda a: a[:, :1], {}, "layer 0 have the shape"),
        (lambda a: mx.concatenate([a, a]), {}, "layer 0 have the shape"), (lambda a: a[..., 0], {}, "layer 0 have the shape"),
        (lambda a: a, {"tokens": json.dumps([1.5] * len(tokens))}, "tokens outside the vocabulary"),
        (lambda a: a, {"tokens": json.dumps([64] * len(tokens))}, "tokens outside the vocabulary"),
        (lambda a: a, {"tokens": json.dumps(tokens[1:])}, f"{len(tokens)} positions for {len(tokens) - 1} tokens"),
        (lambda a: a, {"tokens": "[]", "offset": "0"}, "0 positions for 0 tokens"),
        (lambda a: a, {"tokens": "[" * 10**5}, "maximum recursion depth"), (lambda a: a, {"tokens": "{}"}, "positions for"),
    ):  # fmt: skip
        changed = {name: mx.contiguous(change(array)) for name, array in arrays.items()}
        mx.save_safetensors(str(tmp_path / "changed.safetensors"), changed, {**about, **fields})
        with pytest.raises(CacheError, match=f"is damaged: .*{what}"):
            PromptCache.load(tmp_path / "changed.safetensors", engine, kind)


def test_the_tenth_turn_prefills_its_own_message_only(tiny):
    conversation = Conversation(tiny, max_tokens=6, ignore_eos=True, temperature=0.0)
    prefilled = []
    for _ in range(10):
        stats = list(conversation.send("Hi"))[-1].stats
        prefilled.append(stats.prompt_tokens - stats.reused_tokens)
    assert len(set(prefilled[1:])) == 1 and prefilled[9] < prefilled[0] + 3 and stats.prompt_tokens > 9 * prefilled[9]


def test_mistakes(tiny, engine):
    with pytest.raises(OptionError, match="kv_bits is 3; allowed: 4, 8"):
        GenerationOptions(kv_bits=3)
    with pytest.raises(OptionError, match="kv_window is 4 and kv_keep 4; the window must be the larger one"):
        GenerationOptions(kv_window=4)
    with pytest.raises(CacheError, match="holds plain keys and values, but the options ask for 8-bit keys and values, g"):
        stream_generate(engine, "Once", kv_bits=8, prompt_cache=PromptCache.for_config(engine.config))


def test_loss_of_a_kind(engine):
    from openelm_mlx.benchmarks.kv_loss import kv_loss

    losses = [kv_loss(engine, [TOKENS], kind, prompt=30) for kind in (KINDS["plain"], KINDS["8 bits"], KINDS["4 bits"])]
    assert losses[0].kl == 0.0 and losses[0].top_1 == 1.0 and 0 < losses[1].kl < losses[2].kl
    assert losses[0].bytes_per_token > losses[1].bytes_per_token > losses[2].bytes_per_token
