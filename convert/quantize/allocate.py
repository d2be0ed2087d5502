"""Measured allocation: bits go where they lower the loss most, at an exactly counted size.

Losses of different matrices nearly add up, so the plan of least sum under a size is a knapsack with
one choice a matrix. It is solved exactly, by dynamic programming over bytes (Kellerer, Pferschy and
Pisinger, "Knapsack Problems", 2004, 11.5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from openelm_mlx.convert.quantize import Weights
from openelm_mlx.convert.quantize.losses import (
    Losses,
    Reference,
    Spec,
    fitted,
    make_reference,
    measure,
)
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import OptionError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, all_specs, matrices, planned

if TYPE_CHECKING:
    from openelm_mlx.convert.options import Progress

CELLS = 1 << 18  # sizes that are told apart: finer than any model needs


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
    return best_plan(reference, losses, shapes, dtype, target_bpw, progress)


def best_plan(
    reference: Reference,
    losses: Losses,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    target_bpw: float,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Return what `measured_plan` does, from the losses of each matrix."""
    plan: Plan = choose(losses, shapes, dtype, target_bpw)
    specs = largest_uniform(shapes, dtype, target_bpw)
    changes: list[Plan] = [{}, *(dict.fromkeys(plan, spec) for spec in specs)]
    found, *uniform = reference.losses_of(changes, fitted(dtype), plan, progress)
    each = {stem: losses[stem][spec] for stem, spec in plan.items()}
    measured: dict[str, Any] = {
        "loss_of_each": {stem: float(f"{loss:.3g}") for stem, loss in each.items()},
        "sum_of_losses": sum(each.values()),
        "loss_together": found,
    }
    plan, best = never_worse(plan, found, dict(zip(specs, uniform, strict=True)))
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
    options = {
        stem: worthwhile([(spec_bytes(s, shapes[f"{stem}.weight"], dtype), own[s], s) for s in own])
        for stem, own in losses.items()
    }
    smallest = plan_bytes({stem: own[0][2] for stem, own in options.items()}, shapes, dtype)
    left = budget(shapes, target_bpw) - smallest
    if left < 0:
        least = 8 * smallest / sum(math.prod(shape) for shape in shapes.values())
        raise OptionError(
            f"target_bpw is {target_bpw}; the smallest this model can be is {least:.3f}"
        )
    extra = [[point[0] - own[0][0] for point in own] for own in options.values()]
    unit = max(math.gcd(*(size for own in extra for size in own)), -(-left // CELLS), 1)
    taken = knapsack(
        [[-(-size // unit) for size in own] for own in extra],
        [[point[1] for point in own] for own in options.values()],
        left // unit,
    )
    return {stem: own[place][2] for place, (stem, own) in zip(taken, options.items(), strict=True)}


Point = tuple[int, float, Spec]  # bytes, loss


def worthwhile(points: list[Point]) -> list[Point]:
    """Return the points that lose less than all smaller ones, the smallest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def knapsack(sizes: list[list[int]], losses: list[list[float]], room: int) -> list[int]:
    """Return the place of one choice in each list, of least summed loss and sizes that sum to at
    most `room`. The first choice of each has size 0.
    """
    least, picks = np.zeros(room + 1), []  # by the room that is taken at most
    for own_sizes, own_losses in zip(sizes, losses, strict=True):
        now, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.int8)
        for place, (size, loss) in enumerate(zip(own_sizes, own_losses, strict=True)):
            if size <= room:
                found = least[: room + 1 - size] + loss
                better = found < now[size:]
                now[size:][better], pick[size:][better] = found[better], place
        least = now
        picks.append(pick)
    taken = []
    for own_sizes, pick in zip(reversed(sizes), reversed(picks), strict=True):
        taken.append(int(pick[room]))
        room -= own_sizes[taken[-1]]
    return taken[::-1]
