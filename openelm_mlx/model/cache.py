"""Keys and values of the tokens already seen: the contract and its sides.

The model never asks what it holds. It asks for the positions of new tokens, for one mask a pass,
and lets the cache attend: `attend` gets what the projection gave, stores new keys and values, and
returns the attention over everything held. `KVCache` is the side that prefill and Python see,
`StepCache` the same arrays inside a compiled step. In which form and in which slots tokens are kept
is the `CacheKind` of both (kv.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.device import mx
from openelm_mlx.errors import CacheError
from openelm_mlx.model.cache_kinds import (
    Arrays,
    CacheKind,
    Mask,
    Plain,
    Window,
    halves,
    resized,
    sdpa,
)

if TYPE_CHECKING:
    from openelm_mlx.model.config import OpenELMConfig
    from openelm_mlx.model.decoder import Projection

BLOCK = 256  # tokens by which the room of one sequence grows: each time, a step is traced anew


class Cache(Protocol):
    """The keys and values of one layer, as a pass sees them."""

    def positions(self, length: int) -> mx.array:
        """Return the positions of the tokens of this pass, [B or 1, length]."""

    def mask(self, length: int) -> Mask: ...
    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        """Store new keys and values; return the attention over everything held, [B, heads, L,
        D].
        """


def causal(length: int) -> Mask:
    return "causal" if length > 1 else None


class NoCache:
    """A single pass over the whole text: nothing is kept."""

    def positions(self, length: int) -> mx.array:
        return mx.arange(length)[None]

    def mask(self, length: int) -> Mask:
        return causal(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        return sdpa(q, *halves(kv), mask, scale)


class KVCache:
    """The keys and values of all layers for one sequence, or for several of equal length.

    A growing one holds every token and grows in blocks; a window holds its fixed number of slots.
    `offset` counts the tokens held. It moves on when the last layer has stored, so a pass that an
    exception ends leaves it where it was. `written` is the highest position, plus one, that was
    ever begun to be written: it tells what a window has overwritten.
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
        """What a pass sees, layer by layer: mlx-lm's convention passes caches so."""
        return [LayerCache(self, number) for number in range(self.config.num_transformer_layers)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.arrays for array in arrays)

    @property
    def capacity(self) -> int:
        """The slots that every layer has; after an interrupted pass the first ones have more."""
        return self.arrays[-1][0].shape[-2] if self.arrays else 0

    def positions(self, length: int) -> mx.array:
        """Return the positions of the next tokens, [1, length].

        Raises `CacheError` where an interrupted pass has overwritten what a window still needs.
        """
        if not self.can_trim(0):
            raise CacheError(
                "an interrupted pass has overwritten what this cache held; "
                "clear it and prefill again"
            )
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

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in all: in whole blocks or a whole window, the same in every
        layer.

        Raises `CacheError` before the first tokens, which give shapes and types.
        """
        if not self.arrays:
            raise CacheError(
                "an empty cache cannot be enlarged before its first tokens; prefill first"
            )
        most = self.arrays[0][0].shape[-2]  # after an interrupted pass others have less
        room = max(most, self.kind.layout.room(tokens, BLOCK))
        self.arrays = [[resized(array, room) for array in arrays] for arrays in self.arrays]

    def can_trim(self, n: int) -> bool:
        """Tell whether the last n tokens can be forgotten: a window drops what was before them."""
        layout = self.kind.layout
        if not isinstance(layout, Window) or self.written <= layout.capacity:
            return True
        return self.written - (self.offset - n) <= layout.capacity - layout.size

    def clear(self) -> None:
        """Forget everything, and let go of the memory."""
        self.arrays, self.offset, self.written = [], 0, 0

    def prefix(self, length: int) -> KVCache | None:
        """Return a copy of the first `length` tokens; None where a window has dropped some of
        them.
        """
        if not 0 < length <= self.offset or not self.can_trim(self.offset - length):
            return None
        return self.row(slice(None), length)

    def row(self, rows: int | slice, length: int) -> KVCache:
        """Return a copy of the first `length` tokens of one of several sequences, or of some."""
        rows = slice(rows, rows + 1) if isinstance(rows, int) else rows
        slots = self.kind.layout.room(length, 1)
        arrays = [[mx.contiguous(a[:, rows, :, :slots]) for a in held] for held in self.arrays]
        mx.eval(arrays)  # else they would hold on to the whole
        return KVCache(self.config, self.kind, arrays, length, self.written)


class LayerCache:
    """What a pass sees of one layer of a `KVCache`."""

    def __init__(self, whole: KVCache, number: int) -> None:
        self.whole, self.number = whole, number

    def positions(self, length: int) -> mx.array:
        return self.whole.positions(length)

    def mask(self, length: int) -> Mask:
        return self.whole.mask(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        whole, store, layout = self.whole, self.whole.kind.store, self.whole.kind.layout
        new, start, end = store.pack(kv), whole.offset, whole.offset + kv.shape[-2]
        whole.written = max(whole.written, end)  # before a slot is: this may be interrupted
        held = self._room(end, new)
        if isinstance(layout, Window):  # the pass attends to what it is about to overwrite
            seen = [mx.concatenate([a, b], axis=-2) for a, b in zip(held, new, strict=True)]
            out = store.attend(q, seen if start else new, mask, scale)
            kept = [p for p in range(start, end) if p < layout.keep or p >= end - layout.ring]
            source, slots = mx.array(kept) - start, layout.slots(mx.array(kept))
            for buffer, part in zip(held, new, strict=True):
                buffer[..., slots, :] = mx.take(part, source, axis=-2)
        else:
            for buffer, part in zip(held, new, strict=True):
                buffer[..., start:end, :] = part
            out = store.attend(q, [buffer[..., :end, :] for buffer in held], mask, scale)
        if self.number + 1 == whole.config.num_transformer_layers:
            whole.offset = end
        return out

    def _room(self, tokens: int, like: Arrays) -> Arrays:
        """Return the arrays of this layer with room for `tokens`; at first they are made as
        `like`.
        """
        whole = self.whole
        if self.number == len(whole.arrays):
            whole.arrays.append([array[..., :0, :] for array in like])
        held = whole.arrays[self.number]
        room = max(held[0].shape[-2], whole.kind.layout.room(tokens, BLOCK))
        whole.arrays[self.number] = held = [resized(array, room) for array in held]
        return held


class Place:
    """Where the tokens of one pass go, computed once for all layers: positions, slots, masks.

    `start` holds the position of each row's first token [B], or of every token of the pass [B, L].
    """

    def __init__(self, start: mx.array, kind: CacheKind, capacity: int) -> None:
        self.start, self.kind, self.capacity = start, kind, capacity
        self._positions: dict[int, mx.array] = {}
        self._slots: dict[tuple[int, ...], mx.array] = {}
        self._masks: dict[tuple[int, int], mx.array] = {}

    def positions(self, length: int) -> mx.array:
        if length not in self._positions:
            start = self.start if self.start.ndim == 2 else self.start[:, None]
            ready = start.shape[1] == length
            self._positions[length] = start if ready else start + mx.arange(length)
        return self._positions[length]

    def slots(self, shape: tuple[int, ...]) -> mx.array:
        """Return the slot of each entry of new keys and values; layers of equal shapes share it."""
        if shape not in self._slots:
            slots = self.kind.layout.slots(self.positions(shape[-2]))
            self._slots[shape] = mx.broadcast_to(slots[:, None, :, None], shape)
        return self._slots[shape]

    def mask(self, length: int, heads: int = 1) -> mx.array:
        """Return which slots are in sight, [B, heads, length, capacity]: the same for every
        head.
        """
        if (length, heads) not in self._masks:
            positions = self.positions(length)[:, None]
            positions = mx.broadcast_to(positions, (positions.shape[0], heads, length))
            self._masks[length, heads] = self.kind.layout.visible(positions, self.capacity)
        return self._masks[length, heads]


class StepCache:
    """The arrays of one layer inside a compiled step: fixed in size, the positions arrays.

    It attends to every slot and masks what is not in sight, so shapes never change.
    """

    def __init__(self, arrays: Arrays, place: Place) -> None:
        self.arrays, self.place = arrays, place

    def positions(self, length: int) -> mx.array:
        return self.place.positions(length)

    def mask(self, length: int) -> Mask:
        return self.place.mask(length)

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        store = self.place.kind.store
        # put_along_axis is one kernel on a GPU; slice_update with an array start is two.
        self.arrays = [
            mx.put_along_axis(buffer, self.place.slots(part.shape), part, axis=-2)
            for buffer, part in zip(self.arrays, store.pack(kv), strict=True)
        ]
        rows, heads, asked, _ = q.shape
        if rows > 1 and isinstance(store, Plain):
            # Metal copies a mask that broadcasts over heads in every layer; one as wide as q is
            # read.
            mask = self.place.mask(kv.shape[-2], heads)[..., -asked:, :]
        return store.attend(q, self.arrays, mask, scale)


def step_caches(buffers: list[Arrays], start: mx.array, kind: CacheKind) -> list[StepCache]:
    """Return the caches of a compiled step, one a layer, over these buffers; `start` is
    `Place`'s.
    """
    place = Place(start, kind, buffers[0][0].shape[-2])
    return [StepCache(arrays, place) for arrays in buffers]


class ForeignCache:
    """mlx-lm's cache (plain, rotating, batched) behind this contract: its tools can drive the
    model.
    """

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

            form = {"group_size": self.inner.group_size, "bits": self.inner.bits}
            return quantized_scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, **form)  # type: ignore[arg-type]
        return sdpa(q, k, v, mask, scale)


def as_caches(cache: KVCache | list[Any] | None, layers: int) -> list[Cache]:
    """Return the caches of a pass, one a layer: none, ours, or mlx-lm's behind an adapter."""
    if cache is None:
        return [NoCache()] * layers
    each = cache.layers if isinstance(cache, KVCache) else cache
    if len(each) != layers:
        raise CacheError(
            f"the cache has {len(each)} entries for a model of {layers} layers; "
            "make one for this model"
        )
    return [
        c if hasattr(c, "attend") else NoCache() if c is None else ForeignCache(c) for c in each
    ]
