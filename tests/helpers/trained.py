"""Models of the golden set with what a fine-tuning trains, no longer at its beginning."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
from small import small_model

from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.examples import Example
from openelm_mlx.finetune.options import EMBEDDINGS, TARGETS, FinetuneOptions
from openelm_mlx.finetune.trainable import trainable
from openelm_mlx.model.adapters import Adapted
from openelm_mlx.model.decoder import OpenELM


def few_examples(vocabulary: int) -> list[Example]:
    """Return three, of 7, 4 and 6 tokens, of which 9 are trained."""
    random = np.random.default_rng(3)
    return [
        Example(array("i", random.integers(3, vocabulary, size).tolist()), marks, "")
        for size, marks in ((7, b"\0\0\1\1\0\1\1"), (4, b"\0\1\1\1"), (6, b"\0\0\0\1\0\1"))
    ]


def golden_engine(name: str) -> Engine:
    """Return an engine that cannot tokenize."""
    config, weights = small_model(name)
    model = OpenELM(config)
    model.load_weights(list(weights.items()))
    return Engine(model, None, config, name, Path(name))  # type: ignore[arg-type]


def method_of(method: str, **more: Any) -> FinetuneOptions:
    """Return options with an adapter of every matrix, or of none."""
    adapter = {"rank": 3, "alpha": 5.0, "targets": (*TARGETS, EMBEDDINGS)}
    return FinetuneOptions(method=method, **({} if method == "full" else adapter), **more)


def trained_model(engine: Engine, options: FinetuneOptions) -> OpenELM:
    """Return the model that is trained; an adapter, which begins as nothing, has random parts."""
    model = trainable(engine, options)
    for number, module in enumerate(adapted_modules(model).values()):
        key = mx.random.key(number)
        module.b = mx.random.normal(module.b.shape, key=key) * 0.03
        if "m" in module:
            module.m = module.m * mx.random.uniform(0.8, 1.2, module.m.shape, key=key)
    return model


def adapted_modules(model: OpenELM) -> dict[str, Adapted]:
    return {stem: m for stem, m in model.named_modules() if isinstance(m, Adapted)}
