"""Quantization: which spec every matrix gets, and how its weights are rounded to it.

Here lives what chooses a plan, measures losses, learns rounding and encodes llama.cpp's blocks, on
weights in float32. Reading sources, writing targets and the specs themselves
(openelm_mlx.quantization) live elsewhere.

This file has what they share, the model as a function of float32 weights. The engine's model keeps
its weights and is made for decoding; here weights are arguments, so that one matrix can be
exchanged, gradients be taken, inputs of a matrix be seen, and a pass be resumed at the layer that
changed. A test checks that both give the same logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig, layer_shapes
from openelm_mlx.quantization import planned

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel

NORM = "transformer.norm.weight"  # of the last layer's output
Weights = Mapping[str, mx.array]  # float32, under Hugging Face's names
Hook = Callable[[str, mx.array], None]  # called with a matrix's stem and input [tokens, columns]
Look = Callable[[mx.array], None]  # called with every value that a layer computes


class LazyWeights(Mapping[str, mx.array]):
    """Float32 weights that are read each time they are asked for and kept by nobody else: work that
    goes layer by layer has no more than a layer in memory (`of_layer`).
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], mx.array]) -> None:
        """`read` returns a tensor by its name, in any floating-point type."""
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> mx.array:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name).astype(mx.float32)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def exact_weights(opened: OpenedModel) -> LazyWeights:
    """Return the source's weights. Reading one raises `CheckpointError` for NaN and infinities.

    Quantized ones are what they stand for in float32, not rounded to the type of their scales.
    """

    def read(name: str) -> mx.array:
        spec = planned(opened.source.plan, name)
        if spec is None:
            return opened.load(name)
        return dequantized(name, opened.packed(name), spec)

    return LazyWeights(opened.shapes, read)


def of_layer(weights: Weights, number: int) -> dict[str, mx.array]:
    """Return the weights of one layer, all in memory."""
    prefix = f"transformer.layers.{number}."
    found = {}
    for name in weights:
        if name.startswith(prefix):
            found[name] = weights[name]
            mx.eval(found[name])  # with it goes what it was read as
    return found


def head_weights(config: OpenELMConfig, weights: Weights) -> dict[str, mx.array]:
    """Return the weights of the last norm and the head, all in memory."""
    found = {name: weights[name] for name in (NORM, f"{head_stem(config)}.weight")}
    mx.eval(found)
    return found


def no_hook(stem: str, x: mx.array) -> None:
    """Do nothing."""


def no_look(x: mx.array) -> None:
    """Do nothing."""


def head_stem(config: OpenELMConfig) -> str:
    return EMBEDDINGS if config.share_input_output_layers else HEAD


def in_batches(tokens: mx.array, rows: int) -> list[mx.array]:
    """Return tokens [rows, length] as batches of at most so many rows."""
    return [tokens[start : start + rows] for start in range(0, len(tokens), rows)]


def embed(weights: Weights, tokens: mx.array) -> mx.array:
    return weights[EMBEDDINGS + ".weight"][tokens]


def layer(
    config: OpenELMConfig,
    number: int,
    weights: Weights,
    x: mx.array,
    hook: Hook = no_hook,
    look: Look = no_look,
) -> mx.array:
    """Run one decoder layer on hidden states x [batch, length, model_dim] from position 0."""
    shape, prefix = layer_shapes(config)[number], f"transformer.layers.{number}."
    batch, length, _ = x.shape

    def seen(value: mx.array) -> mx.array:
        look(value)
        return value

    def linear(stem: str, inputs: mx.array) -> mx.array:
        hook(prefix + stem, inputs.reshape(-1, inputs.shape[-1]))
        return seen(inputs @ weights[f"{prefix}{stem}.weight"].T)

    def norm(stem: str, inputs: mx.array) -> mx.array:
        weight = weights[f"{prefix}{stem}.weight"]
        return seen(mx.fast.rms_norm(inputs, weight, config.rms_norm_eps))

    def rope(heads: mx.array) -> mx.array:
        base = config.rope_freq_constant
        return seen(
            mx.fast.rope(heads, config.head_dim, traditional=False, base=base, scale=1.0, offset=0)
        )

    heads = linear("attn.qkv_proj", norm("attn_norm", x)).reshape(
        batch, length, -1, config.head_dim
    )
    heads = heads.swapaxes(1, 2)  # [B, q + 2 kv, L, head_dim]
    q, k, v = mx.split(heads, [shape.q_heads, shape.q_heads + shape.kv_heads], axis=1)
    if config.normalize_qk_projections:
        q, k = norm("attn.q_norm", q), norm("attn.k_norm", k)
    q, k, scale = rope(q), rope(k), config.head_dim**-0.5
    if look is not no_look:  # attention computes the scores, and keeps them to itself
        groups = (scale * q).reshape(batch, shape.kv_heads, -1, length, config.head_dim)
        look(groups @ k[:, :, None].swapaxes(-1, -2))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")  # means of v
    x = seen(x + linear("attn.out_proj", out.swapaxes(1, 2).reshape(batch, length, -1)))
    inner = linear("ffn.proj_1", norm("ffn_norm", x))
    gate, up = mx.split(inner, 2, axis=-1) if config.ffn_with_glu else (inner, 1)
    return seen(x + linear("ffn.proj_2", seen(gate * mx.sigmoid(gate) * up)))


def normed(config: OpenELMConfig, weights: Weights, x: mx.array) -> mx.array:
    """Return the last layer's output after the last norm: the input of the head."""
    return mx.fast.rms_norm(x, weights[NORM], config.rms_norm_eps)


def head(config: OpenELMConfig, weights: Weights, x: mx.array, hook: Hook = no_hook) -> mx.array:
    """Return the logits [batch, length, vocab] of the last layer's output."""
    x = normed(config, weights, x)
    hook(head_stem(config), x.reshape(-1, x.shape[-1]))
    return x @ weights[head_stem(config) + ".weight"].T


def logits(
    config: OpenELMConfig, weights: Weights, tokens: mx.array, hook: Hook = no_hook
) -> mx.array:
    """Return the logits [batch, length, vocab] of token ids [batch, length]."""
    x = embed(weights, tokens)
    for number in range(config.num_transformer_layers):
        x = layer(config, number, weights, x, hook)
    return head(config, weights, x, hook)


def last_states(
    config: OpenELMConfig,
    weights: Weights,
    batches: Iterable[mx.array],
    hook: Hook = no_hook,
    progress: Callable[[int], None] | None = None,
) -> list[mx.array]:
    """Return the output [batch, length, model_dim] of the last layer for each batch of token ids.

    All batches go through a layer before the next one is read, so that one layer is in memory.
    `progress` is called with the number of every layer that is done.
    """
    found = embedded(weights, batches)
    for number in range(config.num_transformer_layers):
        through(config, number, of_layer(weights, number), found, hook)
        if progress is not None:
            progress(number)
    return found


def embedded(weights: Weights, batches: Iterable[mx.array]) -> list[mx.array]:
    """Return the inputs of the first layer for each batch of token ids, evaluated."""
    table = {f"{EMBEDDINGS}.weight": weights[f"{EMBEDDINGS}.weight"]}
    found = [embed(table, tokens) for tokens in batches]
    mx.eval(found)
    return found


def through(
    config: OpenELMConfig,
    number: int,
    weights: Weights,
    states: list[mx.array],
    hook: Hook = no_hook,
) -> None:
    """Replace each batch of states by what the layer makes of it, evaluated one after another."""
    for place, x in enumerate(states):
        states[place] = layer(config, number, weights, x, hook)
        mx.eval(states[place])
