"""The heads that one projection makes: norm and rotation of queries and keys, which values skip.

Complex tables save inputs, not kernels, and each input costs host time: `rotate` reads five arrays,
and would read seven if cosine, sine and both norm weights of a pair were separate.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import NamedTuple

from openelm_mlx.device import mx

VALUE = 1e30  # marks a value head in the table of norm weights; no weight of a model is as large


def rotary(positions: mx.array, head_dim: int, base: float) -> mx.array:
    """Return the rotary embedding (arXiv:2104.09864) of positions [batch or 1, length].

    It is exp(i angle), [batch or 1, length, 1, 2, head_dim / 2] complex64, by which `rotate`
    multiplies in every layer.
    """
    rotation: mx.array = rotations(positions[..., None, None, None], frequencies(head_dim, base))
    return rotation


@lru_cache(maxsize=8)
def frequencies(head_dim: int, base: float) -> mx.array:
    """Return the radians per position, forwards and backwards, [2, head_dim / 2].

    They are evaluated, so that no step computes them again.
    """
    half = head_dim // 2
    forwards = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(base) / half))
    both = mx.stack([forwards, -forwards])
    mx.eval(both)
    return both


@partial(mx.compile, shapeless=True)
def rotations(positions: mx.array, radians: mx.array) -> mx.array:
    """Return exp(i angle), by one fused kernel."""
    angles = positions.astype(mx.float32) * radians
    return mx.cos(angles) + 1j * mx.sin(angles)


@partial(mx.compile, shapeless=True)
def rotate(
    x: mx.array, normed: mx.array, swapped: mx.array, weights: mx.array, rotation: mx.array
) -> mx.array:
    """Scale and rotate query and key heads, and return value heads as they are, by one kernel.

    It computes in float32. In each pair (a, b), a becomes Re((a + ib) exp(i angle)) and b becomes
    Re((b + ia) exp(-i angle)). `x` and `normed` are [B, L, heads, 2, head_dim / 2], `swapped` is
    `normed` with a and b exchanged; `weights` comes from `head_table`.
    """
    own = mx.real(weights)  # so `weights - own` is i times the partner's
    pair = normed.astype(mx.float32) * own + swapped.astype(mx.float32) * (weights - own)
    return mx.where(own == VALUE, x, mx.real(pair * rotation).astype(x.dtype))


class Projection(NamedTuple):
    """The output of `qkv_proj` in one layer, and what its norm and rotation need.

    The cache asks for the heads when it stores them, by `heads` or by one kernel that norms,
    rotates and stores (kernels/norm_rope_store.py).
    """

    raw: mx.array  # [B, L, q + 2 kv, head_dim]
    weights: mx.array  # from `head_table`
    rotation: mx.array  # from `rotary`
    q_heads: int
    eps: float | None  # of the norm of queries and keys; None without a norm
    norms: tuple[mx.array, mx.array] | None  # the weights of that norm [head_dim], as they are
    last: bool  # return the query of the last token only, and all keys and values

    def heads(self) -> tuple[mx.array, mx.array]:
        """Return queries [B, q_heads, L or 1, D], and keys and values [2, B, kv_heads, L, D]."""
        x = self.raw
        B, L, _, D = x.shape
        pairs = (B, L, -1, 2, D // 2)
        plain = x.reshape(*pairs)
        # one kernel norms all heads, the value heads too, of which `rotate` takes the plain ones
        normed = plain if self.eps is None else mx.fast.rms_norm(x, None, self.eps).reshape(*pairs)
        rotated = rotate(plain, normed, normed[..., ::-1, :], self.weights, self.rotation)
        if L == 1:  # reshaping does what transposing would, in one operation
            rotated = rotated.reshape(B, -1, 1, D)
        else:
            rotated = rotated.reshape(B, L, -1, D).swapaxes(1, 2)
        q, kv = mx.split(rotated, [self.q_heads], axis=1)
        kv = kv.reshape(2, 1, -1, L, D) if B == 1 else kv.reshape(B, 2, -1, L, D).swapaxes(0, 1)
        return q[:, :, -1:] if self.last and L > 1 else q, kv


def head_table(
    norms: tuple[mx.array | None, mx.array | None], q_heads: int, kv_heads: int, head_dim: int
) -> mx.array:
    """Return the norm weight of each element of each head, [heads, 2, head_dim / 2] complex64.

    The imaginary part is the weight of its partner in the rotation; in value heads both are
    `VALUE`. `norms` are the weights of queries and of keys [head_dim], None without a norm.
    """
    ones = mx.ones((head_dim,))
    q, k = (ones if weight is None else weight.astype(mx.float32) for weight in norms)
    rows = [q] * q_heads + [k] * kv_heads + [ones * VALUE] * kv_heads
    weights = mx.stack(rows).reshape(len(rows), 2, -1)
    return weights + 1j * weights[:, ::-1]
