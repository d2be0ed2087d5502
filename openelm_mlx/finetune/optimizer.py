"""MLX's optimizers by name, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

from openelm_mlx.device import optimizers
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.options import FinetuneOptions


def new_optimizer(options: FinetuneOptions) -> Any:
    """Return the optimizer that the options name; each step sets its learning rate.

    Momentum is that of SGD and Muon. Adafactor takes the learning rate as it is: neither relative
    to the step nor scaled by the size of the weights.
    """
    decay: Any = {"weight_decay": options.weight_decay}
    betas = [options.beta1, options.beta2]
    match options.optimizer:
        case "adamw":
            adam: Any = {"betas": betas, "eps": options.epsilon, "bias_correction": True}
            return optimizers.AdamW(0.0, **adam, **decay)
        case "adam":
            return optimizers.Adam(0.0, betas, options.epsilon, bias_correction=True)
        case "sgd":
            return optimizers.SGD(0.0, momentum=options.beta1, **decay)
        case "lion":
            return optimizers.Lion(0.0, betas=betas, **decay)
        case "muon":
            return optimizers.Muon(0.0, momentum=options.beta1, **decay)
    how: Any = {"scale_parameter": False, "relative_step": False}
    return optimizers.Adafactor(0.0, **how, **decay)


def warmup_steps(options: FinetuneOptions, steps: int) -> int:
    """Return in how many of `steps` the learning rate rises. Raises `OptionError` for more."""
    given = options.warmup
    count = math.ceil(given * steps) if given < 1 else round(given)
    if count > steps:
        what = f"warmup is {count} steps, but the run has {steps}"
        raise OptionError(f"{what}; give fewer, or a share of them below 1")
    return count


def rate_at(options: FinetuneOptions, step: int, steps: int) -> float:
    """Return the learning rate of a step, from 1 to `steps`.

        r = r_0 + (r_max - r_0) s / w                       s <= w, in the warm-up of w steps
        r = r_end + (r_max - r_end) f((s - 1 - w) / (n - w))  after it
        f(x) = 1, 1 - x, or (1 + cos(pi x)) / 2             constant, linear, cosine

    So no step has the rate 0 with which a warm-up may begin, or a fall may end.
    """
    most, warm = options.largest_rate, warmup_steps(options, steps)
    if step <= warm:
        return options.warmup_rate + (most - options.warmup_rate) * step / warm
    done = (step - 1 - warm) / (steps - warm)
    match options.schedule:
        case "constant":
            return most
        case "linear":
            left = 1 - done
        case _:
            left = (1 + math.cos(math.pi * done)) / 2
    return options.final_rate + (most - options.final_rate) * left
