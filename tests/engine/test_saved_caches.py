"""Saved caches: they go on where they ended, and are refused where they do not belong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from sequences import EIGHT, PLAIN, TOKENS, WINDOW, generated, next_logits, ran, written
from small import random_engine

from openelm_mlx import EngineOptions, PromptCache, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.dtypes import name_of
from openelm_mlx.errors import CacheError, OptionError

OPTIONS = {
    PLAIN: None,
    EIGHT: EngineOptions(kv_bits=8),
    WINDOW: EngineOptions(kv_window=20, kv_keep=3),
}


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


@pytest.mark.parametrize("kind", [PLAIN, EIGHT, WINDOW], ids=str)
def test_a_saved_cache_goes_on_where_it_ended(engine, tmp_path, kind):
    store = ran(engine, TOKENS[:60], kind)
    cache, count = store.take(engine.steps.refresh(), kind, TOKENS[:61])
    cache.written += 3  # as after drafts that were rejected
    store.put(engine.steps.refresh(), TOKENS[:count], cache)
    store.save(tmp_path / "talk.safetensors", engine)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]
    again = PromptCache.load(tmp_path / "talk.safetensors", engine, OPTIONS[kind])
    assert again.tokens == store.tokens == TOKENS[:60] and len(again) == 1
    took, count = again.take(engine.steps.refresh(), kind, TOKENS[:61])
    assert (count, took.offset, took.written) == (60, 60, 63)
    assert (
        (next_logits(engine, TOKENS[60:70], took) == next_logits(engine, TOKENS[60:70], cache))
        .all()
        .item()
    )


def test_the_latest_sequence_of_an_engine_is_saved(tiny, engine, tmp_path):
    other, store = random_engine(tiny, seed=2), ran(engine, TOKENS[:9])
    store.put(other.steps.refresh(), TOKENS[:5], written(other, TOKENS[:5]))
    store.put(engine.steps.refresh(), TOKENS[1:9], written(engine, TOKENS[1:9]))
    for whose, tokens in ((engine, TOKENS[1:9]), (other, TOKENS[:5])):
        store.save(tmp_path / "talk.safetensors", whose)
        assert PromptCache.load(tmp_path / "talk.safetensors", whose).tokens == tokens


def test_saved_caches_are_refused_where_they_do_not_belong(tiny, engine, tmp_path):
    path = tmp_path / "talk.safetensors"
    with pytest.raises(
        CacheError, match="the cache has nothing that random-1 has run; there is nothing to save"
    ):
        PromptCache().save(path, engine)
    store = ran(engine, TOKENS[:9])
    with pytest.raises(CacheError, match="cannot be written"):
        store.save(tmp_path / "missing" / "talk.safetensors", engine)
    store.save(path, engine)
    with pytest.raises(
        CacheError, match="made with other weights or another tokenizer than random-2's"
    ):
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
    for other in (
        replace(engine, quantization={"bits": 8}),
        replace(engine, tokenizer=copy.copy(engine.tokenizer)),
    ):
        other.tokenizer.fingerprint += "0" * (other.quantization is None)
        with pytest.raises(CacheError, match="other weights or another tokenizer"):
            PromptCache.load(path, other)
    with pytest.raises(
        CacheError,
        match="has plain keys and values; the options ask for 8-bit keys and values, group 32",
    ):
        PromptCache.load(path, engine, OPTIONS[EIGHT])
    data = path.read_bytes()
    for name, content in {
        "cut": data[: len(data) // 2],
        "noise": b"\x00" * 99,
        "empty": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CacheError, match=r"is not a saved cache.*give another file|is damaged"):
            PromptCache.load(tmp_path / name, engine)
    mx.save_safetensors(str(path), {"a": mx.zeros(3)}, {"format": "other"})
    with pytest.raises(CacheError, match="not a saved cache of this version"):
        PromptCache.load(path, engine)
    with pytest.raises(CacheError, match="not a saved cache"):
        PromptCache.load(tmp_path / "nowhere", engine)
    with pytest.raises(OptionError, match="options is .*; allowed is one made by EngineOptions"):
        PromptCache.load(path, engine, EIGHT)
    for use in (PromptCache().save, PromptCache.load):
        with pytest.raises(OptionError, match="engine is .*; allowed is a loaded model"):
            use(engine, str(path))
    for size in (-1, "1 GB", 1e9):
        with pytest.raises(
            OptionError, match=f"max_bytes is {size!r}; allowed is a whole number from 0 up"
        ):
            PromptCache(size)


@pytest.mark.parametrize("kind", [PLAIN, EIGHT, WINDOW], ids=str)
def test_saved_caches_that_someone_changed_are_refused(engine, tmp_path, kind):
    store = ran(engine, TOKENS[:9], kind)
    store.save(tmp_path / "whole.safetensors", engine)
    arrays, about = mx.load(str(tmp_path / "whole.safetensors"), return_metadata=True)
    assert (
        PromptCache.load(tmp_path / "whole.safetensors", engine, OPTIONS[kind]).tokens == TOKENS[:9]
    )
    for change, fields, what in (
        (lambda a: a[..., :5, :], {}, "layer 0 have the shape"),
        (lambda a: a[:, :, :1], {}, "layer 1 have the shape"),
        (lambda a: mx.concatenate([a, a]), {}, "layer 0 have the shape"),
        (lambda a: a[..., 0], {}, "layer 0 have the shape"),
        (lambda a: a, {"tokens": json.dumps([1.5] * 9)}, "tokens outside the vocabulary"),
        (lambda a: a, {"tokens": json.dumps([64] * 9)}, "tokens outside the vocabulary"),
        (lambda a: a, {"tokens": json.dumps(TOKENS[1:9])}, "9 positions for 8 tokens"),
        (lambda a: a, {"tokens": "[]", "offset": "0"}, "0 positions for 0 tokens"),
        (lambda a: a, {"tokens": "[" * 10**5}, "maximum recursion depth"),
        (lambda a: a, {"tokens": "{}"}, "positions for"),
    ):
        changed = {name: mx.contiguous(change(array)) for name, array in arrays.items()}
        mx.save_safetensors(str(tmp_path / "changed.safetensors"), changed, {**about, **fields})
        with pytest.raises(CacheError, match=f"is damaged: .*{what}"):
            PromptCache.load(tmp_path / "changed.safetensors", engine, OPTIONS[kind])


@pytest.mark.parametrize("kind", [PLAIN, EIGHT], ids=str)
def test_saved_caches_of_other_types_are_refused(engine, tmp_path, kind):
    """A kernel would write to scales as to biases, and beyond the end of smaller ones."""
    path = str(tmp_path / "changed.safetensors")
    ran(engine, TOKENS[:9], kind).save(path, engine)
    arrays, about = mx.load(path, return_metadata=True)
    mx.eval(arrays)
    for name, array in arrays.items():
        dtype = mx.float16 if kind == EIGHT else mx.int32
        mx.save_safetensors(path, arrays | {name: array.astype(dtype)}, about)
        what = f"damaged: keys and values of layer {name[0]} have the types .*"
        with pytest.raises(CacheError, match=what + name_of(dtype)):
            PromptCache.load(path, engine, OPTIONS[kind])


def test_a_cache_saved_between_the_tokens_of_one_draft_is_whole(engine, tmp_path):
    store, path = PromptCache(), tmp_path / "talk.safetensors"
    settings = {"draft": engine, "draft_tokens": 4, "adaptive_draft": False}
    stream = stream_generate(engine, TOKENS[:9], prompt_cache=store, **settings)
    seen = [next(stream).token for _ in range(3)]
    stream.close()
    store.save(path, engine)
    held = PromptCache.load(path, engine).tokens
    assert held == store.tokens and held[:11] == [*TOKENS[:9], *seen][:11]
    assert generated(engine, [*held, 5], PromptCache.load(path, engine)) == (
        generated(engine, [*held, 5])[0],
        len(held),
    )
