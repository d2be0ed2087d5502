"""Small random engines, made in a moment: real models of a few thousand weights with the bundled tokenizer."""

from __future__ import annotations

from pathlib import Path

from small_model import random_model

from openelm_mlx.loading import Engine


def random_engine(like: Engine, seed: int, *shape: int, **more: float) -> Engine:
    """An engine of random weights with the tokenizer of another; the rest is `random_model`'s."""
    model = random_model(seed, *shape, **more)  # type: ignore[arg-type]
    return Engine(model, like.tokenizer, model.args, f"random-{seed}", Path("."))
