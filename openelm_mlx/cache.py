"""Keys and values of the tokens already seen: the contract and its sides.

The model never asks what it holds. It asks for the positions of new tokens, for one mask a pass, and lets the
cache attend: `attend` stores the new keys and values and returns the attention over everything held. `KVCache` is
the side that prefill and Python see, `StepCache` the same arrays inside a compiled step. In which form and in
which slots tokens are kept is the `CacheKind` of both (kv.py).

Keys and values share one buffer, so a decoded token writes both at once; kv.py says how it is laid out.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from openelm_mlx.config import OpenELMConfig
from openelm_mlx.errors import CacheError
from openelm_mlx.kv import Arrays, CacheKind, Mask, Window, halves, sdpa

BLOCK = 256  # tokens by which a buffer grows: one new trace of the compiled step each time


class Cache(Protocol):
    """Keys and values of one layer. `offset` counts the tokens held: it is the position of the next one."""

    @property
    def offset(self) -> int | mx.array: ...
    @property
    def nbytes(self) -> int: ...
    def positions(self, length: int) -> mx.array: ...
    def mask(self, length: int) -> Mask: ...
    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array: ...


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
        return sdpa(q, *halves(kv), mask, scale)


class KVCache:
    """A cache of any kind, as prefill and Python see it: the offset is a number.

    A growing one holds every token and grows in blocks; a window holds its fixed number of slots.
    """

    def __init__(self, kind: CacheKind | None = None) -> None:
        self.kind = kind or CacheKind()
        self.offset = 0
        self.written = 0  # the highest offset there ever was: what a window has overwritten
        self.arrays: Arrays = []  # of the store; none before the first tokens

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def capacity(self) -> int:
        return self.arrays[0].shape[-2] if self.arrays else 0

    def positions(self, length: int) -> mx.array:
        return mx.arange(self.offset, self.offset + length)[None]

    def mask(self, length: int) -> Mask:
        layout = self.kind.layout
        if not isinstance(layout, Window):
            return causal(length)
        new = self.positions(length)
        held, ring_slots = new, new[0] >= layout.keep
        if self.offset:  # what is held before this pass, then the pass itself
            before = layout.held(mx.array([[self.offset - 1]]))
            before = mx.where(before < self.offset, before, -1)  # kept slots not yet written
            held = mx.concatenate([before, new], axis=1)
            ring_slots = mx.concatenate([mx.arange(layout.capacity) >= layout.keep, ring_slots])
        return layout.sees(new, held, ring_slots)[:, None]

    def reserve(self, tokens: int, like: Arrays | None = None) -> None:
        """Make room for `tokens` in all, in whole blocks or the whole window; `like` gives shapes and types at first."""
        layout = self.kind.layout
        capacity = layout.capacity if isinstance(layout, Window) else -(-tokens // BLOCK) * BLOCK
        if capacity <= self.capacity:
            return
        like = like or self.arrays
        if not like:
            raise CacheError("an empty cache cannot be enlarged before its first tokens; prefill first")
        rooms = [mx.zeros((*a.shape[:-2], capacity - self.capacity, a.shape[-1]), a.dtype) for a in like]
        self.arrays = [mx.concatenate([a, b], axis=-2) for a, b in zip(self.arrays, rooms, strict=True)] if self.arrays else rooms

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        new, end = self.kind.store.pack(kv), self.offset + kv.shape[-2]
        if isinstance(self.kind.layout, Window):
            return self._attend_window(q, new, mask, scale, self.kind.layout)
        self.reserve(end, like=new)
        for buffer, part in zip(self.arrays, new, strict=True):
            buffer[..., self.offset : end, :] = part
        self.settle(end)
        return self.kind.store.attend(q, [buffer[..., :end, :] for buffer in self.arrays], mask, scale)

    def _attend_window(self, q: mx.array, new: Arrays, mask: Mask, scale: float, window: Window) -> mx.array:
        """Attend to the slots and the pass itself, then write of the pass what later tokens can still see."""
        seen = [mx.concatenate([a, b], axis=-2) for a, b in zip(self.arrays, new, strict=True)] if self.offset else new
        out = self.kind.store.attend(q, seen, mask, scale)
        self.reserve(0, like=new)
        end = self.offset + new[0].shape[-2]
        self.settle(self.offset, end)  # first: were this interrupted, the slots count as overwritten
        kept = [p for p in range(self.offset, end) if p < window.keep or p >= end - window.ring]
        source, slots = mx.array(kept) - self.offset, window.slots(mx.array(kept))
        for buffer, part in zip(self.arrays, new, strict=True):
            buffer[..., slots, :] = mx.take(part, source, axis=-2)
        self.settle(end)
        return out

    def settle(self, offset: int, written: int = 0) -> None:
        """Say how many tokens are held, after they (and up to `written`) were stored."""
        self.offset, self.written = offset, max(self.written, offset, written)

    def can_trim(self, n: int) -> bool:
        """A window that has run over forgets at most what its slack still holds."""
        layout = self.kind.layout
        if not isinstance(layout, Window) or self.written <= layout.capacity:
            return True
        return self.written - (self.offset - n) <= layout.capacity - layout.size

    def trim(self, n: int) -> None:
        """Forget the last n tokens: later ones overwrite them. Raises `CacheError` when that would be a lie."""
        if not 0 <= n <= self.offset:
            raise CacheError(f"cannot forget {n} tokens of {self.offset}")
        if not self.can_trim(n):
            raise CacheError(f"cannot forget {n} tokens: the window has already dropped what came before them")
        self.offset -= n

    def clear(self) -> None:
        """Forget everything; the memory is kept for what comes."""
        self.offset = self.written = 0


class Place:
    """Where the tokens of one pass go, computed once for all layers: positions, slots, mask."""

    def __init__(self, offset: mx.array, kind: CacheKind, capacity: int) -> None:
        self.offset, self.kind, self.capacity = offset, kind, capacity
        self._positions: dict[int, mx.array] = {}
        self._slots: dict[tuple[int, ...], mx.array] = {}

    def positions(self, length: int) -> mx.array:
        if length not in self._positions:
            start = self.offset[:, None]
            self._positions[length] = start if length == 1 else start + mx.arange(length)
        return self._positions[length]

    def slots(self, shape: tuple[int, ...]) -> mx.array:
        """The slot of each entry of new keys and values of this shape; layers of equal widths share it."""
        if shape not in self._slots:
            slots = self.kind.layout.slots(self.positions(shape[-2]))
            self._slots[shape] = mx.broadcast_to(slots[:, None, :, None], shape)
        return self._slots[shape]

    def mask(self, length: int) -> mx.array:
        return self.kind.layout.visible(self.positions(length), self.capacity)


class StepCache:
    """The arrays of a `KVCache` inside a compiled step: fixed in size, the position an array [B].

    Attends to every slot and masks what is not in sight, so shapes never change from token to token.
    """

    def __init__(self, arrays: Arrays, place: Place) -> None:
        self.arrays, self.place = arrays, place

    @property
    def offset(self) -> mx.array:
        return self.place.offset

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def positions(self, length: int) -> mx.array:
        return self.place.positions(length)

    def mask(self, length: int) -> Mask:
        return self.place.mask(length)

    def attend(self, q: mx.array, kv: mx.array, mask: Mask, scale: float) -> mx.array:
        # put_along_axis is one kernel on a GPU; slice_update with an array start is two.
        store = self.place.kind.store
        self.arrays = [
            mx.put_along_axis(buffer, self.place.slots(part.shape), part, axis=-2)
            for buffer, part in zip(self.arrays, store.pack(kv), strict=True)
        ]
        return store.attend(q, self.arrays, mask, scale)


def step_caches(buffers: list[Arrays], offset: mx.array, kind: CacheKind) -> list[StepCache]:
    """The caches of a compiled step, one a layer, over the arrays of `KVCache`s; offset [B]."""
    place = Place(offset, kind, buffers[0][0].shape[-2])
    return [StepCache(arrays, place) for arrays in buffers]


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
        k, v = self.inner.update_and_fetch(*halves(kv))
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


def level(caches: list[KVCache]) -> None:
    """Give all the room of the roomiest, as a step asks: an interrupted pass may have enlarged some only."""
    most = max(cache.capacity for cache in caches)
    for cache in caches:
        cache.reserve(most)


def make_caches(config: OpenELMConfig, kind: CacheKind | None = None) -> list[KVCache]:
    return [KVCache(kind) for _ in range(config.num_transformer_layers)]
