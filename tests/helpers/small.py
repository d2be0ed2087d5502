"""Small random engines, made in a moment: real models of a few thousand weights with the bundled
tokenizer.
"""

from __future__ import annotations

from openelm_mlx.benchmarks.checks.trials import random_engine, random_model

__all__ = ["random_engine", "random_model"]
