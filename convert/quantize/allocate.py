"""Measured allocation: bits go where they lower the loss most, at an exactly counted size.

The loss of a form is the mean KL divergence of the next-token distributions, exact model against a
model in which only that matrix is quantized. Losses of different matrices nearly add up, so the
plan that minimises their sum under a size is a knapsack with one choice a matrix: solved along the
convex hull of (bytes, loss) of each matrix, best gain per byte first (Shoham and Gersho, "Efficient
bit allocation for an arbitrary set of quantizers", IEEE ASSP 36:9, 1988).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openelm_mlx.convert.quantize.functional import (
    Weights,
    embed,
    head,
    layer,
    layer_of,
)
from openelm_mlx.convert.quantize.packing import rounded
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.score import kl_divergence
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import BITS, Plan, QuantSpec, all_specs, matrices

Progress = Callable[[int, int, str], None]
Losses = dict[
    str, dict[QuantSpec | None, float]
]  # stem -> form -> mean KL divergence in nats; None is whole and costs 0
Moments = Mapping[str, mx.array]  # stem -> mean square of each input column, [columns]
BATCH = 4  # rows of tokens in one pass: bounds the memory of logits
NEAR = 1.5  # bits around the target that are measured; of other widths the error tells the loss


@dataclass(frozen=True)
class Reference:
    """The exact model on calibration tokens: what every candidate is compared with, and where
    passes resume.
    """

    config: OpenELMConfig
    weights: Weights
    batches: tuple[mx.array, ...]  # token ids [rows, length]
    states: tuple[tuple[mx.array, ...], ...]  # of each batch, the input of every layer
    logits: tuple[mx.array, ...]
    moments: Moments

    def loss(self, weights: Weights, start: int = -1) -> float:
        """Mean KL divergence in nats of `weights`, equal to the exact ones before layer `start`."""
        total, count = 0.0, 0
        for tokens, states, exact in zip(self.batches, self.states, self.logits, strict=True):
            x = embed(weights, tokens) if start < 0 else states[start]
            for number in range(max(start, 0), self.config.num_transformer_layers):
                x = layer(self.config, number, weights, x)
            divergence: Any = kl_divergence(exact, head(self.config, weights, x)).sum().item()
            total += divergence
            count += tokens.size
        return total / count


def make_reference(config: OpenELMConfig, weights: Weights, tokens: mx.array) -> Reference:
    """Run the exact model once on tokens [rows, length] and keep what later passes need."""
    batches = [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]
    sums: dict[str, mx.array] = {}

    def look(stem: str, x: mx.array) -> None:
        sums[stem] = sums.get(stem, mx.array(0.0)) + mx.square(x).sum(axis=0)

    states, exact = [], []
    for batch in batches:
        xs = [embed(weights, batch)]
        for number in range(config.num_transformer_layers):
            xs.append(layer(config, number, weights, xs[-1], look))
        exact.append(head(config, weights, xs[-1], look))
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
    """The loss of every matrix in every form that divides its rows: widths near the target
    measured, others derived.

    `spread` widens what counts as near, for targets this far around `target_bpw`.
    """
    losses: Losses = {}
    stems = matrices(shapes)
    widths = [bits for bits in BITS if abs(bits - target_bpw) <= NEAR + spread] or [8]
    weights = dict(reference.weights)
    for number, (stem, shape) in enumerate(stems.items()):
        name, exact = stem + ".weight", reference.weights[stem + ".weight"]
        forms = [form for form in all_specs() if shape[1] % form.group_size == 0]
        probes = [
            f
            for f in forms
            if f.mode == "affine" and f.bits in widths and f.group_size == probe_group(shape[1])
        ]
        points = []
        errors = {
            form: weighted_error(
                exact, rounded(exact, form, getattr(mx, dtype)), reference.moments.get(stem)
            )
            for form in forms
        }
        for place, form in enumerate(probes):
            weights[name] = rounded(exact, form, getattr(mx, dtype))
            points.append((errors[form], max(reference.loss(weights, layer_of(stem)), 1e-9)))
            if progress is not None:
                progress(
                    number * len(probes) + place + 1, len(stems) * len(probes), f"measuring {stem}"
                )
        weights[name] = exact
        losses[stem] = {None: 0.0} | {form: interpolated(points, errors[form]) for form in forms}
    return losses


def probe_group(columns: int) -> int:
    return next((size for size in (64, 32) if columns % size == 0), 0)


def weighted_error(exact: mx.array, other: mx.array, moments: mx.array | None) -> float:
    """Mean square error of the products with inputs of these second moments, were their columns
    independent.
    """
    square = mx.square(exact - other)
    mean: Any = (square if moments is None else square * moments).mean().item()
    return max(mean, 1e-30)


def interpolated(points: list[tuple[float, float]], error: float) -> float:
    """The loss at this error: straight lines through the measured points, both on logarithmic
    scales.

    Beyond the points loss is proportional to error, as it is for small ones (KL is quadratic, so is
    the error).
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
    """Bytes of all tensors, norms, scales and biases included."""
    total = 0
    for name, shape in shapes.items():
        form = plan.get(name.removesuffix(".weight"))
        total += form_bytes(form, shape, dtype)
    return total


def form_bytes(form: QuantSpec | None, shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * itemsize(dtype) if form is None else form.nbytes(shape, dtype)


def choose(
    losses: Losses, shapes: Mapping[str, tuple[int, ...]], dtype: str, target_bpw: float
) -> dict[str, QuantSpec | None]:
    """The forms of least summed loss whose bytes, all tensors counted, are at most `target_bpw`
    bits per weight.

    Raises `OptionError` where even the smallest forms need more.
    """
    budget = int(target_bpw * sum(math.prod(shape) for shape in shapes.values()) / 8)
    sizes = {
        stem: {form: form_bytes(form, shapes[f"{stem}.weight"], dtype) for form in of}
        for stem, of in losses.items()
    }
    hulls = {
        stem: hull([(sizes[stem][form], loss, form) for form, loss in of.items()])
        for stem, of in losses.items()
    }
    plan = {stem: points[0][2] for stem, points in hulls.items()}
    room = budget - plan_bytes(plan, shapes, dtype)
    if room < 0:
        least = (
            8 * plan_bytes(plan, shapes, dtype) / sum(math.prod(shape) for shape in shapes.values())
        )
        raise OptionError(
            f"target_bpw is {target_bpw}; the smallest this model can be is {least:.3f}"
        )
    steps = [
        ((low[1] - high[1]) / (high[0] - low[0]), stem, place, high[0] - low[0])
        for stem, points in hulls.items()
        for place, (low, high) in enumerate(zip(points, points[1:], strict=False))
    ]
    taken = dict.fromkeys(hulls, 0)
    for _, stem, place, cost in sorted(
        steps, key=lambda step: -step[0]
    ):  # a hull's own steps stay in order
        if cost <= room and taken[stem] == place:
            taken[stem], room = place + 1, room - cost
    plan = {stem: hulls[stem][place][2] for stem, place in taken.items()}
    return exchanged(plan, losses, sizes, room)


def hull(
    points: list[tuple[int, float, QuantSpec | None]],
) -> list[tuple[int, float, QuantSpec | None]]:
    """The lower convex hull of (bytes, loss): smallest first, each step a smaller gain per byte
    than the one before.
    """
    kept: list[tuple[int, float, QuantSpec | None]] = []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if kept and point[1] >= kept[-1][1]:
            continue
        while len(kept) > 1 and gain(kept[-1], point) >= gain(kept[-2], kept[-1]):
            kept.pop()
        if kept and kept[-1][0] == point[0]:
            continue
        kept.append(point)
    return kept


def gain(
    low: tuple[int, float, QuantSpec | None], high: tuple[int, float, QuantSpec | None]
) -> float:
    return (low[1] - high[1]) / max(high[0] - low[0], 1e-9)


def exchanged(
    plan: dict[str, QuantSpec | None],
    losses: Losses,
    sizes: Mapping[str, Mapping[QuantSpec | None, int]],
    room: int,
) -> dict[str, QuantSpec | None]:
    """Fill the room that is left: single changes, or one matrix giving bytes to another, while the
    sum falls.
    """
    while True:
        moves = [
            (
                losses[stem][form] - losses[stem][plan[stem]],
                sizes[stem][form] - sizes[stem][plan[stem]],
                stem,
                form,
            )
            for stem in plan
            for form in losses[stem]
            if form != plan[stem]
        ]
        best = min(
            ((change, [move]) for move in moves for change, cost in [move[:2]] if cost <= room),
            default=(0.0, []),
            key=lambda entry: entry[0],
        )
        ups = sorted((m for m in moves if m[0] < 0), key=lambda m: m[0])[:64]
        downs = [m for m in moves if m[1] < 0]
        for up in ups:
            for down in downs:
                if up[2] != down[2] and up[1] + down[1] <= room and up[0] + down[0] < best[0]:
                    best = (up[0] + down[0], [up, down])
        if best[0] > -1e-9:
            return plan
        for _, cost, stem, form in best[1]:
            plan[stem], room = form, room - cost


def true_loss(reference: Reference, plan: Plan, dtype: str) -> float:
    """The loss with every matrix in its planned form at once."""
    weights = {
        name: rounded(array, plan.get(name.removesuffix(".weight")), getattr(mx, dtype))
        for name, array in reference.weights.items()
    }
    return reference.loss(weights)
