"""Measured allocation: bits go where they lower the loss most, at an exactly counted size.

The loss of a spec is the mean KL divergence of the next-token distributions, exact model against a
model in which only that matrix is quantized. Losses of different matrices nearly add up, so the
plan of least sum under a size is a knapsack with one choice a matrix. It is solved along the convex
hull of (bytes, loss) of each matrix, best gain per byte first (Shoham and Gersho, "Efficient bit
allocation for an arbitrary set of quantizers", IEEE ASSP 36:9, 1988).
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
from openelm_mlx.dtypes import DTYPES, itemsize
from openelm_mlx.errors import OptionError
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


def plan_bytes(plan: Plan, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Return the bytes of all tensors, norms, scales and biases included."""
    return sum(spec_bytes(planned(plan, name), shape, dtype) for name, shape in shapes.items())


def spec_bytes(spec: Spec, shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * itemsize(dtype) if spec is None else spec.nbytes(shape, dtype)


def choose(
    losses: Losses, shapes: Mapping[str, tuple[int, ...]], dtype: str, target_bpw: float
) -> dict[str, Spec]:
    """Return the plan of least summed loss whose bytes, all tensors counted, are at most
    `target_bpw` bits per weight.

    Raises `OptionError` if even the smallest plan needs more.
    """
    parameters = sum(math.prod(shape) for shape in shapes.values())
    sizes = {
        stem: {spec: spec_bytes(spec, shapes[f"{stem}.weight"], dtype) for spec in own}
        for stem, own in losses.items()
    }
    hulls = {
        stem: hull([(sizes[stem][spec], loss, spec) for spec, loss in own.items()])
        for stem, own in losses.items()
    }
    smallest = plan_bytes({stem: points[0][2] for stem, points in hulls.items()}, shapes, dtype)
    left = int(target_bpw * parameters / 8) - smallest
    if left < 0:
        least = 8 * smallest / parameters
        raise OptionError(
            f"target_bpw is {target_bpw}; the smallest this model can be is {least:.3f}"
        )
    steps = [
        (gain(low, high), stem, place, high[0] - low[0])
        for stem, points in hulls.items()
        for place, (low, high) in enumerate(zip(points, points[1:], strict=False))
    ]
    taken = dict.fromkeys(hulls, 0)
    for _, stem, place, cost in sorted(steps, key=lambda step: -step[0]):  # stable: hulls in order
        if cost <= left and taken[stem] == place:
            taken[stem], left = place + 1, left - cost
    plan = {stem: hulls[stem][place][2] for stem, place in taken.items()}
    return exchanged(plan, losses, sizes, left)


Point = tuple[int, float, Spec]  # bytes, loss


def hull(points: list[Point]) -> list[Point]:
    """Return the lower convex hull: the smallest first, each step a smaller gain per byte than the
    one before.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if kept and point[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and gain(kept[-1], point) >= gain(kept[-2], kept[-1]):
            kept.pop()
        if not kept or kept[-1][0] != point[0]:
            kept.append(point)
    return kept


def gain(low: Point, high: Point) -> float:
    return (low[1] - high[1]) / max(high[0] - low[0], 1e-9)


def exchanged(
    plan: dict[str, Spec],
    losses: Losses,
    sizes: Mapping[str, Mapping[Spec, int]],
    left: int,
) -> dict[str, Spec]:
    """Spend the bytes that are left: change single matrices, or let one give bytes to another,
    while the sum of losses falls.
    """
    while True:
        moves = [
            (own[spec] - own[plan[stem]], sizes[stem][spec] - sizes[stem][plan[stem]], stem, spec)
            for stem, own in losses.items()
            for spec in own
            if spec != plan[stem]
        ]
        single = (([move], move[0]) for move in moves if move[1] <= left)
        best, change = min(single, default=([], 0.0), key=lambda entry: entry[1])
        downs = [move for move in moves if move[1] < 0]
        for up in sorted((move for move in moves if move[0] < 0), key=lambda move: move[0])[:64]:
            for down in downs:
                if up[2] != down[2] and up[1] + down[1] <= left and up[0] + down[0] < change:
                    best, change = [up, down], up[0] + down[0]
        if change > -1e-9:
            return plan
        for _, cost, stem, spec in best:
            plan[stem], left = spec, left - cost


def true_loss(reference: Reference, plan: Plan, dtype: str) -> float:
    """Return the loss with every matrix in its spec at once."""
    return reference.loss(rounded_weights(reference.weights, plan, dtype))


def rounded_weights(weights: Weights, plan: Plan, dtype: str) -> dict[str, mx.array]:
    """Return the float32 weights that these stand for once they are stored as planned."""
    return {
        name: rounded(array, planned(plan, name), DTYPES[dtype].mlx)
        for name, array in weights.items()
    }
