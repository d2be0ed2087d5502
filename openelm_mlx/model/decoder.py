"""The OpenELM decoder in MLX.

Modules have the checkpoint's names, so a checkpoint loads without renaming.
A layer (arXiv:2404.14619; corenet/modeling/models/language_modeling/general_gpt.py) computes

    x = x + out_proj(attention(attn_norm(x)))
    x = x + proj_2(silu(gate) * up)          [gate; up] = proj_1(ffn_norm(x))

A small model spends much of a token's time on launching kernels. Where kernels of our own run
(kernels/), a layer takes nine. MLX's operations alone take three for norm, rotation and storing,
and `Attention.plain_heads` computes the same in a readable way; tests compare all. One token of the
270M takes this many kernels, counted by `python -m openelm_mlx.benchmarks.ledger.count 270m`
(docs/performance.md); a concatenation counts as a copy of each input:

    151  with kernels of our own
    183  with MLX's operations
    215  without `VALUE` (heads.py): values skip norm and rotation, and join the keys again
    246  with `plain_heads`: two norms, two rotations, and values concatenated with the keys
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.model.cache import Cache, KVCache, NoCache, as_caches
from openelm_mlx.model.cache_kinds import Mask
from openelm_mlx.model.config import LayerShape, OpenELMConfig, layer_shapes
from openelm_mlx.model.footprint import layers_at_once
from openelm_mlx.model.heads import Projection, head_table, rotary
from openelm_mlx.model.kernels.add_rms_norm import ADD_RMS_NORM, Sum, sum_and_norm
from openelm_mlx.model.kernels.kernel import in_use
from openelm_mlx.model.projections import Embedding, Linear, for_any_thread, project_onto, sums


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up, by one kernel."""
    return gate * mx.sigmoid(gate) * up


class Pass(NamedTuple):
    """The inputs that all layers share in one pass; activations are [batch * length, model_dim]."""

    batch: int
    length: int
    rotation: mx.array  # from `rotary`
    mask: Mask
    adds_later: bool = False  # the norm that reads a sum computes it, where that saves a kernel

    def project(self, residual: mx.array, projection: nn.Module, x: mx.array) -> Sum:
        """Return residual + projection(x)."""
        if self.adds_later and not sums(projection):
            return Sum(residual, projection(x))
        return Sum(project_onto(residual, projection, x))


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys; one projection makes all heads."""

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

    def norm_weights(self) -> tuple[mx.array, mx.array] | None:
        """Return the weights of the norms of queries and keys, None without these norms."""
        return (self.q_norm.weight, self.k_norm.weight) if self.normalize else None

    def head_weights(self, norms: tuple[mx.array, mx.array] | None) -> mx.array:
        """Return the `head_table`. It is cached until training or loading sets other weights."""
        table, sources = self._table, norms or (None, None)
        if table and table[0] is sources[0] and table[1] is sources[1]:
            return table[2]
        made = head_table(sources, self.q_heads, self.kv_heads, self.head_dim)
        self._table = (*sources, for_any_thread(made))
        return self._table[2]

    def plain_heads(self, raw: mx.array, offset: int, base: float) -> tuple[mx.array, mx.array]:
        """Return what `Projection.heads` returns, computed in the plain way; only tests call it.

        `raw` is [B, L, q + 2 kv, head_dim], for the tokens from position `offset` on.
        """
        q, k, v = mx.split(raw.swapaxes(1, 2), [self.q_heads, self.q_heads + self.kv_heads], axis=1)
        if self.normalize:
            q, k = self.q_norm(q), self.k_norm(k)
        rope = partial(mx.fast.rope, dims=self.head_dim, traditional=False, base=base, scale=1.0)
        return rope(q, offset=offset), mx.stack([rope(k, offset=offset), v])

    def __call__(
        self, x: mx.array, residual: mx.array, shared: Pass, cache: Cache, last: bool = False
    ) -> Sum:
        """Return residual + attention, [B * L, model_dim]; with `last`, [B, model_dim]."""
        B, L, rotation, mask, _ = shared
        projected = self.qkv_proj(x).reshape(B, L, -1, self.head_dim)
        norms, eps = self.norm_weights(), self.eps if self.normalize else None
        weights = self.head_weights(norms)
        projection = Projection(projected, weights, rotation, self.q_heads, eps, norms, last)
        if last and L > 1:
            mask, L = mask[..., -1:, :] if isinstance(mask, mx.array) else None, 1
            residual = residual.reshape(B, -1, residual.shape[-1])[:, -1]
        out = cache.attend(projection, mask, self.scale)  # [B, heads, L, head_dim]
        out = out if L == 1 else out.swapaxes(1, 2)
        return shared.project(residual, self.out_proj, out.reshape(B * L, -1))


class FeedForward(nn.Module):
    """A feed-forward network: SwiGLU, or plain SiLU if the configuration has no gate."""

    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.gated = config.ffn_with_glu
        self.proj_1 = Linear(config.model_dim, shape.ffn_dim * (2 if self.gated else 1))
        self.proj_2 = Linear(shape.ffn_dim, config.model_dim)

    def __call__(self, x: mx.array, residual: mx.array, shared: Pass) -> Sum:
        """Return residual + the network of x, [rows, model_dim]."""
        x = self.proj_1(x)
        if not self.gated:
            x = nn.silu(x)
        elif x.shape[0] == 1:
            # split into rows: parts of one row would keep its stride, and be copied for proj_2
            x = swiglu(*mx.split(x.reshape(2, -1), 2))
        else:
            x = swiglu(*mx.split(x, 2, axis=-1))
        return shared.project(residual, self.proj_2, x)


class DecoderLayer(nn.Module):
    """Attention, then the feed-forward network, each after a norm and with a residual."""

    def __init__(self, config: OpenELMConfig, shape: LayerShape) -> None:
        super().__init__()
        self.attn = Attention(config, shape)
        self.ffn = FeedForward(config, shape)
        self.attn_norm = nn.RMSNorm(config.model_dim, eps=config.rms_norm_eps)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=config.rms_norm_eps)

    def __call__(self, x: Sum, shared: Pass, cache: Cache, last: bool | mx.array = False) -> Sum:
        residual, normed = sum_and_norm(x, self.attn_norm)
        x = self.attn(normed, residual, shared, cache, last is True)
        if isinstance(last, mx.array):
            x = x.rows(mx.arange(shared.batch) * shared.length + last)
        residual, normed = sum_and_norm(x, self.ffn_norm)
        return self.ffn(normed, residual, shared)


class Transformer(nn.Module):
    """The embedding, the layers and the last norm; `OpenELM.hidden` runs them."""

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = Embedding(config.vocab_size, config.model_dim)
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

    def hidden(
        self,
        tokens: mx.array,
        cache: KVCache | list[Any] | None = None,
        last: bool | mx.array = False,
    ) -> mx.array:
        """Return the hidden states after the last norm, [batch, length, model_dim], of token ids.

        The ids are [batch, length], or [batch] for one token each. With `last`, the result has the
        last position only, [batch, model_dim], and the last layer computes no other; an array
        [batch] says which position of each row is the last. `cache` is a `KVCache`, or a list with
        an entry for each layer, ours or mlx-lm's. Raises `CacheError` for a cache with another
        number of layers.
        """
        caches = as_caches(cache, len(self.layers))
        batch, length = tokens.shape if tokens.ndim == 2 else (tokens.size, 1)
        rotation = rotary(
            caches[0].positions(length), self.args.head_dim, self.args.rope_freq_constant
        )
        # a pass without a cache may be one of training: a kernel has no gradient
        adds_later = in_use(ADD_RMS_NORM) and not isinstance(caches[0], NoCache)
        shared = Pass(batch, length, rotation, caches[0].mask(length), adds_later)
        x = Sum(self.transformer.token_embeddings(tokens.reshape(-1)))
        stored = cache if isinstance(cache, KVCache) else None
        every = None if stored is None else layers_at_once(self, tokens.size)
        for number, (layer, layer_cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            x = layer(x, shared, layer_cache, last if layer is self.layers[-1] else False)
            if stored is not None and every is not None and number % every == 0:
                mx.eval(x, stored.arrays)
        _, normed = sum_and_norm(x, self.transformer.norm)
        return normed.reshape(batch, length, -1) if last is False else normed

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits [..., vocab] of hidden states [..., model_dim].

        The head is the embedding matrix, unless the two are untied, or adapted in other ways.
        """
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.transformer.token_embeddings.as_linear(hidden)

    def __call__(self, tokens: mx.array, cache: KVCache | list[Any] | None = None) -> mx.array:
        return self.logits(self.hidden(tokens, cache))


def parameters(model: OpenELM) -> dict[str, mx.array]:
    """Return every parameter of the model by its path, which is its name in a checkpoint."""
    return dict(utils.tree_flatten(model.parameters()))  # type: ignore[arg-type]
