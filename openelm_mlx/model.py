"""The OpenELM decoder in MLX. Module names are the checkpoint's names, so a checkpoint loads without a map.

Layer (arXiv:2404.14619; corenet/modeling/models/language_modeling/general_gpt.py):
    x = x + out_proj(attention(attn_norm(x)))
    x = x + proj_2(silu(gate) * up)          [gate; up] = proj_1(ffn_norm(x))
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from openelm_mlx.cache import Cache, Mask, as_caches
from openelm_mlx.config import LayerShape, OpenELMConfig, layer_shapes


class Rotary(NamedTuple):
    """Cosine and signed sine of the angles of a pass, [batch or 1, length, 1, 1 or 2, head_dim / 2], float32."""

    cos: mx.array
    sin: mx.array


def rotary(positions: mx.array, head_dim: int, base: float) -> Rotary:
    """Rotary embedding (arXiv:2104.09864) of positions [batch or 1, length], once a pass for all layers."""
    rows = angles(positions[..., None, None, None], *angle_constants(head_dim, base))  # [B, L, 1, 3, half]
    return Rotary(rows[..., :1, :], rows[..., 1:, :])


@lru_cache(maxsize=8)
def angle_constants(head_dim: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    """Evaluated, so that no step computes them again: frequencies [half], and of the rows (cos, -sin, sin) which and sign."""
    half = head_dim // 2
    frequencies = mx.exp(mx.arange(half, dtype=mx.float32) * (-math.log(base) / half))
    constants = frequencies, mx.array([[True], [False], [False]]), mx.array([[1.0], [-1.0], [1.0]])
    mx.eval(constants)
    return constants


@partial(mx.compile, shapeless=True)
def angles(positions, frequencies, is_cos, sign):  # type: ignore[no-untyped-def]
    """Cosine, minus sine and sine in three rows: one fused kernel where each by itself would be one."""
    turn = positions.astype(mx.float32) * frequencies
    return mx.where(is_cos, mx.cos(turn), mx.sin(turn) * sign)


@partial(mx.compile, shapeless=True)
def rotate(x, normed, swapped, weight, weight_swapped, is_value, cos, sin):  # type: ignore[no-untyped-def]
    """Scale and rotate query and key heads, pass value heads through: one fused elementwise kernel in float32."""
    turned = normed.astype(mx.float32) * weight * cos + swapped.astype(mx.float32) * weight_swapped * sin
    return mx.where(is_value, x, turned.astype(x.dtype))


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class Linear(nn.Linear):
    """A projection without bias, which transposes its weight once and not at every token."""

    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__(input_dims, output_dims, bias=False)
        self._kept: tuple[Any, ...] = ()

    def transposed(self) -> mx.array:
        """The weight [output, input] as [input, output]; a view, made anew when another weight is put in place."""
        if not self._kept or self._kept[0] is not self.weight:
            self._kept = (self.weight, self.weight.T)
        return self._kept[1]

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.transposed()


def project_onto(residual: mx.array, projection: nn.Module, x: mx.array) -> mx.array:
    """residual + projection(x), as one kernel where the projection is a plain matrix."""
    if isinstance(projection, Linear):
        return mx.addmm(residual, x, projection.transposed())
    return residual + projection(x)


class Pass(NamedTuple):
    """What all layers share in one pass; their activations are [batch * length, width], so projections are plain."""

    batch: int
    length: int
    angles: Rotary
    mask: Mask


class Attention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys; heads of one layer, all in one projection."""

    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.q_heads, self.kv_heads, _ = shape
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.scale = config.head_dim**-0.5
        heads = self.q_heads + 2 * self.kv_heads
        self.qkv_proj = Linear(config.model_dim, heads * config.head_dim)  # rows: [q | k | v]
        self.out_proj = Linear(self.q_heads * config.head_dim, config.model_dim)
        self.normalize = config.normalize_qk_projections
        if self.normalize:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self._table: tuple[Any, ...] = ()

    def head_weights(self) -> tuple[mx.array, mx.array, mx.array]:
        """Per head: norm weight, the same with its halves swapped, and whether it is a value head.

        Kept between calls, and made anew when training or loading puts other norm weights in place.
        """
        sources = (self.q_norm.weight, self.k_norm.weight) if self.normalize else (None, None)
        if self._table and self._table[0] is sources[0] and self._table[1] is sources[1]:
            return self._table[2]
        half, rotated = self.head_dim // 2, self.q_heads + self.kv_heads
        ones = mx.ones((self.head_dim,))
        q, k = (ones if w is None else w.astype(mx.float32) for w in sources)
        rows = [q[None]] * self.q_heads + [k[None]] * self.kv_heads + [ones[None]] * self.kv_heads
        weight = mx.concatenate(rows).reshape(-1, 2, half)  # [heads, 2, half]
        is_value = (mx.arange(weight.shape[0]) >= rotated)[:, None, None]
        self._table = (*sources, (weight, weight[:, ::-1], is_value))
        return self._table[2]

    def __call__(self, x: mx.array, residual: mx.array, shared: Pass, cache: Cache, last: bool = False) -> mx.array:
        B, L, angles, mask = shared
        x = self.qkv_proj(x)
        pairs = (B, L, -1, 2, self.head_dim // 2)
        heads = x.reshape(*pairs)  # [B, L, q + 2 kv, 2, head_dim / 2]
        normed = heads
        if self.normalize:  # value heads are normed for nothing: one kernel for all heads is what counts
            normed = mx.fast.rms_norm(x.reshape(B, L, -1, self.head_dim), None, self.eps).reshape(*pairs)
        turned = rotate(heads, normed, normed[..., ::-1, :], *self.head_weights(), *angles)
        q, kv = mx.split(turned, [self.q_heads], axis=2)
        if L == 1:  # reshaping does what transposing would, in one operation
            q = q.reshape(B, -1, 1, self.head_dim)
        else:
            q = q.reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
        if B * L == 1:
            kv = kv.reshape(2, 1, -1, 1, self.head_dim)
        else:
            kv = kv.reshape(B, L, 2, -1, self.head_dim).transpose(2, 0, 3, 1, 4)
        if last and L > 1:  # keys and values of all tokens, but an answer for the last one only
            q, mask, L = q[:, :, -1:], mask[..., -1:, :] if isinstance(mask, mx.array) else None, 1
            residual = residual.reshape(B, -1, residual.shape[-1])[:, -1]
        out = cache.attend(q, kv, mask, self.scale)  # q [B, heads, L, head_dim], kv [2, B, kv, L, head_dim]
        out = out if L == 1 else out.swapaxes(1, 2)
        return project_onto(residual, self.out_proj, out.reshape(B * L, -1))


class FeedForward(nn.Module):
    """SwiGLU, or a plain SiLU network where the configuration has no gate."""

    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.gated = config.ffn_with_glu
        self.proj_1 = Linear(config.model_dim, shape.ffn_dim * (2 if self.gated else 1))
        self.proj_2 = Linear(shape.ffn_dim, config.model_dim)

    def __call__(self, x: mx.array, residual: mx.array) -> mx.array:
        x = self.proj_1(x)
        if not self.gated:
            x = nn.silu(x)
        elif x.shape[0] == 1:  # halves as rows: split along a row, they would keep its stride, and be copied for proj_2
            x = swiglu(*mx.split(x.reshape(2, -1), 2))
        else:
            x = swiglu(*mx.split(x, 2, axis=-1))
        return project_onto(residual, self.proj_2, x)


class DecoderLayer(nn.Module):
    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.attn = Attention(config, shape)
        self.ffn = FeedForward(config, shape)
        self.attn_norm = nn.RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, shared: Pass, cache: Cache, last: bool = False) -> mx.array:
        x = self.attn(self.attn_norm(x), x, shared, cache, last)
        return self.ffn(self.ffn_norm(x), x)


class Transformer(nn.Module):
    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = [DecoderLayer(config, shape) for shape in layer_shapes(config)]
        self.norm = nn.RMSNorm(config.model_dim, eps=config.rms_norm_eps)


class OpenELM(nn.Module):
    """The language model. `model(tokens, cache)` also follows mlx-lm's calling convention."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.args = config
        self.model_type = config.model_type
        self.transformer = Transformer(config)
        if not config.share_input_output_layers:
            self.lm_head = Linear(config.model_dim, config.vocab_size)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.transformer.layers

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None, last: bool = False) -> mx.array:
        """Normalised last hidden states [batch, length, model_dim] of token ids [batch, length].

        With `last`, only the last position's, [batch, 1, model_dim]: the last layer then computes no other.
        """
        caches = as_caches(cache, len(self.layers))
        batch, length = tokens.shape
        angles = rotary(caches[0].positions(length), self.args.head_dim, self.args.rope_freq_constant)
        shared = Pass(batch, length, angles, caches[0].mask(length))
        x = self.transformer.token_embeddings(tokens.reshape(-1))
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x = layer(x, shared, layer_cache, last and layer is self.layers[-1])
        return self.transformer.norm(x).reshape(batch, -1, x.shape[-1])

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [batch, length, vocab] of hidden states; the head is the embedding matrix unless untied."""
        if self.args.share_input_output_layers:
            return self.transformer.token_embeddings.as_linear(hidden)
        return self.lm_head(hidden)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        return self.logits(self.hidden(tokens, cache))
