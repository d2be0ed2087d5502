"""llama.cpp's K-quants and IQ4: the search for scales, and the place of every bit.

The gguf package decodes these types, but encodes only older ones. A block has 256 weights in groups
of 16 or 32. A weight is d * s * q, or d * s * q - dmin * m: a code q of 2 to 6 bits, integers s and
m of its group, and float16 numbers d and dmin of its block. (IQ4's q is one of 16 levels, and a
block of IQ4_NL is one group with s = 1.) The search makes the squared error small:

    1. A group is rounded at several scales. For given codes the best scale and offset are a
       least-squares fit; the best of these fits stays.
    2. The scales of a block are rounded to integers in the same way.
    3. The neighbours of these integers are tried too, with codes and offsets rounded anew.

Arrays are [g, n], n groups of g weights, or [n], a number for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

BLOCK = 256
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of IQ4
IQ4 = np.array(LEVELS, np.float32)
STEPS = 16  # in a unit, of the table of the level that is nearest
IQ4_AT = IQ4[np.abs(np.arange(-128 * STEPS, 128 * STEPS)[:, None] / STEPS - IQ4).argmin(axis=1)]
INTEGER_TRIES = (-0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6)


class Kind(NamedTuple):
    """A type's group, and the ranges of its codes and of the integers that scale a group.

    `tries` are added to the code of a group's largest weight, which gives the scales to try.
    """

    group: int
    codes: tuple[int, int]
    integers: tuple[int, int]
    tries: tuple[float, ...]
    block: int = BLOCK

    @property
    def has_offset(self) -> bool:
        return self.codes[0] == 0

    def nearest(self, x: Array) -> Array:
        """Return the possible values of q that are nearest to x."""
        if self.codes != (LEVELS[0], LEVELS[-1]):
            return np.clip(np.rint(x), *self.codes)
        at = np.clip(np.rint(x * STEPS), -128 * STEPS, 128 * STEPS - 1).astype(np.int32)
        return IQ4_AT[at + 128 * STEPS]


def spaced(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, count).tolist())


KINDS = {
    "Q2_K": Kind(16, (0, 3), (0, 15), spaced(-0.9, 1, 20)),
    "Q3_K": Kind(16, (-4, 3), (-32, 31), spaced(-0.9, 0.9, 19)),
    "Q4_K": Kind(32, (0, 15), (0, 63), spaced(-1.5, 1.5, 25)),
    "Q5_K": Kind(32, (0, 31), (0, 63), spaced(-2, 2, 33)),
    "Q6_K": Kind(16, (-32, 31), (-128, 127), spaced(-3, 3, 25)),
    "IQ4_NL": Kind(32, (-127, 113), (1, 1), spaced(-14, 14, 21), block=32),
    "IQ4_XS": Kind(32, (-127, 113), (-32, 31), spaced(-14, 14, 21)),
}


class Blocks(NamedTuple):
    """n encoded blocks: float16 d and dmin [n], unsigned s and m [n, groups], and q [n, weights],
    whose smallest value is stored as 0.
    """

    d: Array
    dmin: Array
    s: Array
    m: Array
    q: Array


def encode(rows: Array, name: str) -> Array:
    """Return uint8 [rows, bytes] for float32 rows [rows, columns] in the type `name` of `KINDS`.

    The columns must be a multiple of the type's block.
    """
    kind = KINDS[name]
    x = np.ascontiguousarray(rows.reshape(-1, kind.group).T)
    if kind.has_offset:
        scale, offset = best_line(x, kind)
    else:
        scale = best_scale(x, kind.nearest, kind.codes[0], kind.tries)
        offset = np.zeros_like(scale)
    groups = kind.block // kind.group
    (d, s), (dmin, m) = (as_integers(of, groups, kind) for of in (scale, offset))
    per_group = [np.repeat(of.astype(np.float32), groups) for of in (d, dmin)]
    s, m = refined(x, kind, s, m, *per_group)
    q = (x + per_group[1] * m) / safe(per_group[0] * s)
    if kind.codes == (LEVELS[0], LEVELS[-1]):
        codes = np.searchsorted((IQ4[1:] + IQ4[:-1]) / 2, q)
    else:
        codes = kind.nearest(q) - kind.codes[0]
    shape = len(d), groups
    s, m = (of.astype(np.int16).reshape(shape).astype(np.uint8) for of in (s - low(kind), m))
    packed = PACK[name](Blocks(d, dmin, s, m, codes.astype(np.uint8).T.reshape(len(d), -1)))
    return packed.reshape(len(rows), -1)


def low(kind: Kind) -> int:
    """Return what is stored as 0 for s; Q6_K stores s with its sign."""
    return 0 if kind.integers[0] == -128 else min(0, kind.integers[0])


def best_line(x: Array, kind: Kind) -> tuple[Array, Array]:
    """Return the scale and the offset, at least 0, for which scale * q - offset is nearest to x.

    The codes q are whole numbers from 0.
    """
    top, count = kind.codes[1], np.float32(len(x))
    least = np.minimum(x.min(axis=0), 0)
    above = x - least
    span = np.maximum(above.max(axis=0), TINY)
    sum_x = x.sum(axis=0)
    best, scale, offset = np.full_like(span, -np.inf), span / top, -least
    for more in kind.tries:
        q = np.minimum(np.rint(above * ((top + more) / span)), top)
        sum_q, sum_qq, sum_qx = q.sum(axis=0), dot(q, q), dot(q, x)
        spread = count * sum_qq - sum_q * sum_q
        a = (count * sum_qx - sum_x * sum_q) / safe(spread)
        b = (sum_q * sum_qx - sum_qq * sum_x) / safe(spread)
        a = np.where(b < 0, sum_qx / safe(sum_qq), a)
        b = np.maximum(b, 0)
        # the sum of x * x less the squared error
        gain = a * (2 * sum_qx - a * sum_qq + 2 * b * sum_q) - b * (2 * sum_x + count * b)
        better = (gain > best) & (spread > 0)
        best = np.where(better, gain, best)
        scale, offset = np.where(better, a, scale), np.where(better, b, offset)
    return scale, offset


def best_scale(
    x: Array, nearest: Callable[[Array], Array], reach: int, tries: Iterable[float]
) -> Array:
    """Return the scale with which scale * nearest(x / scale) is nearest to x, where the largest x
    of a group becomes about `reach`.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    largest = np.where(np.abs(largest) < TINY, TINY, largest)
    best, scale = np.zeros_like(largest), np.zeros_like(largest)
    for more in tries:
        q = nearest(x * ((reach + more) / largest))
        sum_qq, sum_qx = safe(dot(q, q)), dot(q, x)
        gain = sum_qx * sum_qx / sum_qq  # the sum of x * x less the squared error
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, sum_qx / sum_qq, scale)
    return scale


def as_integers(values: Array, groups: int, kind: Kind) -> tuple[Array, Array]:
    """Return a float16 number for each block, and the integers [n] that are `values` by it."""
    least, most = kind.integers
    values = values.reshape(-1, groups).T

    def nearest(x: Array) -> Array:
        return np.clip(np.rint(x), least, most)

    d = best_scale(values, nearest, least if least < 0 else most, INTEGER_TRIES).astype(np.float16)
    return d, nearest(values / safe(d.astype(np.float32))).T.reshape(-1)


def refined(x: Array, kind: Kind, s: Array, m: Array, d: Array, dmin: Array) -> tuple[Array, Array]:
    """Return integers s and m [n] at least as good, with d and dmin [n] as they are."""
    best, best_s, best_m = np.full_like(d, np.inf), s, m
    for step in (0, -1, 1):
        near, offset = np.clip(s + step, *kind.integers), m
        for _ in range(3 if kind.has_offset else 1):
            scale = d * near
            without = scale * kind.nearest((x + dmin * offset) / safe(scale)) - x
            error = without - dmin * offset
            error = dot(error, error)
            better = error < best
            best = np.where(better, error, best)
            best_s, best_m = np.where(better, near, best_s), np.where(better, offset, best_m)
            offset = np.clip(np.rint(without.mean(axis=0) / safe(dmin)), *kind.integers)
    return best_s, best_m


TINY = np.float32(1e-30)


def safe(x: Array) -> Array:
    """Return x with 1 in place of 0, to divide by."""
    return np.where(x == 0, np.float32(1), x)


def dot(a: Array, b: Array) -> Array:
    return np.einsum("gn,gn->n", a, b)


def together(parts: Array, bits: int) -> Array:
    """Return bytes [n, ...] of numbers [n, parts, ...] of some bits, the first part lowest."""
    shifts = bits * np.arange(parts.shape[1], dtype=np.uint8)
    shifted = parts << shifts.reshape(1, -1, *[1] * (parts.ndim - 2))
    return np.bitwise_or.reduce(shifted, axis=1)


def joined(n: int, *parts: Array) -> Array:
    """Return bytes [n, size] of arrays that belong to n blocks."""
    return np.concatenate([part.reshape(n, -1).view(np.uint8) for part in parts], axis=1)


def six_bits(s: Array, m: Array) -> Array:
    """Return the 12 bytes that Q4_K and Q5_K make of 8 scales and 8 offsets."""
    high = [(of[:, 4:] >> 4) << 6 for of in (s, m)]
    low = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return np.concatenate([s[:, :4] | high[0], m[:, :4] | high[1], low], axis=1)


def pack_q2(b: Blocks) -> Array:
    return joined(len(b.d), b.s | b.m << 4, together(b.q.reshape(-1, 4, 32), 2), b.d, b.dmin)


def pack_q3(b: Blocks) -> Array:
    n = len(b.d)
    high, low = together((b.q >> 2).reshape(n, 8, 32), 1), together((b.q & 3).reshape(-1, 4, 32), 2)
    scales = together((b.s & 15).reshape(n, 2, 8), 4), together((b.s >> 4).reshape(n, 4, 4), 2)
    return joined(n, high, low, *scales, b.d)


def pack_q4(b: Blocks) -> Array:
    return joined(len(b.d), b.d, b.dmin, six_bits(b.s, b.m), together(b.q.reshape(-1, 2, 32), 4))


def pack_q5(b: Blocks) -> Array:
    n = len(b.d)
    high = together((b.q >> 4).reshape(n, 8, 32), 1)
    low = together((b.q & 15).reshape(-1, 2, 32), 4)
    return joined(n, b.d, b.dmin, six_bits(b.s, b.m), high, low)


def pack_q6(b: Blocks) -> Array:
    low = together((b.q & 15).reshape(-1, 2, 64), 4)
    high = together((b.q >> 4).reshape(-1, 4, 32), 2)
    return joined(len(b.d), low, high, b.s, b.d)


def pack_iq4_nl(b: Blocks) -> Array:
    return joined(len(b.d), b.d, together(b.q.reshape(-1, 2, 16), 4))


def pack_iq4_xs(b: Blocks) -> Array:
    n = len(b.d)
    high = together((b.s >> 4).reshape(-1, 4, 1), 2)
    low = together((b.s & 15).reshape(n, 4, 2).swapaxes(1, 2), 4)
    return joined(n, b.d, high, low, together(b.q.reshape(-1, 2, 16), 4))


PACK = {
    "Q2_K": pack_q2,
    "Q3_K": pack_q3,
    "Q4_K": pack_q4,
    "Q5_K": pack_q5,
    "Q6_K": pack_q6,
    "IQ4_NL": pack_iq4_nl,
    "IQ4_XS": pack_iq4_xs,
}
