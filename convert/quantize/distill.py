"""Distillation: codes, scales, biases and norms are trained to win back what rounding lost.

The rounded model is trained to give the exact model's next-token distributions (KL divergence) on
calibration text. Rounding passes gradients straight through (Bengio et al., arXiv:1308.3432);
scales and biases are learned as in LLM-QAT and mlx-lm's distilled weight quantization. Training
starts where error feedback ended, so every step is a small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from openelm_mlx.convert.quantize import Weights, head, in_batches, last_states, logits
from openelm_mlx.convert.quantize.grids import as_stored
from openelm_mlx.convert.quantize.rounding import Codes, Learned
from openelm_mlx.device import mx, utils
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.evaluate.compare import kl_divergence
from openelm_mlx.model.config import OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.convert.options import Progress

SEED = 17
ROWS_AT_ONCE = 8  # of tokens in one pass of the exact model


@dataclass(frozen=True)
class Schedule:
    """Adam with a warm-up and a cosine to zero. Rates are relative: those of codes to a step of the
    grid, the others to the value itself.
    """

    epochs: float = 1.5  # passes over the calibration rows
    rows: int = 4  # in one step
    codes: float = 2e-3  # of a grid step
    scales: float = 2e-3  # of a scale; four times as much for biases, which move in scales
    norms: float = 1e-3  # of a norm's weight
    warm_up: int = 10
    decays: tuple[float, float] = (0.9, 0.95)

    def rate(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass
class Start:
    """A matrix as error feedback left it, with its codes before they were rounded.

    The codes are [rows, columns], scales and biases [rows, groups].
    """

    codes: Codes
    place: mx.array
    scales: mx.array
    biases: mx.array

    def grid(self, moved: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
        """Return scales and biases [rows, groups] after these changes."""
        scales = self.scales * (1 + moved["scales"])
        return scales, self.biases + self.scales * moved["biases"]

    def weights(self, moved: dict[str, mx.array]) -> mx.array:
        """Return the float32 weights [rows, columns] after these changes; gradients pass the
        rounding as if it were not there.
        """
        size, top = self.codes.spec.group_size, 2**self.codes.spec.bits - 1
        place = mx.clip(moved["codes"], 0, top)
        rounded = place + mx.stop_gradient(mx.round(place) - place)
        scales, biases = self.grid(moved)
        groups = rounded.reshape(len(rounded), -1, size) * scales[..., None] + biases[..., None]
        return groups.reshape(rounded.shape)


def distill(
    config: OpenELMConfig,
    exact: Weights,
    start: Learned,
    tokens: mx.array,
    schedule: Schedule | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Train `start` on tokens [rows, length]. One machine always gives the same result.

    All weights are in memory in float32: gradients pass through the whole model.
    """
    schedule, exact = schedule or Schedule(), dict(exact)
    starts = {
        stem: Start(codes, mx.array(codes.before), mx.array(codes.scales), mx.array(codes.biases))
        for stem, codes in start.codes.items()
    }
    norms = [name for name, array in exact.items() if array.ndim == 1]
    moved: dict[str, Any] = {
        "matrices": [
            {
                "codes": s.place,
                "scales": mx.zeros(s.scales.shape),
                "biases": mx.zeros(s.biases.shape),
            }
            for s in starts.values()
        ],
        "norms": [mx.zeros(exact[name].shape) for name in norms],
    }

    stored = start.weights(exact)
    fixed = {name: stored[name] for name in exact if name not in {*start.stored, *norms}}

    def weights_of(moved: dict[str, Any]) -> dict[str, mx.array]:
        matrices = {
            f"{stem}.weight": starts[stem].weights(own)
            for stem, own in zip(starts, moved["matrices"], strict=True)
        }
        return {**fixed, **matrices, **norms_of(moved)}

    def norms_of(moved: dict[str, Any]) -> dict[str, mx.array]:
        shares = zip(norms, moved["norms"], strict=True)
        return {name: exact[name] * (1 + share) for name, share in shares}

    def loss(moved: dict[str, Any], batch: mx.array, reference: mx.array) -> mx.array:
        return kl_divergence(reference, logits(config, weights_of(moved), batch)).mean()

    rates = {"codes": schedule.codes, "scales": schedule.scales, "biases": 4 * schedule.scales}
    scale_of = {"matrices": [rates for _ in starts], "norms": [schedule.norms for _ in norms]}
    # from these every step makes the distributions anew: those of all tokens would not fit
    states = mx.concatenate(last_states(config, exact, in_batches(tokens, ROWS_AT_ONCE)))
    steps = max(1, round(schedule.epochs * len(tokens) / schedule.rows))
    first, second = utils.tree_map(mx.zeros_like, moved), utils.tree_map(mx.zeros_like, moved)
    gradient = mx.value_and_grad(loss)
    order = rows_in_turn(len(tokens), steps * schedule.rows)
    for step in range(steps):
        rows = mx.array(order[step * schedule.rows : (step + 1) * schedule.rows])
        reference = head(config, exact, states[rows])
        value, slope = gradient(moved, tokens[rows], reference)
        moved, first, second = adam(moved, slope, first, second, scale_of, schedule, step, steps)
        mx.eval(moved, first, second, value)
        if progress is not None:
            progress(step + 1, steps, f"distilling, loss {value.item():.4f}")
    return finished(start, starts, moved["matrices"], norms_of(moved))


def adam(
    values: Any,
    slopes: Any,
    first: Any,
    second: Any,
    rates: Any,
    schedule: Schedule,
    step: int,
    steps: int,
) -> tuple[Any, Any, Any]:
    """Take one step of Adam (arXiv:1412.6980), at a rate of its own for every kind of value."""
    a, b = schedule.decays
    first = utils.tree_map(lambda m, g: a * m + (1 - a) * g, first, slopes)
    second = utils.tree_map(lambda v, g: b * v + (1 - b) * g * g, second, slopes)
    now = schedule.rate(step, steps)
    correct = math.sqrt(1 - b ** (step + 1)) / (1 - a ** (step + 1))
    values = utils.tree_map(
        lambda x, m, v, rate: x - now * rate * correct * m / (mx.sqrt(v) + 1e-12),
        values,
        first,
        second,
        rates,
    )
    return values, first, second


def rows_in_turn(rows: int, count: int) -> np.ndarray:
    """Return `count` row numbers: all rows in random order, then again."""
    random = np.random.default_rng(SEED)
    return np.concatenate([random.permutation(rows) for _ in range(-(-count // rows))])[:count]


def finished(
    start: Learned,
    starts: Mapping[str, Start],
    moved: Sequence[dict[str, mx.array]],
    norms: Mapping[str, mx.array],
) -> Learned:
    """Round the codes for good, and scales, biases and norms to the type they are stored in."""
    kind, result = DTYPES[start.dtype].mlx, Learned(start.plan, start.dtype)
    for (stem, own), change in zip(starts.items(), moved, strict=True):
        top, name = 2**own.codes.spec.bits - 1, f"{stem}.weight"
        place = np.clip(np.array(change["codes"]), 0, top)
        scales, biases = (np.array(as_stored(side, kind)) for side in own.grid(change))
        codes = Codes(own.codes.spec, np.rint(place).astype(np.uint8), scales, biases, place)
        result.stored[name] = codes.arrays(name, kind)
    result.stored |= {name: {name: array.astype(kind)} for name, array in norms.items()}
    return result
