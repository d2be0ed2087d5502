"""A tiny model and little data, to train in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small import random_engine

from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune import FinetuneOptions
from openelm_mlx.finetune.state import METRICS

TIMES = ("seconds", "tokens_per_second", "peak_bytes")  # what differs between equal runs


def small_engine(like: Engine, seed: int = 3) -> Engine:
    """Return a random model of two layers with the bundled tokenizer."""
    return random_engine(like, seed, like.config.vocab_size, 32, 2)


def write_pairs(path: Path, count: int = 8) -> Path:
    """Write examples of different lengths."""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            answer = "very " * (number % 3) + f"much like {number}."
            print(json.dumps({"prompt": f"What is {number}?", "completion": answer}), file=file)
    return path


def options(**more: Any) -> FinetuneOptions:
    """Return options with few steps of small rows."""
    usual: dict[str, Any] = {"batch": 2, "length": 48, "learning_rate": 0.01, "packing": False}
    usual |= {"save_every": 2} | ({} if "steps" in more else {"epochs": 2.0})
    usual |= {} if more.get("method") == "full" else {"rank": 2}
    usual |= {} if "validation" in more else {"validation_share": 0.25}
    return FinetuneOptions(**{**usual, **more})


def curve(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [{name: one for name, one in row.items() if name not in TIMES} for row in rows]
