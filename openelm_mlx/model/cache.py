"""The keys and values of earlier tokens: the interface to the model, and the caches that have it.

The model does not know the kind of its cache. It asks for the positions of new tokens and for one
mask per pass, and lets the cache attend: `attend` takes the projection, stores new keys and values,
and returns the attention over everything stored. `KVCache` is for prefill and for Python; a
`StepCache` uses the same arrays inside a compiled step. The `CacheKind` of both determines how and
in which slots tokens are stored (cache_kinds.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.device import mx
from openelm_mlx.errors import CacheError
from openelm_mlx.model.cache_kinds import (
    Arrays,
    CacheKind,
    Mask,
    Place,
    Window,
    copied,
    halves,
    resized,
    sdpa,
)
from openelm_mlx.model.heads import Projection
from openelm_mlx.model.kernels.store_and_attend import store_and_attend

if TYPE_CHECKING:
    from openelm_mlx.model.config import OpenELMConfig

BLOCK = 256  # slots by which one sequence grows; a step is traced again each time


class Cache(Protocol):
    """The keys and values of one layer, as a pass sees them."""

    def positions(self, length: int) -> mx.array:
        """Return the positions of the tokens of this pass, [B or 1, length]."""

    def mask(self, length: int) -> Mask:
        """Return which stored tokens each of the pass sees; None if each sees all."""

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        """Store new keys and values; return the attention over all of them, [B, heads, L, D]."""


def causal(length: int) -> Mask:
    """Return the mask of tokens that see all earlier ones."""
    return "causal" if length > 1 else None


class NoCache:
    """A cache for a single pass over the entire text, which keeps nothing."""

    def positions(self, length: int) -> mx.array:
        return mx.arange(length)[None]

    def mask(self, length: int) -> Mask:
        return causal(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        return sdpa(q, *halves(kv), mask, scale)


class KVCache:
    """The keys and values of all layers for one sequence, or for several of equal length.

    A growing cache has every token and grows in blocks; a window has a fixed number of slots. No
    two caches share a buffer, as steps may write to them in place. `offset` counts the tokens. It
    advances when the last layer has stored them, so a pass that ends with an exception does not
    change it. `written` is one past the highest position at which a write ever began: by it a
    window knows what is overwritten.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        kind: CacheKind | None = None,
        arrays: list[Arrays] | None = None,
        offset: int = 0,
        written: int = 0,
    ) -> None:
        self.config, self.kind = config, kind or CacheKind()
        self.arrays = arrays or []  # one entry a layer; none before the first tokens
        self.offset, self.written = offset, max(written, offset)

    @property
    def layers(self) -> list[LayerCache]:
        """The cache of each layer; mlx-lm's convention passes caches in such a list."""
        return [LayerCache(self, number) for number in range(self.config.num_transformer_layers)]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for arrays in self.arrays for array in arrays)

    @property
    def capacity(self) -> int:
        """The slots of the last layer; after an interrupted pass the first layers have more."""
        return self.arrays[-1][0].shape[-2] if self.arrays else 0

    def positions(self, length: int) -> mx.array:
        """Return the positions of the next tokens, [1, length].

        Raises `CacheError` if an interrupted pass has overwritten what a window still needs.
        """
        if not self.can_trim(0):
            what = "an interrupted pass has overwritten tokens of this cache"
            raise CacheError(f"{what}; clear it and prefill again")
        return mx.arange(self.offset, self.offset + length)[None]

    def mask(self, length: int) -> Mask:
        layout = self.kind.layout
        if not isinstance(layout, Window):
            return causal(length)
        new = self.positions(length)
        stored, ring_slots = new, new[0] >= layout.keep
        if self.offset:  # what is stored before this pass, then the pass itself
            before = layout.stored(mx.array([[self.offset - 1]]))
            before = mx.where(before < self.offset, before, -1)  # first slots not yet written
            stored = mx.concatenate([before, new], axis=1)
            ring_slots = mx.concatenate([mx.arange(layout.capacity) >= layout.keep, ring_slots])
        return layout.sees(new, stored, ring_slots)[:, None]

    def reserve(self, tokens: int) -> None:
        """Give every layer the slots for `tokens` in all, in blocks or an entire window.

        Raises `CacheError` before the first tokens, which give shapes and types.
        """
        if not self.arrays:
            what = "an empty cache cannot be enlarged before its first tokens"
            raise CacheError(f"{what}; prefill first")
        most = self.arrays[0][0].shape[-2]  # after an interrupted pass others have less
        slots = max(most, self.kind.layout.slots_for(tokens, BLOCK))
        self.arrays = [[resized(array, slots) for array in arrays] for arrays in self.arrays]

    def can_trim(self, n: int) -> bool:
        """Return whether the last n tokens can be dropped: a window has overwritten older ones."""
        layout = self.kind.layout
        if not isinstance(layout, Window) or self.written <= layout.capacity:
            return True
        return self.written - (self.offset - n) <= layout.capacity - layout.size

    def clear(self) -> None:
        """Forget everything, and free the memory."""
        self.arrays, self.offset, self.written = [], 0, 0

    def prefix(self, length: int) -> KVCache | None:
        """Return a copy of the first `length` tokens, None if a window has dropped any of them."""
        if not 0 < length <= self.offset or not self.can_trim(self.offset - length):
            return None
        return self.row(slice(None), length)

    def row(self, rows: int | slice, length: int) -> KVCache:
        """Return a copy of the first `length` tokens of one of the sequences, or of several."""
        rows = slice(rows, rows + 1) if isinstance(rows, int) else rows
        slots = self.kind.layout.slots_for(length, 1)
        arrays = [[copied(a[:, rows, :, :slots]) for a in layer] for layer in self.arrays]
        mx.eval(arrays)  # else they would keep the originals alive, and see what is written there
        return KVCache(self.config, self.kind, arrays, length, self.written)


class LayerCache:
    """One layer of a `KVCache`."""

    def __init__(self, cache: KVCache, number: int) -> None:
        self.cache, self.number = cache, number

    def positions(self, length: int) -> mx.array:
        return self.cache.positions(length)

    def mask(self, length: int) -> Mask:
        return self.cache.mask(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        cache, store, layout = self.cache, self.cache.kind.store, self.cache.kind.layout
        new, start, end = store.pack(kv), cache.offset, cache.offset + kv.shape[-2]
        cache.written = max(cache.written, end)  # before the write, which may be interrupted
        buffers = self._buffers(end, new)
        if isinstance(layout, Window):  # the pass attends to what it is about to overwrite
            seen = [mx.concatenate([a, b], axis=-2) for a, b in zip(buffers, new, strict=True)]
            out = store.attend(q, seen if start else new, mask, scale)
            kept = [p for p in range(start, end) if p < layout.keep or p >= end - layout.ring]
            source, slots = mx.array(kept) - start, layout.slots(mx.array(kept))
            for buffer, part in zip(buffers, new, strict=True):
                buffer[..., slots, :] = mx.take(part, source, axis=-2)
        else:
            for buffer, part in zip(buffers, new, strict=True):
                buffer[..., start:end, :] = part
            out = store.attend(q, [buffer[..., :end, :] for buffer in buffers], mask, scale)
        if self.number + 1 == cache.config.num_transformer_layers:
            cache.offset = end
        return out

    def _buffers(self, tokens: int, like: Arrays) -> Arrays:
        """Return the arrays of this layer, enlarged for `tokens`; the first are made as `like`."""
        cache = self.cache
        if self.number == len(cache.arrays):
            cache.arrays.append([array[..., :0, :] for array in like])
        buffers = cache.arrays[self.number]
        slots = max(buffers[0].shape[-2], cache.kind.layout.slots_for(tokens, BLOCK))
        cache.arrays[self.number] = buffers = [resized(array, slots) for array in buffers]
        return buffers


class StepCache:
    """One layer inside a compiled step: its arrays keep their size, and positions are arrays too.

    It attends to every slot and masks those that are not visible, so shapes never change. On a GPU
    the arrays given are written to in place, by a kernel of which MLX does not know that it does
    (docs/architecture.md, "Keys and values").
    """

    def __init__(self, arrays: Arrays, place: Place) -> None:
        self.arrays, self.place = arrays, place

    def positions(self, length: int) -> mx.array:
        return self.place.positions(length)

    def mask(self, length: int) -> Mask:
        return self.place.mask(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        out, self.arrays = store_and_attend(projection, self.arrays, self.place, mask, scale)
        return out


def step_caches(buffers: list[Arrays], start: mx.array, kind: CacheKind) -> list[StepCache]:
    """Return the caches of a compiled step, one a layer; `start` is that of `Place`."""
    place = Place(start, kind, buffers[0][0].shape[-2])
    return [StepCache(arrays, place) for arrays in buffers]


class ForeignCache:
    """Wraps a cache of mlx-lm (plain, rotating, batched), so that its tools can run the model."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def positions(self, length: int) -> mx.array:
        offset = self.inner.offset
        start = offset[:, None] if isinstance(offset, mx.array) and offset.ndim else offset
        return (start + mx.arange(length)).reshape(-1, length)

    def mask(self, length: int) -> Mask:
        mask: Mask = self.inner.make_mask(length, return_array=False, window_size=None)
        return mask

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        k, v = self.inner.update_and_fetch(*halves(kv))
        if hasattr(self.inner, "bits"):  # quantized keys and values need mlx-lm's own attention
            from mlx_lm.models.base import quantized_scaled_dot_product_attention

            how: Any = {"group_size": self.inner.group_size, "bits": self.inner.bits, "mask": mask}
            return quantized_scaled_dot_product_attention(q, k, v, scale=scale, **how)
        return sdpa(q, k, v, mask, scale)


def as_caches(cache: KVCache | list[Any] | None, layers: int) -> list[Cache]:
    """Return the caches of a pass, one a layer: `NoCache`, ours, or mlx-lm's behind an adapter.

    Raises `CacheError` for a list of another length.
    """
    if cache is None:
        return [NoCache()] * layers
    each = cache.layers if isinstance(cache, KVCache) else cache
    if len(each) != layers:
        what = f"the cache has {len(each)} entries for a model of {layers} layers"
        raise CacheError(f"{what}; make one for this model")
    return [
        c if hasattr(c, "attend") else NoCache() if c is None else ForeignCache(c) for c in each
    ]
