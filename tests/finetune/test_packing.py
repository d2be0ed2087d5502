"""Packed rows: what a token's loss is, and what is learnt from it, does not depend on its row."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from trained import golden_engine, method_of, trained_model

from openelm_mlx.device import mx, utils
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.examples import Example
from openelm_mlx.finetune.forward import token_losses
from openelm_mlx.finetune.plan import Plan
from openelm_mlx.finetune.step import Step

TOLERANCE = 1e-5  # relative to the largest element


def examples(vocabulary: int) -> list[Example]:
    random = np.random.default_rng(5)
    found = []
    for size in (5, 9, 16) * 4:
        marks = random.integers(0, 2, size).astype(np.uint8)
        marks[0], marks[-1] = 0, 1
        tokens = array("i", random.integers(3, vocabulary, size).tolist())
        found.append(Example(tokens, marks.tobytes(), ""))
    return found


def losses_in(batch: Batch, losses: mx.array) -> dict[tuple[int, ...], list[float]]:
    """Return the losses of the trained tokens of each sequence, by its tokens."""
    found = {}
    tokens, weights, numbers = (np.array(a) for a in (batch.tokens, batch.weights, batch.sequences))
    inside = np.array(batch.segments) > 0
    for number in np.unique(numbers[inside]):
        own = inside & (numbers == number)
        trained = own & (weights > 0)
        found[tuple(tokens[own].tolist())] = np.array(losses)[trained].tolist()
    return found


@pytest.mark.parametrize("method", ["dora", "full"])
def test_rows_change_neither_losses_nor_gradients(method: str) -> None:
    """Alone, packed, one a row with padding, in other orders and batches: all are the same."""
    engine = golden_engine("tied-gqa4")
    found = examples(engine.config.vocab_size)
    model = trained_model(engine, method_of(method))
    step = Step(model, method_of(method))

    def results(batches: list[Batch]) -> tuple[dict[tuple[int, ...], list[float]], Any]:
        losses, total = {}, None
        for batch in batches:
            losses |= losses_in(batch, token_losses(model, batch))
            _, grads = step.gradients(batch, mx.random.key(0))
            total = grads if total is None else utils.tree_map(mx.add, total, grads)
        return losses, dict(utils.tree_flatten(total))

    alone = [packed([[one]], Shape(1, len(one.tokens), 16, 1)) for one in found]
    losses, grads = results(alone)
    assert len(losses) == len(found)
    for batch, packing, seed in ((2, True, 0), (1, True, 1), (3, False, 0)):
        options = method_of(method, batch=batch, packing=packing, seed=seed, epochs=1)
        plan = Plan(found, options, 32)
        batches = [one for number in range(1, plan.steps + 1) for one in plan.batches(number)]
        others, other_grads = results(batches)
        assert others.keys() == losses.keys()
        largest = max(map(max, losses.values()))
        for tokens, expected in losses.items():
            assert others[tokens] == pytest.approx(expected, abs=TOLERANCE * largest)
        for name, gradient in grads.items():
            error = mx.abs(gradient - other_grads[name]).max()
            assert error <= TOLERANCE * mx.abs(gradient).max(), name
