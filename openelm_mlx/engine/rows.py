"""The keys and values of sequences of different lengths that are stepped together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openelm_mlx.device import mx
from openelm_mlx.model.cache import BLOCK, KVCache
from openelm_mlx.model.cache_kinds import Arrays, CacheKind, resized
from openelm_mlx.model.kernels.kernel import writes_in_place

if TYPE_CHECKING:
    from openelm_mlx.model.config import OpenELMConfig

SHARED_BLOCK = 64  # each row attends to all slots, so unused ones cost more than in a single row


def quarters(n: int, least: int = 1) -> int:
    """Round up to a quarter of a power of two: few sizes, so few traces, and little is unused."""
    step = max(least, 1 << max((n - 1).bit_length() - 2, 0))
    return -(-n // step) * step


class Rows:
    """The caches of `count` rows; arrays are [2, count, kv_heads, slots, n] as in `cache_kinds`.

    A step borrows the buffers with `lend` and replaces them with `restore`. Where a kernel
    stores (model/kernels), both are the same memory: nobody else may have it. The twin's step
    copies a buffer to which another reference is left. The caller knows how many tokens each row
    has; `written` is one past the last position that was ever written to.
    """

    def __init__(self, config: OpenELMConfig, kind: CacheKind) -> None:
        self.config, self.kind = config, kind
        self.buffers: list[Arrays] = []  # one entry a layer; none before the first row
        self.written = [0]

    @property
    def count(self) -> int:
        """The number of rows, unused ones included."""
        return len(self.written)

    def slots_for(self, tokens: int) -> int:
        """Return the slots of each row for this many tokens: in blocks of 256 for a single row."""
        wanted = quarters(tokens, SHARED_BLOCK) if self.count > 1 else tokens
        return self.kind.layout.slots_for(wanted, BLOCK if self.count == 1 else 1)

    @property
    def capacity(self) -> int:
        """The slots that each row has."""
        return self.buffers[0][0].shape[-2] if self.buffers else 0

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.buffers for array in arrays)

    def settle(self) -> None:
        """Wait for the passes under way, where a kernel writes to the buffers in place.

        MLX does not know of what it writes, so only the next pass, which needs its outputs, may be
        submitted before: anything else that reads the buffers could be run before the kernel.
        """
        if writes_in_place():
            mx.eval(self.buffers)

    def place(self, row: int, cache: KVCache) -> None:
        """Copy the cache of one sequence into a row.

        A single row takes over the arrays, and the cache is empty afterwards.
        """
        cache.reserve(cache.offset)  # the same in all layers
        self.written[row] = cache.written
        if self.count == 1:
            # a prompt that fills its block to the end left views of all heads, not buffers
            self.buffers = [[mx.contiguous(a) for a in arrays] for arrays in cache.arrays]
            cache.clear()
            return
        self.settle()
        slots = max(self.capacity, self.slots_for(cache.offset))
        used = min(slots, cache.capacity)
        old = self.buffers or [
            [resized(a[..., :0, :], slots) for a in arrays] for arrays in cache.arrays
        ]
        self.buffers = [
            [resized(resized(array, slots), self.count, axis=1) for array in arrays]
            for arrays in old
        ]
        for arrays, new in zip(self.buffers, cache.arrays, strict=True):
            for array, part in zip(arrays, new, strict=True):
                array[:, row : row + 1, :, :used] = part[..., :used, :]

    def extract(self, row: int, length: int) -> KVCache:
        """Return the first `length` tokens of a row as a cache of its own.

        A single row gives its arrays away, and is empty afterwards. The cache is empty if the
        row does not have the tokens.
        """
        if not self.buffers or length > self.written[row]:
            return KVCache(self.config, self.kind)
        self.settle()
        cache = KVCache(self.config, self.kind, self.buffers, length, self.written[row])
        if self.count > 1:
            return cache.row(row, length)
        self.buffers, self.written = [], [0]
        return cache

    def resize(self, rows: list[int], count: int) -> None:
        """Keep these rows, in this order, as rows 0, 1, ... of `count`; the others are unused."""
        if not rows:
            self.buffers = []
        self.settle()
        if rows != list(range(len(rows))):
            index = mx.array(rows, dtype=mx.int32)
            self.buffers = [
                [mx.contiguous(mx.take(a, index, axis=1)) for a in arrays]
                for arrays in self.buffers
            ]
        self.buffers = [[resized(a, count, axis=1) for a in arrays] for arrays in self.buffers]
        self.written = [self.written[row] for row in rows] + [0] * (count - len(rows))

    def lend(self, ends: list[int]) -> list[Arrays]:
        """Hand out the buffers to a step that writes positions below `ends[row]`, 0 if unused.

        They are enlarged if necessary, and shrunk if half of them is enough.
        """
        self.written = [
            max(old, end) if end else 0 for old, end in zip(self.written, ends, strict=True)
        ]
        slots, capacity = self.slots_for(max(1, *ends)), self.capacity
        if not slots <= capacity < 2 * slots or capacity != self.slots_for(capacity):
            self.settle()
            self.buffers = [[resized(a, slots) for a in arrays] for arrays in self.buffers]
        return self.buffers

    def restore(self, buffers: list[Arrays]) -> None:
        """Take the buffers that a step has made."""
        self.buffers = buffers
