"""Losses of quantized matrices: what each costs alone, and what a whole plan costs.

The loss of a spec is the mean KL divergence of the next-token distributions, exact model against a
model in which only that matrix is quantized.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import Weights, embed, head, in_batches, layer
from openelm_mlx.convert.quantize.rounding import rounded
from openelm_mlx.convert.sources import number_of
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.evaluate.score import kl_divergence
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import BITS, Plan, QuantSpec, all_specs, matrices, planned

if TYPE_CHECKING:
    from openelm_mlx.convert.options import Progress

Spec = QuantSpec | None  # None: not quantized, which costs no loss
Losses = dict[str, dict[Spec, float]]  # stem -> spec -> mean KL divergence in nats
BATCH = 4  # rows of tokens in one pass: bounds the memory of logits
NEAR = 1.5  # bits from the target that are measured; the loss of others follows from their error


@dataclass(frozen=True)
class Reference:
    """The outputs of the exact model on calibration tokens, which candidates are compared with."""

    config: OpenELMConfig
    weights: Weights
    batches: tuple[mx.array, ...]  # token ids [rows, length]
    states: tuple[tuple[mx.array, ...], ...]  # for each batch the input of every layer
    logits: tuple[mx.array, ...]
    moments: Mapping[str, mx.array]  # stem -> mean square of each input column, [columns]

    def loss(self, weights: Weights, start: int = -1) -> float:
        """Return the mean KL divergence in nats of `weights`.

        They must equal the exact ones before layer `start`: that is where the passes resume.
        """
        total, count = 0.0, 0
        for tokens, states, exact in zip(self.batches, self.states, self.logits, strict=True):
            x = embed(weights, tokens) if start < 0 else states[start]
            for number in range(max(start, 0), self.config.num_transformer_layers):
                x = layer(self.config, number, weights, x)
            divergence: Any = kl_divergence(exact, head(self.config, weights, x)).sum().item()
            total, count = total + divergence, count + tokens.size
        return total / count


def make_reference(config: OpenELMConfig, weights: Weights, tokens: mx.array) -> Reference:
    """Run the exact model once on tokens [rows, length] and keep what later passes need."""
    batches = in_batches(tokens, BATCH)
    sums: dict[str, mx.array] = {}

    def hook(stem: str, x: mx.array) -> None:
        sums[stem] = sums.get(stem, mx.array(0.0)) + mx.square(x).sum(axis=0)

    states, exact = [], []
    for batch in batches:
        xs = [embed(weights, batch)]
        for number in range(config.num_transformer_layers):
            xs.append(layer(config, number, weights, xs[-1], hook))
        exact.append(head(config, weights, xs[-1], hook))
        states.append(tuple(xs[:-1]))
        mx.eval(xs, exact[-1], sums)
    moments = {stem: total / tokens.size for stem, total in sums.items()}
    return Reference(config, weights, tuple(batches), tuple(states), tuple(exact), moments)


def measure(
    reference: Reference,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    target_bpw: float,
    progress: Progress | None = None,
    spread: float = 0.0,
) -> Losses:
    """Return the loss of every matrix in every spec whose groups divide its rows.

    Numbers of bits near the target are measured, the others derived. `spread` widens what counts as
    near, for targets this far around `target_bpw`.
    """
    losses: Losses = {}
    stems, kind = matrices(shapes), DTYPES[dtype].mlx
    near = [bits for bits in BITS if abs(bits - target_bpw) <= NEAR + spread] or [8]
    weights = dict(reference.weights)
    for number, (stem, shape) in enumerate(stems.items()):
        name, exact = stem + ".weight", reference.weights[stem + ".weight"]
        specs = [spec for spec in all_specs() if shape[1] % spec.group_size == 0]
        group = next((size for size in (64, 32) if shape[1] % size == 0), 0)
        probes = [bits for bits in near if QuantSpec(bits, group) in specs] if group else []
        moments = reference.moments.get(stem)
        errors = {
            spec: weighted_error(exact, rounded(exact, spec, kind), moments) for spec in specs
        }
        points = []
        for place, bits in enumerate(probes, start=number * len(probes) + 1):
            spec = QuantSpec(bits, group)
            weights[name] = rounded(exact, spec, kind)
            points.append((errors[spec], max(reference.loss(weights, number_of(stem)), 1e-9)))
            if progress is not None:
                progress(place, len(stems) * len(probes), f"measuring {stem}")
        weights[name] = exact
        losses[stem] = {None: 0.0} | {spec: interpolated(points, errors[spec]) for spec in specs}
    return losses


def weighted_error(exact: mx.array, other: mx.array, moments: mx.array | None) -> float:
    """Return the mean square error of the products with inputs of these second moments, were their
    columns independent.
    """
    square = mx.square(exact - other)
    mean: Any = (square if moments is None else square * moments).mean().item()
    return max(mean, 1e-30)


def interpolated(points: list[tuple[float, float]], error: float) -> float:
    """Return the loss at this error: straight lines through the measured points (error, loss), both
    on logarithmic scales.

    Beyond the points the loss is proportional to the error, as it is for small ones: both are
    quadratic.
    """
    points = sorted(points)
    if not points:
        return error
    if error <= points[0][0]:
        return points[0][1] * error / points[0][0]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if error <= high:
            share = math.log(error / low) / math.log(high / low) if high > low else 1.0
            return math.exp(math.log(a) * (1 - share) + math.log(b) * share)
    return points[-1][1] * error / points[-1][0]


def true_loss(reference: Reference, plan: Plan, dtype: str) -> float:
    """Return the loss with every matrix in its spec at once."""
    return reference.loss(rounded_weights(reference.weights, plan, dtype))


def rounded_weights(weights: Weights, plan: Plan, dtype: str) -> dict[str, mx.array]:
    """Return the float32 weights that these stand for once they are stored as planned."""
    return {
        name: rounded(array, planned(plan, name), DTYPES[dtype].mlx)
        for name, array in weights.items()
    }
