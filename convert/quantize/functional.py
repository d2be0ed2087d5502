"""The model as a function of a dictionary of float32 weights: what measuring and learning
quantization needs.

The engine's model holds its weights and is made for decoding. Here weights are arguments, so that
one matrix can be exchanged, gradients taken, inputs of a matrix looked at, and a pass resumed at
the layer that changed. A test holds both to the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from openelm_mlx.device import mx
from openelm_mlx.model.config import OpenELMConfig, layer_shapes

Weights = Mapping[str, mx.array]  # float32, under Hugging Face's names
Look = Callable[
    [str, mx.array], None
]  # called with a matrix's stem and its input [tokens, columns]
EMBEDDINGS = "transformer.token_embeddings"


def no_look(stem: str, x: mx.array) -> None:
    """Nobody looks."""


def layer_of(stem: str) -> int:
    """The layer at which a pass resumes when this matrix changed; -1 for the embeddings, so from
    the tokens.
    """
    parts = stem.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else -1


def head_stem(config: OpenELMConfig) -> str:
    return EMBEDDINGS if config.share_input_output_layers else "lm_head"


def embed(weights: Weights, tokens: mx.array) -> mx.array:
    return weights[EMBEDDINGS + ".weight"][tokens]


def layer(
    config: OpenELMConfig, number: int, weights: Weights, x: mx.array, look: Look = no_look
) -> mx.array:
    """One decoder layer on hidden states x [batch, length, model_dim] from position 0."""
    shape, prefix, eps = (
        layer_shapes(config)[number],
        f"transformer.layers.{number}.",
        config.rms_norm_eps,
    )
    batch, length, _ = x.shape

    def linear(stem: str, inputs: mx.array) -> mx.array:
        look(prefix + stem, inputs.reshape(-1, inputs.shape[-1]))
        return inputs @ weights[f"{prefix}{stem}.weight"].T

    heads = linear("attn.qkv_proj", mx.fast.rms_norm(x, weights[prefix + "attn_norm.weight"], eps))
    heads = heads.reshape(batch, length, -1, config.head_dim).swapaxes(
        1, 2
    )  # [B, q + 2 kv, L, head_dim]
    q, k, v = mx.split(heads, [shape.q_heads, shape.q_heads + shape.kv_heads], axis=1)
    if config.normalize_qk_projections:
        q = mx.fast.rms_norm(q, weights[prefix + "attn.q_norm.weight"], eps)
        k = mx.fast.rms_norm(k, weights[prefix + "attn.k_norm.weight"], eps)
    q, k = (
        mx.fast.rope(
            a,
            config.head_dim,
            traditional=False,
            base=config.rope_freq_constant,
            scale=1.0,
            offset=0,
        )
        for a in (q, k)
    )
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=config.head_dim**-0.5, mask="causal")
    x = x + linear("attn.out_proj", out.swapaxes(1, 2).reshape(batch, length, -1))
    inner = linear("ffn.proj_1", mx.fast.rms_norm(x, weights[prefix + "ffn_norm.weight"], eps))
    if config.ffn_with_glu:
        gate, up = mx.split(inner, 2, axis=-1)
        return x + linear("ffn.proj_2", gate * mx.sigmoid(gate) * up)
    return x + linear("ffn.proj_2", inner * mx.sigmoid(inner))


def head(config: OpenELMConfig, weights: Weights, x: mx.array, look: Look = no_look) -> mx.array:
    """Logits [batch, length, vocab] of the last layer's output."""
    x = mx.fast.rms_norm(x, weights["transformer.norm.weight"], config.rms_norm_eps)
    look(head_stem(config), x.reshape(-1, x.shape[-1]))
    return x @ weights[head_stem(config) + ".weight"].T


def logits(
    config: OpenELMConfig, weights: Weights, tokens: mx.array, look: Look = no_look
) -> mx.array:
    """Logits [batch, length, vocab] of token ids [batch, length]."""
    x = embed(weights, tokens)
    for number in range(config.num_transformer_layers):
        x = layer(config, number, weights, x, look)
    return head(config, weights, x, look)
