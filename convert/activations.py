"""The largest number that a model computes on a text, which tells whether float16 can hold it.

float16 keeps ten bits of a fraction, where bfloat16 keeps seven, and ends at 65,504. An engine may
compute a model in it whose numbers stay far below that. They are measured when the model is
converted, as loading reads no text and guesses nothing. Every value counts: weights, states, norms,
outputs of all projections, rotated queries and keys, scores of attention, gated products, logits.
The model goes through its layers one after another, in float32.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import (
    Weights,
    embedded,
    head_weights,
    layer,
    normed,
    of_layer,
)
from openelm_mlx.convert.quantize.losses import logits_from
from openelm_mlx.device import mx
from openelm_mlx.evaluate.perplexity import ROW, TEXT, text_batches
from openelm_mlx.evaluate.score import POSITIONS
from openelm_mlx.files import read_text
from openelm_mlx.model.config import BOS, EMBEDDINGS, EOS, OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.convert.opening import OpenedModel
    from openelm_mlx.convert.options import Progress

TOKENS = 2000  # of the text that comes with this package


class Largest:
    """The largest magnitude in all arrays that it was called with; NaN if one has NaN."""

    def __init__(self) -> None:
        self.found = mx.array(0.0)

    def __call__(self, x: mx.array) -> None:
        self.found = mx.maximum(self.found, mx.abs(x).max())


def activation_text(opened: OpenedModel) -> list[mx.array]:
    """Return batches of token ids [rows, length]: the text, each row after BOS, and one that ends.

    EOS is an input in every chat.
    """
    ids = opened.tokenizer.processor.encode(read_text(TEXT, "the text to measure on"))[:TOKENS]
    batches = text_batches(ids, min(ROW, opened.trimmed.max_context_length))
    return [*batches, mx.array([[BOS, EOS]], dtype=mx.int32)]


def measure_activations(
    config: OpenELMConfig,
    weights: Weights,
    batches: list[mx.array],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return the largest number that a model computes on the batches, and of how many tokens.

    There is nothing to return for a model whose numbers overflow float32.
    """
    largest, steps = Largest(), itertools.count(1)
    total = config.num_transformer_layers + len(batches)

    def tell(what: str) -> None:
        if progress is not None:
            progress(next(steps), total, f"measuring activations, {what}")

    largest(weights[f"{EMBEDDINGS}.weight"])
    states = embedded(weights, batches)
    for number in range(config.num_transformer_layers):
        own = of_layer(weights, number)
        for weight in own.values():
            largest(weight)
        for place, x in enumerate(states):
            states[place] = layer(config, number, own, x, look=largest)
            mx.eval(states[place], largest.found)
        tell(f"layer {number}")
    own = head_weights(config, weights)
    for weight in own.values():
        largest(weight)
    for x in states:
        largest(normed(config, own, x))
        for start in range(0, x.shape[0] * x.shape[1], POSITIONS):
            largest(logits_from(config, own, x, start))
            mx.eval(largest.found)
        tell("logits")
    found: Any = largest.found.item()
    tokens = sum(batch.size for batch in batches)
    return {"largest": float(f"{found:.6g}"), "tokens": tokens} if math.isfinite(found) else {}
