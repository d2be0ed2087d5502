"""Measured allocation: bits go where they lower the loss most, at an exactly counted size.

Losses of different matrices nearly add up, so the plan of least sum under a size is a knapsack with
one choice a matrix. It is solved along the convex hull of (bytes, loss) of each matrix, best gain
per byte first (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers",
IEEE ASSP 36:9, 1988).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import Weights
from openelm_mlx.convert.quantize.losses import (
    Losses,
    Spec,
    fitted,
    make_reference,
    measure,
    true_loss,
)
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import OptionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, all_specs, matrices, planned

if TYPE_CHECKING:
    from openelm_mlx.convert.options import Progress


def measured_plan(
    config: OpenELMConfig,
    exact: Weights,
    tokens: mx.array,
    dtype: str,
    target_bpw: float,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of least loss on `tokens` [rows, length] at `target_bpw`, and what was
    measured: the losses of each matrix alone, their sum, that of all at once, and that of the best
    uniform plan of no more bytes, which is returned instead if it loses less.

    Raises `OptionError` if even the smallest plan needs more.
    """
    shapes, rounding = expected_tensors(config), fitted(dtype)
    reference = make_reference(config, exact, tokens, progress)
    losses = measure(reference, shapes, rounding, target_bpw, progress)
    plan: Plan = choose(losses, shapes, dtype, target_bpw)
    found = true_loss(reference, plan, rounding)
    each = {stem: losses[stem][spec] for stem, spec in plan.items()}
    measured: dict[str, Any] = {
        "loss_of_each": {stem: float(f"{loss:.3g}") for stem, loss in each.items()},
        "sum_of_losses": sum(each.values()),
        "loss_together": found,
    }
    uniform = {
        spec: true_loss(reference, dict.fromkeys(plan, spec), rounding)
        for spec in largest_uniform(shapes, dtype, target_bpw)
    }
    plan, best = never_worse(plan, found, uniform)
    return plan, measured | best


def never_worse(
    plan: Plan, loss: float, uniform: Mapping[QuantSpec, float]
) -> tuple[Plan, dict[str, Any]]:
    """Return the plan, or the uniform one of least loss if that is lower, and the record of it."""
    if not uniform:
        return plan, {}
    spec = min(uniform, key=uniform.__getitem__)
    taken = uniform[spec] < loss
    record = {"spec": str(spec), "loss": uniform[spec], "taken": taken}
    return dict.fromkeys(plan, spec) if taken else plan, {"best_uniform": record}


def largest_uniform(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, target_bpw: float
) -> list[QuantSpec]:
    """Return of each mode and group size the spec of the most bits that all matrices can be in
    within `target_bpw` bits per weight.
    """
    stems, most = matrices(shapes), {}
    for spec in all_specs():  # the smallest first
        divides = all(columns % spec.group_size == 0 for _, columns in stems.values())
        plan = dict.fromkeys(stems, spec)
        if divides and plan_bytes(plan, shapes, dtype) <= budget(shapes, target_bpw):
            most[spec.mode, spec.group_size] = spec
    return list(most.values())


def budget(shapes: Mapping[str, tuple[int, ...]], target_bpw: float) -> int:
    """Return the bytes that a model of these tensors takes at so many bits per weight."""
    return int(target_bpw * sum(math.prod(shape) for shape in shapes.values()) / 8)


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
    sizes = {
        stem: {spec: spec_bytes(spec, shapes[f"{stem}.weight"], dtype) for spec in own}
        for stem, own in losses.items()
    }
    hulls = {
        stem: hull([(sizes[stem][spec], loss, spec) for spec, loss in own.items()])
        for stem, own in losses.items()
    }
    smallest = plan_bytes({stem: points[0][2] for stem, points in hulls.items()}, shapes, dtype)
    left = budget(shapes, target_bpw) - smallest
    if left < 0:
        least = 8 * smallest / sum(math.prod(shape) for shape in shapes.values())
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
        if change > -1e-6 * sum(own[plan[stem]] for stem, own in losses.items()):
            return plan
        for _, cost, stem, spec in best:
            plan[stem], left = spec, left - cost
