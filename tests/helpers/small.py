"""Small random engines, made in a moment: real models of a few thousand weights with the bundled
tokenizer.
"""

from __future__ import annotations

from openelm_mlx.benchmarks.measure.weights import random_model
from openelm_mlx.benchmarks.measure.weights import small_engine as random_engine

__all__ = ["random_engine", "random_model"]
