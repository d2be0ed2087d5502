"""Reads the examples of a file. Every line is checked before the first is trained."""

from __future__ import annotations

import json
from pathlib import Path

from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.examples import Example, Pair, encode
from openelm_mlx.finetune.options import FinetuneOptions


def read_examples(
    engine: Engine, data: str | Path, options: FinetuneOptions
) -> list[Example | Pair]:
    """Return all examples of `data`."""
    found: list[Example | Pair] = []
    with open(data, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found += encode(engine, json.loads(line), f"{data}, line {number}", options)
    return found
