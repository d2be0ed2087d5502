"""How keys and values are stored: plain or quantized (`Store`), and in which slots (`Layout`).

A cache has one of each. Every array of a store is [2, B, kv_heads, slots, n]: the keys of B
sequences, then their values, so that a token writes both at once. n is head_dim, or the number of
packed words, scales or biases of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from openelm_mlx.device import kind, mx
from openelm_mlx.errors import CacheError
from openelm_mlx.model.config import OpenELMConfig, layer_shapes

Arrays = list[mx.array]
Mask = mx.array | str | None

SLACK = 32  # slots of a window beyond its size: rejected drafts overwrite nothing that is visible


def sdpa(q: mx.array, k: mx.array, v: mx.array, mask: Mask, scale: float) -> mx.array:
    """Return the attention of q [B, heads, L, D] over k and v [B, kv_heads, T, D].

    The kernel repeats key/value heads itself.
    """
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def halves(buffer: mx.array) -> tuple[mx.array, mx.array]:
    """Return the keys and the values of a store's array as views [B, kv_heads, slots, n]."""
    if buffer.shape[1] == 1:  # one view fewer than below, where flattening would copy
        keys, values = mx.split(buffer.flatten(0, 1), 2)
    else:
        keys, values = (half.squeeze(0) for half in mx.split(buffer, 2))  # an index would copy
    return keys, values


def copied(buffer: mx.array) -> mx.array:
    """Return a copy of a store's array, or of a view of one: a kernel may write to the original.

    A concatenation copies; `mx.contiguous` would share the buffer of an entire array.
    """
    return mx.concatenate(list(mx.split(buffer, 2)))


def resized(array: mx.array, size: int, axis: int = -2) -> mx.array:
    """Return the array cut or padded with zeros to `size` along an axis, by default the slots.

    It is a copy, or the array itself if it has that size.
    """
    extra = size - array.shape[axis]
    if extra < 0:
        return mx.contiguous(mx.split(array, [size], axis)[0])
    if extra > 0:
        added = [(0, 0)] * array.ndim
        added[axis] = (0, extra)
        return mx.pad(array, added)  # twice as fast as zeros that are concatenated
    return array


@lru_cache(maxsize=64)
def slot_numbers(capacity: int) -> mx.array:
    """Return 0, 1, ... evaluated, so that no step computes them again."""
    numbers = mx.arange(capacity)
    mx.eval(numbers)
    return numbers


def causal_mask(length: int, total: int) -> mx.array:
    """Return [length, total]: each of the last `length` of `total` tokens sees up to itself."""
    return mx.arange(total) <= mx.arange(total - length, total)[:, None]


@dataclass(frozen=True)
class Plain:
    """Keys and values in the type in which they were computed."""

    def pack(self, kv: mx.array) -> Arrays:
        """Return the arrays to store for keys and values [2, B, kv_heads, L, D]."""
        return [kv]

    def attend(self, q: mx.array, arrays: Arrays, mask: Mask, scale: float) -> mx.array:
        """Return the attention of q [B, heads, L, D] over stored arrays, [B, heads, L, D]."""
        return sdpa(q, *halves(arrays[0]), mask, scale)

    def bytes_per_head(self, head_dim: int, itemsize: int) -> float:
        """Return the bytes of one token in one key or value head."""
        return head_dim * itemsize


@dataclass(frozen=True)
class Quantized:
    """Affine-quantized keys and values; attention reads them packed. The methods are as of `Plain`.

    Every token attends to quantized keys and values, also to its own, so the result does not depend
    on where a prompt was cut into chunks.
    """

    bits: int
    group_size: int

    def pack(self, kv: mx.array) -> Arrays:
        return list(mx.quantize(kv, group_size=self.group_size, bits=self.bits))

    def attend(self, q: mx.array, arrays: Arrays, mask: Mask, scale: float) -> mx.array:
        B, heads, L, D = q.shape
        if kind() == "cuda" and not isinstance(mask, mx.array):
            # Its products of packed matrices take no part of an array. A step has a mask and whole
            # arrays: a copy of those would not wait for the kernel that stores.
            arrays = [mx.contiguous(array) for array in arrays]
        (k, k_scales, k_biases), (v, v_scales, v_biases) = zip(*map(halves, arrays), strict=True)
        kv_heads, T = k.shape[1:3]
        spec: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        q = (q * scale).reshape(B, kv_heads, -1, D)  # the query heads of a key head side by side
        scores = mx.quantized_matmul(q, k, k_scales, k_biases, transpose=True, **spec)
        scores = scores.reshape(B, kv_heads, -1, L, T)
        if isinstance(mask, str):
            mask = causal_mask(L, T)
        if mask is not None:
            mask = mask if mask.ndim == 2 else mask[:, :, None]  # [B, 1, L, T] -> [B, 1, 1, L, T]
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, kv_heads, -1, T)
        out = mx.quantized_matmul(weights, v, v_scales, v_biases, transpose=False, **spec)
        return out.reshape(B, heads, L, D)

    def bytes_per_head(self, head_dim: int, itemsize: int) -> float:
        return head_dim * self.bits / 8 + 2 * itemsize * head_dim / self.group_size


@dataclass(frozen=True)
class Growing:
    """The token at position p is in slot p, and sees every earlier one."""

    def slots_for(self, tokens: int, block: int) -> int:
        """Return the number of slots for this many tokens, a multiple of `block`."""
        return -(-tokens // block) * block

    def slots(self, positions: mx.array) -> mx.array:
        """Return the slots of the tokens at these positions, of any shape."""
        return positions

    def visible(self, positions: mx.array, capacity: int) -> mx.array:
        """Return [..., L, capacity]: the slots that the tokens at positions [..., L] attend to."""
        return slot_numbers(capacity) <= positions[..., None]


@dataclass(frozen=True)
class Window:
    """The first `keep` tokens and the latest, `size` in all; their positions stay absolute.

    The first ones are attention sinks (arXiv:2309.17453). Later tokens overwrite the oldest in a
    ring of slots after theirs. The methods are as of `Growing`.
    """

    size: int
    keep: int

    @property
    def capacity(self) -> int:
        """The number of slots."""
        return self.size + SLACK

    @property
    def ring(self) -> int:
        """The number of slots that are overwritten."""
        return self.capacity - self.keep

    def slots_for(self, tokens: int, block: int) -> int:
        return self.capacity  # however many tokens there are

    def slots(self, positions: mx.array) -> mx.array:
        return mx.where(
            positions < self.keep, positions, self.keep + (positions - self.keep) % self.ring
        )

    def stored(self, newest: mx.array) -> mx.array:
        """Return the position of the token in each slot, [..., capacity].

        `newest` [..., 1] is the position of the latest token. A slot is empty if it is below 0,
        or in the ring below `keep`.
        """
        slots = slot_numbers(self.capacity)
        return mx.where(slots < self.keep, slots, newest - (newest - slots) % self.ring)

    def sees(self, positions: mx.array, stored: mx.array, ring_slots: mx.array) -> mx.array:
        """Return whether tokens at positions [..., L] attend to those at `stored` [..., T].

        The result is [..., L, T]; `ring_slots` [T] says which of the T are in the ring.
        """
        p, s = positions[..., None], stored[..., None, :]
        recent = (s >= self.keep) & (s > p - (self.size - self.keep))
        return (s <= p) & mx.where(ring_slots, recent, s >= 0)

    def visible(self, positions: mx.array, capacity: int) -> mx.array:
        return self.sees(
            positions, self.stored(positions[..., -1:]), slot_numbers(self.capacity) >= self.keep
        )


Store = Plain | Quantized
Layout = Growing | Window


class CacheOptions(Protocol):
    """The options of a cache, which `EngineOptions` has."""

    @property
    def kv_bits(self) -> int | None: ...
    @property
    def kv_window(self) -> int | None: ...
    @property
    def kv_keep(self) -> int: ...


@dataclass(frozen=True)
class CacheKind:
    """The settings of a cache for which a step is compiled; equal kinds share their steps."""

    store: Store = Plain()
    layout: Layout = Growing()

    def __str__(self) -> str:
        """Return "8-bit keys and values, group 64, window 512 of which the first 4 stay"."""
        store = self.store
        text = "plain keys and values"
        if isinstance(store, Quantized):
            text = f"{store.bits}-bit keys and values, group {store.group_size}"
        if isinstance(self.layout, Window):
            text += f", window {self.layout.size} of which the first {self.layout.keep} stay"
        return text

    @classmethod
    def of(cls, config: OpenELMConfig, options: CacheOptions) -> CacheKind:
        """Return the kind that `options` name.

        Raises `CacheError` if a head of the model is not a multiple of a quantization group.
        """
        store: Store = Plain()
        if options.kv_bits is not None:
            sizes = [size for size in (64, 32) if config.head_dim % size == 0]
            if not sizes:
                what = f"kv_bits {options.kv_bits} needs heads of a multiple of 32"
                raise CacheError(f"{what}; this model's have {config.head_dim}")
            store = Quantized(options.kv_bits, sizes[0])
        if options.kv_window is None or options.kv_window >= config.max_context_length:
            return cls(store)  # a window that no context fills would only take memory
        return cls(store, Window(options.kv_window, options.kv_keep))

    def bytes_per_token(self, config: OpenELMConfig, itemsize: int) -> int:
        """Return the bytes of keys and values that one token adds, over all layers."""
        heads = sum(2 * shape.kv_heads for shape in layer_shapes(config))
        return int(heads * self.store.bytes_per_head(config.head_dim, itemsize))


class Place:
    """The positions, slots and masks of the tokens of one pass, computed once for all layers.

    `start` has the position of each row's first token [B], or of every token of the pass [B, L].
    """

    def __init__(self, start: mx.array, kind: CacheKind, capacity: int) -> None:
        self.start, self.kind, self.capacity = start, kind, capacity
        self._positions: dict[int, mx.array] = {}
        self._slots: dict[tuple[int, ...], mx.array] = {}
        self._masks: dict[tuple[int, int], mx.array] = {}

    def positions(self, length: int) -> mx.array:
        """Return the positions of the tokens, [B, length]."""
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
        """Return which slots are visible, [B, heads, length, capacity], the same for every head."""
        if (length, heads) not in self._masks:
            positions = self.positions(length)[:, None]
            positions = mx.broadcast_to(positions, (positions.shape[0], heads, length))
            self._masks[length, heads] = self.kind.layout.visible(positions, self.capacity)
        return self._masks[length, heads]
