"""Kinds of caches, and the logits of one pass that each should give."""

from __future__ import annotations

from openelm_mlx.device import mx
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind, Plain, Quantized, Window

KINDS = {
    "plain": CacheKind(),
    "8 bits": CacheKind(Quantized(8, 32)),
    "4 bits": CacheKind(Quantized(4, 32)),
    "window": CacheKind(Plain(), Window(20, 3)),
    "window, 8 bits": CacheKind(Quantized(8, 32), Window(20, 3)),
}


TOKENS = [1] + [(7 * i * i + 3 * i) % 64 for i in range(99)]


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
