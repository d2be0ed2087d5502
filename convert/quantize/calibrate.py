"""Learned rounding on top of any plan: matrices one after another, each on the inputs the rounded
ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from openelm_mlx.convert.quantize.functional import (
    EMBEDDINGS,
    Weights,
    embed,
    head,
    head_stem,
    layer,
)
from openelm_mlx.convert.quantize.gptq import Codes, error_feedback
from openelm_mlx.convert.quantize.packing import quantized, restored
from openelm_mlx.device import mx
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import Plan

Progress = Callable[[int, int, str], None]
BATCH = 8  # rows of tokens in one pass
GPTQ_ROWS = 64  # more change the second moments little
LAYER_MATRICES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
INPUT_DAMPING = (
    0.1  # for the tied embeddings: they are inputs too, where every column matters alike
)


@dataclass
class Learned:
    """Float32 weights as the rounded model has them, and the codes of its affine matrices by
    stem.
    """

    weights: dict[str, mx.array]
    codes: dict[str, Codes] = field(default_factory=dict)
    plan: Plan = field(default_factory=dict)
    norms: dict[str, mx.array] = field(default_factory=dict)  # by tensor name, as stored

    def arrays(self, dtype: str) -> dict[str, dict[str, mx.array]]:
        """Tensor name -> what is to be stored for it; matrices in other forms are left to plain rounding."""
        codes = {f"{stem}.weight": codes for stem, codes in self.codes.items()}
        return {name: own.arrays(name, getattr(mx, dtype)) for name, own in codes.items()} | {
            name: {name: array} for name, array in self.norms.items()
        }

    def stored_weights(self, dtype: str) -> dict[str, mx.array]:
        """The float32 weights the stored tensors stand for, whole ones rounded to `dtype`."""
        packed = {f"{stem}.weight" for stem, form in self.plan.items() if form is not None}
        kind = getattr(mx, dtype)
        return {
            name: a if name in packed else a.astype(kind).astype(mx.float32)
            for name, a in self.weights.items()
        }


def calibrate(
    method: str,
    config: OpenELMConfig,
    exact: Weights,
    plan: Plan,
    tokens: mx.array,
    dtype: str,
    progress: Progress | None = None,
) -> Learned:
    """Learn the rounding of `plan` on tokens [rows, length]: `gptq`, or `distill`, which goes on
    from there.
    """
    learned = calibrate_gptq(config, exact, plan, tokens[:GPTQ_ROWS], dtype, progress)
    if method == "gptq":
        return learned
    from openelm_mlx.convert.quantize.distill import distill

    return distill(config, exact, learned, tokens, dtype, progress=progress)


def calibrate_gptq(
    config: OpenELMConfig,
    exact: Weights,
    plan: Plan,
    tokens: mx.array,
    dtype: str,
    progress: Progress | None = None,
) -> Learned:
    """Round every affine matrix of `plan` with error feedback on tokens [rows, length]; block
    formats to nearest.

    The second moments come from the model rounded so far, so that later matrices make up for
    earlier ones.
    """
    done = Learned(dict(exact), plan=plan)
    batches = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
    order = (
        [EMBEDDINGS]
        + [
            f"transformer.layers.{n}.{stem}"
            for n in range(config.num_transformer_layers)
            for stem in LAYER_MATRICES
        ]
        + ([] if config.share_input_output_layers else ["lm_head"])
    )
    states: list[mx.array] = []
    for place, stem in enumerate(order):
        if progress is not None:
            progress(place, len(order), f"rounding {stem}")
        number = int(stem.split(".")[2]) if ".layers." in stem else -1
        if stem.endswith(LAYER_MATRICES[0]):
            states = advance(config, done.weights, batches, states, number)
        moments, damping = None, {}
        if stem == EMBEDDINGS:
            if config.share_input_output_layers:
                moments, damping = head_moments(config, exact, batches), {"damping": INPUT_DAMPING}
        elif stem == "lm_head":
            states = advance(config, done.weights, batches, states, config.num_transformer_layers)
            moments = second_moments(
                lambda x, look: head(config, done.weights, x, look), states, stem
            )
        else:
            moments = second_moments(
                lambda x, look, n=number: layer(config, n, done.weights, x, look), states, stem
            )
        round_one(done, exact, stem, moments, dtype, **damping)
    if progress is not None:
        progress(len(order), len(order), "rounded")
    return done


def round_one(
    done: Learned,
    exact: Weights,
    stem: str,
    moments: mx.array | None,
    dtype: str,
    damping: float = 0.01,
) -> None:
    form, name = done.plan.get(stem), f"{stem}.weight"
    kind = getattr(mx, dtype)
    if form is None or form.mode != "affine":
        stored = quantized(name, exact[name].astype(kind), form)
        done.weights[name] = restored(name, stored, form)
        return
    hessian = (
        np.eye(exact[name].shape[1], dtype=np.float32) if moments is None else np.array(moments)
    )
    codes = error_feedback(np.array(exact[name]), hessian, form, kind, damping)
    done.codes[stem] = codes
    done.weights[name] = mx.array(codes.dense())


def advance(
    config: OpenELMConfig,
    weights: Weights,
    batches: list[mx.array],
    states: list[mx.array],
    number: int,
) -> list[mx.array]:
    """The inputs of layer `number` from those of the layer before it, which is rounded by now."""
    if number == 0:
        result = [embed(weights, tokens) for tokens in batches]
    else:
        result = [layer(config, number - 1, weights, x) for x in states]
    for x in result:
        mx.eval(x)
    return result


def second_moments(run: Callable[..., mx.array], states: list[mx.array], stem: str) -> mx.array:
    """Mean of x x^T over the inputs of a matrix, [columns, columns]."""
    total, count = mx.array(0.0), 0
    for x in states:
        seen: dict[str, mx.array] = {}
        run(x, seen.__setitem__)
        total = total + seen[stem].T @ seen[stem]
        count += len(seen[stem])
        mx.eval(total)
    return total / count


def head_moments(config: OpenELMConfig, exact: Weights, batches: list[mx.array]) -> mx.array:
    """Second moments of the head's inputs in the exact model."""
    total, count = mx.array(0.0), 0
    for tokens in batches:
        x = embed(exact, tokens)
        for number in range(config.num_transformer_layers):
            x = layer(config, number, exact, x)
        seen: dict[str, mx.array] = {}
        head(config, exact, x, seen.__setitem__)
        inputs = seen[head_stem(config)]
        total, count = total + inputs.T @ inputs, count + len(inputs)
        mx.eval(total)
    return total / count
