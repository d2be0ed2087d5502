"""Small random engines, made in a moment: real models of a few thousand weights with the bundled tokenizer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from openelm_mlx.config import OpenELMConfig
from openelm_mlx.loading import Engine
from openelm_mlx.model import OpenELM


def random_engine(like: Engine, seed: int, vocab: int = 64, dim: int = 64, layers: int = 2, spread: float = 2.0) -> Engine:
    """An engine of random weights; `spread` scales the logits, so that the choice is neither flat nor certain."""
    config = OpenELMConfig(
        vocab_size=vocab, model_dim=dim, head_dim=32, num_transformer_layers=layers, num_gqa_groups=2,
        share_input_output_layers=False, qkv_multipliers=(1.0, 2.0), ffn_multipliers=(1.0, 2.0), ffn_dim_divisor=32,
        max_context_length=512,
    )  # fmt: skip
    mx.random.seed(seed)
    model = OpenELM(config)
    model.load_weights([("lm_head.weight", mx.random.normal((vocab, dim)) * spread / dim**0.5)], strict=False)
    mx.eval(model.parameters())
    return Engine(model, like.tokenizer, config, f"random-{seed}", Path("."))
