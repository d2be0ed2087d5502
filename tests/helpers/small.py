"""Small models, made in a moment: random ones with any tokenizer, and one of the golden set."""

from __future__ import annotations

from golden_set import FLAGS, GOLDEN

from openelm_mlx.benchmarks.checks import random_engine, random_model
from openelm_mlx.convert.sources import infer_config
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.model.config import OpenELMConfig

__all__ = ["random_engine", "random_model", "random_tokens", "small_model"]


def small_model(name: str = "tied-gqa4") -> tuple[OpenELMConfig, dict[str, mx.array]]:
    """Configuration and float32 weights under Hugging Face's names."""
    source = TorchCheckpoint(GOLDEN / name / "checkpoint.pt")
    shapes = {name: info.shape for name, info in source.tensors.items()}
    config = infer_config(
        shapes,
        {"vocab_size": shapes["transformer.token_embeddings.weight"][0], "max_context_length": 64},
        **FLAGS.get(name, {}),
    )
    return config, {name: source.load(name).astype(mx.float32) for name in source.tensors}


def random_tokens(config: OpenELMConfig, rows: int = 6, length: int = 32) -> mx.array:
    return mx.random.randint(3, config.vocab_size, (rows, length), key=mx.random.key(5)).astype(
        mx.int32
    )
