"""The pass of a training step over packed rows.

It computes what `OpenELM.hidden` and `logits` do, in a form whose gradients take less time and
memory. A pass that answers has few tokens and many kernels; this one has many tokens, and what it
keeps for the gradients decides what fits.

    attention   in blocks of queries: a block does not compute scores of what comes after it
    rotation    real numbers, and a gradient that is the rotation backwards
    SwiGLU      a gradient that uses the sigmoid again instead of computing it twice
    head        a chunk of tokens at a time, and only tokens that the loss counts; the last layer's
                network as well
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from openelm_mlx.device import mx, nn
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.graph.gradients import Arrays, contiguous, recomputed, with_vjp
from openelm_mlx.model.adapters import AdaptedEmbedding
from openelm_mlx.model.decoder import Attention, DecoderLayer, FeedForward, OpenELM
from openelm_mlx.model.projections import project_onto

# blocks of queries in a row, unless they get shorter than that; 512 tokens of the bundled model
# take 0.84, 0.67, 0.64 and 0.71 s of a processor with 1, 2, 4 and 8 blocks
BLOCKS, LEAST_BLOCK = 4, 64
CHUNK = 2**23  # logits that are computed at once


class Training(NamedTuple):
    """What a pass of training has, and one that evaluates does not."""

    checkpointing: bool = False
    z_loss: float = 0.0


class Rows(NamedTuple):
    """What all layers share; activations are [rows * length, model_dim]."""

    number: int
    length: int
    cosine: mx.array  # [rows, 1, length, head_dim / 2] float32
    sine: mx.array
    blocks: list[tuple[slice, mx.array]]  # queries, and which keys before their end each sees


def token_losses(model: OpenELM, batch: Batch, training: Training | None = None) -> mx.array:
    """Return the negative log-likelihood of each target in nats, [rows, length] float32.

    It is 0 where the weight is 0. In training, `z_loss` times the squared log of the softmax's sum
    is added (PaLM, arXiv:2204.02311, section 5).
    """
    rows = rows_of(model, batch)
    x = model.transformer.token_embeddings(batch.tokens.reshape(-1))
    for layer in model.layers:
        read = batch.trained if layer is model.layers[-1] else None
        compute: Callable[[mx.array], mx.array] = partial(layer_output, layer, rows, read)
        if training is not None and training.checkpointing:
            compute = recomputed(layer, compute)
        x = compute(x)
    targets = batch.targets.reshape(-1)[batch.trained]
    losses = head_losses(model, model.transformer.norm(x), targets, training)
    counted = mx.where(batch.weights.reshape(-1)[batch.trained] > 0, losses, 0)
    whole = mx.zeros(batch.tokens.size).at[batch.trained].add(counted)
    return whole.reshape(batch.tokens.shape)


def rows_of(model: OpenELM, batch: Batch) -> Rows:
    """Return what the layers need to know of a batch."""
    config, (number, length) = model.args, batch.tokens.shape
    half = config.head_dim // 2
    radians = mx.exp(mx.arange(half) * (-math.log(config.rope_freq_constant) / half))
    angles = batch.positions[:, None, :, None] * radians
    size = max(LEAST_BLOCK, -(-length // BLOCKS))
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        same = batch.segments[:, start:end, None] == batch.segments[:, None, :end]
        sees = same & mx.tri(end - start, end, start, dtype=mx.bool_)
        blocks.append((slice(start, end), sees[:, None]))
    return Rows(number, length, mx.cos(angles), mx.sin(angles), blocks)


def layer_output(layer: DecoderLayer, rows: Rows, read: mx.array | None, x: mx.array) -> mx.array:
    """Return the output of a layer for all tokens, or for those at the places that are read."""
    heads = attention(layer.attn, rows, layer.attn_norm(x))
    if read is not None:
        x, heads = x[read], heads[read]
    x = project_onto(x, layer.attn.out_proj, heads)
    return project_onto(x, layer.ffn.proj_2, gated(layer.ffn, layer.ffn_norm(x)))


def attention(attn: Attention, rows: Rows, x: mx.array) -> mx.array:
    """Return the attention of every head, [rows * length, heads * head_dim]."""
    raw = attn.qkv_proj(x).reshape(rows.number, rows.length, -1, attn.head_dim).swapaxes(1, 2)
    turning = attn.q_heads + attn.kv_heads
    heads, v = raw[:, :turning], contiguous(raw[:, turning:])
    if (norms := attn.norm_weights()) is not None:
        shapes = [(attn.q_heads, 1, attn.head_dim), (attn.kv_heads, 1, attn.head_dim)]
        weights = mx.concatenate([mx.broadcast_to(*one) for one in zip(norms, shapes, strict=True)])
        heads = mx.fast.rms_norm(heads, None, attn.eps) * weights
    turned: Any = rotated(heads, rows.cosine, rows.sine)
    q, k = turned[:, : attn.q_heads], turned[:, attn.q_heads :]
    sdpa = partial(mx.fast.scaled_dot_product_attention, scale=attn.scale)
    out = [
        sdpa(q[:, :, at], k[:, :, : at.stop], v[:, :, : at.stop], mask=mask).swapaxes(1, 2)
        for at, mask in rows.blocks
    ]
    whole = out[0] if len(out) == 1 else mx.concatenate(out, axis=1)
    return whole.reshape(rows.number * rows.length, -1)


@mx.compile
def rotate(heads: mx.array, cosine: mx.array, sine: mx.array) -> mx.array:
    a, b = halves(heads.astype(mx.float32))
    both = [a * cosine - b * sine, b * cosine + a * sine]
    return mx.concatenate(both, axis=-1).astype(heads.dtype)


def rotated_back(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
    _, cosine, sine = primals
    back = rotate(cotangents[0], cosine, -sine)
    return back, mx.zeros_like(cosine), mx.zeros_like(sine)


rotated = with_vjp(rotate, rotated_back)
"""Returns heads [rows, heads, length, head_dim] rotated by the angles of their positions."""


def halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return both halves of the last axis. `mx.split` would do, but MLX 0.32 fails to compile it
    after the product with DoRA's gain.
    """
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def gated(ffn: FeedForward, x: mx.array) -> mx.array:
    """Return the input of `proj_2`, [rows * length, ffn_dim]."""
    x = ffn.proj_1(x)
    if not ffn.gated:
        return nn.silu(x)
    out: Any = swiglu(x)
    return out[0]


@mx.compile
def swiglu_and_sigmoid(x: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = halves(x)
    sigmoid = mx.sigmoid(gate)
    return gate * sigmoid * up, sigmoid


@mx.compile
def swiglu_gradient(x: mx.array, sigmoid: mx.array, of_out: mx.array) -> mx.array:
    gate, up = halves(x)
    silu = gate * sigmoid
    of_gate = of_out * up * (sigmoid + silu * (1 - sigmoid))
    return mx.concatenate([of_gate, of_out * silu], axis=-1)


swiglu = with_vjp(
    swiglu_and_sigmoid, lambda x, back, made: (swiglu_gradient(x[0], made[1], back[0]),)
)
"""Returns silu(gate) * up of [gate; up], and the sigmoid of the gate."""


def head_losses(
    model: OpenELM, hidden: mx.array, targets: mx.array, training: Training | None
) -> mx.array:
    """Return the losses of targets [tokens] after hidden states [tokens, model_dim]."""
    module, head = head_of(model)
    size = max(1, CHUNK // model.args.vocab_size)
    z_loss = 0.0 if training is None else training.z_loss
    frozen = not module.trainable_parameters()
    found: list[mx.array] = []
    for start in range(0, targets.size, size):
        of, chunk = targets[start : start + size], hidden[start : start + size]
        losses: Callable[[mx.array], mx.array] = partial(chunk_losses, head, z_loss, of)
        if training is not None:
            losses = with_gradient(head, z_loss, of) if frozen else recomputed(module, losses)
        if found:  # one after the other, or the logits of all would be in memory at once
            chunk = mx.depends(chunk, found[-1])
        found.append(losses(chunk))
    return found[0] if len(found) == 1 else mx.concatenate(found)


def head_of(model: OpenELM) -> tuple[nn.Module, Callable[[mx.array], mx.array]]:
    """Return the module that has the head's parameters, and what makes logits of hidden states."""
    if "lm_head" in model:
        return model.lm_head, model.lm_head
    embedding: Any = model.transformer.token_embeddings
    if isinstance(embedding, AdaptedEmbedding) and not embedding.tied:
        embedding = embedding.base
    return embedding, embedding.as_linear


def chunk_losses(head: Any, z_loss: float, targets: mx.array, hidden: mx.array) -> mx.array:
    """Return the losses of a chunk of tokens."""
    logits = head(hidden).astype(mx.float32)
    return losses_of(logits, log_sum(logits), targets, z_loss)


def losses_of(logits: mx.array, total: mx.array, targets: mx.array, z_loss: float) -> mx.array:
    """Return the losses of targets; `total` is the log of the softmax's sum."""
    losses = total - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return losses + z_loss * total.square() if z_loss else losses


def log_sum_and_softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    softmax = mx.softmax(logits, axis=-1)
    return logits.max(axis=-1) - mx.log(softmax.max(axis=-1)), softmax


log_sum = with_vjp(
    lambda logits: log_sum_and_softmax(logits)[0],
    lambda logits, back, _: (mx.softmax(logits[0], axis=-1) * back[0][:, None],),
)
"""Returns the log of the softmax's sum, which rounds as in `with_gradient`; `mx.logsumexp` does
not."""


def with_gradient(head: Any, z_loss: float, targets: mx.array) -> Callable[[mx.array], mx.array]:
    """Return `chunk_losses` as a function of hidden states, for a head that is not trained.

    The gradient is computed with the losses, as long as there are logits, up to the factor of each
    token. So neither logits nor softmax are kept or computed again.
    """

    def product(hidden: mx.array) -> tuple[mx.array, mx.array]:
        """Return a sum whose gradient is that of the losses, and the losses."""
        made = head(hidden)
        logits = mx.stop_gradient(made).astype(mx.float32)
        total, softmax = log_sum_and_softmax(logits)
        hit = mx.arange(logits.shape[-1]) == targets[:, None]
        if z_loss:
            softmax = softmax * (1 + 2 * z_loss * total)[:, None]
        of_logits = (softmax - hit).astype(made.dtype)
        return (made * of_logits).sum(), losses_of(logits, total, targets, z_loss)

    def losses(hidden: mx.array) -> tuple[mx.array, mx.array]:
        # the head is called once for both: a processor unpacks a quantized one at every call
        (_, losses), of_hidden = mx.value_and_grad(product)(hidden)
        return losses, of_hidden

    def back(hidden: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        return ((outputs[1] * cotangents[0][:, None]).astype(hidden[0].dtype),)

    both = with_vjp(losses, back)
    return lambda hidden: both(hidden)[0]
