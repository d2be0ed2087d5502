"""Keys and values of the tokens already seen: the contract and its kinds.

The model never asks which kind it holds. It asks for the positions of new tokens, for one mask a pass, and lets the
cache attend: `attend` stores the new keys and values and returns the attention over everything held.

Keys and values share one buffer [2, batch, kv_heads, capacity, head_dim], so a decoded token writes both at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from openelm_mlx.config import OpenELMConfig, layer_shapes
from openelm_mlx.errors import CacheError

BLOCK = 256  # tokens by which a buffer grows: one new trace of the compiled step each time

Mask = mx.array | str | None


class Cache(Protocol):
    """Keys and values of one layer. `offset` counts the tokens held: it is the position of the next one."""

    @property
    def offset(self) -> int | mx.array: ...
    @property
    def nbytes(self) -> int: ...
    def positions(self, length: int) -> mx.array: ...
    def mask(self, length: int) -> Mask: ...
    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array: ...


def sdpa(q: mx.array, k: mx.array, v: mx.array, mask: Mask, scale: float) -> mx.array:
    """Attention of q [B, heads, L, D] over k, v [B, kv_heads, T, D]; grouped heads are native to the kernel."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def causal(length: int) -> Mask:
    return "causal" if length > 1 else None


class NoCache:
    """A single pass over the whole text: offset 0, nothing kept."""

    offset = 0
    nbytes = 0

    def positions(self, length: int) -> mx.array:
        return mx.arange(length)[None]

    def mask(self, length: int) -> Mask:
        return causal(length)

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        return sdpa(q, kv[0], kv[1], mask, scale)


class KVCache:
    """Grows in blocks, holds every token; `trim` is exact because later tokens only overwrite."""

    def __init__(self) -> None:
        self.offset = 0
        self.buffer: mx.array | None = None  # [2, B, kv_heads, capacity, head_dim]

    @property
    def nbytes(self) -> int:
        return 0 if self.buffer is None else self.buffer.nbytes

    @property
    def capacity(self) -> int:
        return 0 if self.buffer is None else self.buffer.shape[3]

    def positions(self, length: int) -> mx.array:
        return mx.arange(self.offset, self.offset + length)[None]

    def mask(self, length: int) -> Mask:
        return causal(length)

    def reserve(self, tokens: int, like: mx.array | None = None) -> None:
        """Make room for `tokens` in all, rounded up to whole blocks; `like` gives shape and dtype at first."""
        capacity = -(-tokens // BLOCK) * BLOCK
        if capacity <= self.capacity:
            return
        like = self.buffer if like is None else like
        if like is None:
            raise CacheError("an empty cache cannot be enlarged before its first tokens; prefill first")
        shape = (*like.shape[:3], capacity - self.capacity, like.shape[4])
        room = mx.zeros(shape, like.dtype)
        self.buffer = room if self.buffer is None else mx.concatenate([self.buffer, room], axis=3)

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        end = self.offset + kv.shape[3]
        self.reserve(end, like=kv)
        buffer = self.buffer
        if buffer is None:  # unreachable after reserve; tells the type checker so
            raise CacheError("the cache has no buffer")
        buffer[:, :, :, self.offset : end] = kv
        self.offset = end
        return sdpa(q, buffer[0, :, :, :end], buffer[1, :, :, :end], mask, scale)

    def trim(self, n: int) -> None:
        """Forget the last n tokens. Raises `CacheError` when fewer are held."""
        if not 0 <= n <= self.offset:
            raise CacheError(f"cannot forget {n} tokens of {self.offset}")
        self.offset -= n


class StepCache:
    """A `KVCache` seen from inside the compiled step: the buffer is fixed, the position an array [B].

    Attends to the whole buffer and masks what is not written yet, so shapes never change from token to token.
    """

    def __init__(self, buffer: mx.array, offset: mx.array) -> None:
        self.buffer, self.offset = buffer, offset

    @property
    def nbytes(self) -> int:
        return self.buffer.nbytes

    def positions(self, length: int) -> mx.array:
        return self.offset[:, None] + mx.arange(length)

    def mask(self, length: int) -> Mask:
        slots = mx.arange(self.buffer.shape[3])
        return slots <= self.positions(length)[:, None, :, None]  # [B, 1, L, capacity]

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        # put_along_axis is one kernel on a GPU; slice_update with an array start is two.
        index = self.positions(kv.shape[3])[None, :, None, :, None]
        self.buffer = mx.put_along_axis(self.buffer, mx.broadcast_to(index, kv.shape), kv, axis=3)
        return sdpa(q, self.buffer[0], self.buffer[1], mask, scale)


class ForeignCache:
    """mlx-lm's cache behind this contract, so that its tools can drive the model (plain, rotating, batched)."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def offset(self) -> int | mx.array:
        return self.inner.offset

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def positions(self, length: int) -> mx.array:
        offset = self.inner.offset
        start = offset[:, None] if isinstance(offset, mx.array) and offset.ndim else offset
        return (start + mx.arange(length)).reshape(-1, length)

    def mask(self, length: int) -> Mask:
        return self.inner.make_mask(length, return_array=False, window_size=None)

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        k, v = self.inner.update_and_fetch(kv[0], kv[1])
        if hasattr(self.inner, "bits"):  # quantized keys and values need mlx-lm's own attention
            from mlx_lm.models.base import quantized_scaled_dot_product_attention

            return quantized_scaled_dot_product_attention(
                q, k, v, scale=scale, mask=mask, group_size=self.inner.group_size, bits=self.inner.bits  # type: ignore[arg-type]
            )
        return sdpa(q, k, v, mask, scale)


def as_caches(cache: list[Any] | None, layers: int) -> list[Cache]:
    """The caches of a pass, one a layer: none, ours, or mlx-lm's behind an adapter."""
    if cache is None:
        return [NoCache()] * layers
    if len(cache) != layers:
        raise CacheError(f"the cache has {len(cache)} entries for a model of {layers} layers; make one for this model")
    return [c if hasattr(c, "attend") else NoCache() if c is None else ForeignCache(c) for c in cache]


def make_caches(config: OpenELMConfig) -> list[KVCache]:
    return [KVCache() for _ in range(config.num_transformer_layers)]


def bytes_per_token(config: OpenELMConfig, itemsize: int) -> int:
    """Bytes of keys and values that one token adds, over all layers."""
    return sum(2 * shape.kv_heads * config.head_dim * itemsize for shape in layer_shapes(config))


@dataclass
class PromptCache:
    """Caches together with the tokens they hold, so that a next prompt prefills only what is new."""

    layers: list[KVCache]
    tokens: list[int] = field(default_factory=list)

    @classmethod
    def for_config(cls, config: OpenELMConfig) -> PromptCache:
        return cls(make_caches(config))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reuse(self, prompt: list[int]) -> int:
        """Keep the longest common prefix with `prompt`, but never all of it: one token must be run for its logits.

        held    [1, 5, 9, 4, 2]
        prompt  [1, 5, 9, 7]      -> keeps 3, forgets 2, returns 3
        """
        common = 0
        for held, wanted in zip(self.tokens, prompt[:-1], strict=False):
            if held != wanted:
                break
            common += 1
        for layer in self.layers:
            layer.trim(layer.offset - common)
        del self.tokens[common:]
        return common
