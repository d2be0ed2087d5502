"""Optimizers are MLX's with the options that they have, and the learning rate follows a formula."""

from __future__ import annotations

import math

import pytest

from openelm_mlx.device import mx
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.optimizer import new_optimizer, rate_at
from openelm_mlx.finetune.options import OPTIMIZERS, FinetuneOptions

RATE, DECAY, ONE, TWO, EPSILON = 0.1, 0.25, 0.75, 0.5, 0.125
OTHERS = {"weight_decay": DECAY, "beta1": ONE, "beta2": TWO, "epsilon": EPSILON}


def first_step(name: str, w: float, g: float) -> float:
    """Return the weight after one step, by the formulas of the papers."""
    match name:
        case "adamw" | "adam":  # arXiv:1711.05101: the corrected moments are g and its square
            decay = DECAY if name == "adamw" else 0.0
            return w * (1 - RATE * decay) - RATE * g / (abs(g) + EPSILON)
        case "lion":  # arXiv:2302.06675
            return w * (1 - RATE * DECAY) - RATE * math.copysign(1, g)
        case "sgd":
            return w - RATE * (g + DECAY * w)
        case "muon":  # a vector: Nesterov's momentum
            g += DECAY * w
            return w - RATE * (g * (1 - ONE) + (1 - ONE) * g * ONE)
    # arXiv:1804.04235, algorithm 4 without relative steps: g / |g|, not clipped at 1
    return w * (1 - RATE * DECAY) - RATE * math.copysign(1, g)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_step_is_that_of_the_published_formula(name):
    own = {key: value for key, value in OTHERS.items() if key in OPTIMIZERS[name]}
    optimizer = new_optimizer(FinetuneOptions(optimizer=name, **own))
    weights, grads = {"w": mx.array([2.0, -1.0])}, {"w": mx.array([0.5, 0.25])}
    optimizer.init(weights)
    optimizer.learning_rate = RATE
    found = optimizer.apply_gradients(grads, weights)["w"].tolist()
    wanted = [first_step(name, 2.0, 0.5), first_step(name, -1.0, 0.25)]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_adam_leaves_a_weight_without_gradient_as_it_is():
    """As those of a new adapter's `a` are, and of tokens that no example has."""
    optimizer = new_optimizer(FinetuneOptions(epsilon=1e-15))
    weights = {"w": mx.array([2.0])}
    optimizer.init(weights)
    optimizer.learning_rate = RATE
    assert optimizer.apply_gradients({"w": mx.array([0.0])}, weights)["w"].item() == 2
    with pytest.raises(OptionError, match=r"^epsilon is 0\.0; allowed is a number from 1e-15"):
        FinetuneOptions(epsilon=0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_that_an_optimizer_lacks_are_refused(name):
    for key in OTHERS.keys() - OPTIMIZERS[name]:
        with pytest.raises(OptionError) as raised:
            FinetuneOptions(optimizer=name, **{key: OTHERS[key]})
        assert str(raised.value) == f"{key} is {OTHERS[key]}, but {name} has none"


def test_the_learning_rate_follows_the_formula():
    options = FinetuneOptions(learning_rate=1.0, warmup=4, warmup_rate=0.2, final_rate=0.1)
    rates = [rate_at(options, step, 12) for step in range(1, 13)]
    assert rates[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert rates[4:] == pytest.approx(cosine)
    line = FinetuneOptions(learning_rate=1.0, warmup=0.25, schedule="linear")
    assert [rate_at(line, s, 8) for s in range(1, 9)] == pytest.approx(
        [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    level = FinetuneOptions(warmup=0, schedule="constant")
    assert {rate_at(level, s, 5) for s in range(1, 6)} == {3e-4}
    full = FinetuneOptions(method="full", warmup=1.0, schedule="constant")
    assert rate_at(full, 1, 5) == 2e-5


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(OptionError) as raised:
        rate_at(FinetuneOptions(warmup=9), 1, 8)
    assert str(raised.value) == (
        "warmup is 9 steps, but the run has 8; give fewer, or a share of them below 1"
    )
    with pytest.raises(OptionError) as raised:
        FinetuneOptions(schedule="constant", final_rate=0.1)
    assert str(raised.value) == "final_rate is 0.1, but a constant learning rate ends where it is"
