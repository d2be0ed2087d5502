"""Sequences that were run, and the caches that they leave."""

from __future__ import annotations

from openelm_mlx import PromptCache, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind, Plain, Quantized, Window
from openelm_mlx.model.config import layer_shapes

PLAIN, EIGHT, WINDOW = CacheKind(), CacheKind(Quantized(8, 32)), CacheKind(Plain(), Window(20, 3))


TOKENS = [1] + [(7 * i * i + 3 * i) % 64 for i in range(99)]


def written(engine, tokens, kind=PLAIN, room=None):
    """A cache whose keys and values are the tokens themselves, each in its slot."""
    cache = KVCache(engine.config, kind)
    slots = kind.layout.capacity if kind == WINDOW else room or len(tokens)
    for shape in layer_shapes(engine.config):
        new = mx.zeros((2, 1, shape.kv_heads, slots, engine.config.head_dim))
        place = kind.layout.slots(mx.arange(len(tokens)))
        new[..., place, :] = mx.array(tokens, dtype=mx.float32)[:, None]
        cache.arrays.append(kind.store.pack(new))
    cache.offset = cache.written = len(tokens)
    mx.eval(cache.arrays)
    return cache


def ran(engine, tokens, kind=PLAIN):
    """The cache after a pass of the model over the tokens, put into a store."""
    cache, store = KVCache(engine.config, kind), PromptCache()
    engine.model.hidden(mx.array([tokens]), cache, last=True)
    mx.eval(cache.arrays)
    store.put(engine.steps.refresh(), tokens, cache)
    return store


def next_logits(engine, tokens, cache):
    return engine.model(mx.array([tokens]), cache)[0, -1]


def generated(engine, prompt, store=None, **settings):
    """The tokens that follow, and how many of the prompt's the store gave."""
    settings = {"max_tokens": 4, "ignore_eos": True} | settings
    events = list(stream_generate(engine, prompt, prompt_cache=store, **settings))
    return [event.token for event in events], events[-1].stats.reused_tokens
