"""How keys and values are kept: in which form (`Store`) and in which slots (`Layout`).

A cache is one of each. Every array of a store is [2, B, kv_heads, slots, width]: the keys of B
sequences, then their values, so that a token writes both at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.device import mx
from openelm_mlx.errors import CacheError

if TYPE_CHECKING:
    from openelm_mlx.model.config import OpenELMConfig

Arrays = list[mx.array]
Mask = mx.array | str | None

SLACK = 32  # slots of a window beyond its size: rejected drafts overwrite nothing still in sight


class CacheOptions(Protocol):
    """What `CacheKind.of` reads of the engine's options."""

    @property
    def kv_bits(self) -> int | None: ...
    @property
    def kv_window(self) -> int | None: ...
    @property
    def kv_keep(self) -> int: ...


def sdpa(q: mx.array, k: mx.array, v: mx.array, mask: Mask, scale: float) -> mx.array:
    """Return the attention of q [B, heads, L, D] over k, v [B, kv_heads, T, D].

    Grouped heads are native to the kernel.
    """
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def halves(buffer: mx.array) -> tuple[mx.array, mx.array]:
    """Return the keys and the values of a store's array as views [B, kv_heads, slots, width]."""
    if (
        buffer.shape[1] == 1
    ):  # one view fewer than below; of several new ones, flattening would copy
        keys, values = mx.split(buffer.flatten(0, 1), 2)
    else:
        keys, values = (half.squeeze(0) for half in mx.split(buffer, 2))  # an index would copy
    return keys, values


def resized(array: mx.array, size: int, axis: int = -2) -> mx.array:
    """Return the array with another size along an axis, that of the slots: cut, or with zeros
    added.
    """
    extra = size - array.shape[axis]
    if extra < 0:
        return mx.contiguous(mx.split(array, [size], axis)[0])
    if extra > 0:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, extra)
        return mx.pad(array, widths)  # twice as fast as zeros that are concatenated
    return array


@lru_cache(maxsize=64)
def slot_numbers(capacity: int) -> mx.array:
    """0, 1, ... evaluated, so that no step computes them again."""
    numbers = mx.arange(capacity)
    mx.eval(numbers)
    return numbers


def causal_mask(length: int, total: int) -> mx.array:
    """Return [length, total]: what the last `length` of `total` tokens see, which is up to
    themselves.
    """
    return mx.arange(total) <= mx.arange(total - length, total)[:, None]


@dataclass(frozen=True)
class Plain:
    """Keys and values in the type they were computed in."""

    def pack(self, kv: mx.array) -> Arrays:
        return [kv]

    def attend(self, q: mx.array, arrays: Arrays, mask: Mask, scale: float) -> mx.array:
        return sdpa(q, *halves(arrays[0]), mask, scale)

    def bytes_per_head(self, head_dim: int, itemsize: int) -> float:
        return head_dim * itemsize


@dataclass(frozen=True)
class Quantized:
    """Affine-quantized keys and values, packed when they are written; attention reads them packed.

    Every token attends to the packed form of every other, itself included, so the result does not
    depend on where a prompt was cut into chunks.
    """

    bits: int
    group_size: int

    def pack(self, kv: mx.array) -> Arrays:
        return list(mx.quantize(kv, group_size=self.group_size, bits=self.bits))

    def attend(self, q: mx.array, arrays: Arrays, mask: Mask, scale: float) -> mx.array:
        B, heads, L, D = q.shape
        (k, k_scales, k_biases), (v, v_scales, v_biases) = zip(*map(halves, arrays), strict=True)
        kv_heads, T = k.shape[1:3]
        form: dict[str, Any] = {"group_size": self.group_size, "bits": self.bits}
        q = (q * scale).reshape(B, kv_heads, -1, D)  # the query heads of a key head side by side
        scores = mx.quantized_matmul(q, k, k_scales, k_biases, transpose=True, **form)
        scores = scores.reshape(B, kv_heads, -1, L, T)
        if isinstance(mask, str):
            mask = causal_mask(L, T)
        if mask is not None:
            mask = mask if mask.ndim == 2 else mask[:, :, None]  # [B, 1, L, T] -> [B, 1, 1, L, T]
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, kv_heads, -1, T)
        out = mx.quantized_matmul(weights, v, v_scales, v_biases, transpose=False, **form)
        return out.reshape(B, heads, L, D)

    def bytes_per_head(self, head_dim: int, itemsize: int) -> float:
        return head_dim * self.bits / 8 + 2 * itemsize * head_dim / self.group_size


@dataclass(frozen=True)
class Growing:
    """The token at position p lies in slot p; every earlier token is seen."""

    def room(self, tokens: int, block: int) -> int:
        """Return the slots that this many tokens take in whole blocks."""
        return -(-tokens // block) * block

    def slots(self, positions: mx.array) -> mx.array:
        return positions

    def visible(self, positions: mx.array, capacity: int) -> mx.array:
        """Return [..., L, capacity]: the slots that the tokens at positions [..., L] attend to."""
        return slot_numbers(capacity) <= positions[..., None]


@dataclass(frozen=True)
class Window:
    """The first `keep` tokens and the latest, `size` in all; their positions stay absolute.

    The kept ones are attention sinks (arXiv:2309.17453).
    Later tokens overwrite the oldest in a ring of slots behind the kept ones.
    """

    size: int
    keep: int

    @property
    def capacity(self) -> int:
        return self.size + SLACK

    @property
    def ring(self) -> int:
        return self.capacity - self.keep

    def room(self, tokens: int, block: int) -> int:
        """Return the number of its slots, however many tokens there are."""
        return self.capacity

    def slots(self, positions: mx.array) -> mx.array:
        return mx.where(
            positions < self.keep, positions, self.keep + (positions - self.keep) % self.ring
        )

    def held(self, newest: mx.array) -> mx.array:
        """Return the position of the token in each slot [..., capacity] when `newest` [..., 1] is
        last.

        Nothing is there yet where it is less than 0, or than `keep` behind the kept slots.
        """
        slots = slot_numbers(self.capacity)
        return mx.where(slots < self.keep, slots, newest - (newest - slots) % self.ring)

    def sees(self, positions: mx.array, held: mx.array, ring_slots: mx.array) -> mx.array:
        """Return [..., L, T]: whether tokens at positions [..., L] attend to those at held [...,
        T].
        """
        p, h = positions[..., None], held[..., None, :]
        recent = (h >= self.keep) & (h > p - (self.size - self.keep))
        return (h <= p) & mx.where(ring_slots, recent, h >= 0)

    def visible(self, positions: mx.array, capacity: int) -> mx.array:
        return self.sees(
            positions, self.held(positions[..., -1:]), slot_numbers(self.capacity) >= self.keep
        )


Store = Plain | Quantized
Layout = Growing | Window


@dataclass(frozen=True)
class CacheKind:
    """What a compiled step must know of a cache; equal kinds share their steps."""

    store: Store = Plain()
    layout: Layout = Growing()

    def __str__(self) -> str:
        """Return "8-bit keys and values, group 64, window 512 of which the first 4 stay"."""
        store = self.store
        form = "plain keys and values"
        if isinstance(store, Quantized):
            form = f"{store.bits}-bit keys and values, group {store.group_size}"
        if isinstance(self.layout, Window):
            form += f", window {self.layout.size} of which the first {self.layout.keep} stay"
        return form

    @classmethod
    def of(cls, config: OpenELMConfig, options: CacheOptions) -> CacheKind:
        """Return the kind that `options` ask for.

        Raises `CacheError` where the model's heads cannot be quantized so.
        """
        store: Store = Plain()
        if options.kv_bits is not None:
            sizes = [size for size in (64, 32) if config.head_dim % size == 0]
            if not sizes:
                raise CacheError(
                    f"kv_bits {options.kv_bits} needs heads of a multiple of 32; "
                    f"this model's have {config.head_dim}"
                )
            store = Quantized(options.kv_bits, sizes[0])
        if options.kv_window is None or options.kv_window >= config.max_context_length:
            return cls(store)  # a window that no context fills would only take memory
        return cls(store, Window(options.kv_window, options.kv_keep))

    def bytes_per_token(self, config: OpenELMConfig, itemsize: int) -> int:
        """Bytes of keys and values that one token adds, over all layers."""
        from openelm_mlx.model.config import layer_shapes

        heads = sum(2 * shape.kv_heads for shape in layer_shapes(config))
        return int(heads * self.store.bytes_per_head(config.head_dim, itemsize))
