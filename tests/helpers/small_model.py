"""A small model of the golden set: what tests of quantization measure and learn on."""

from __future__ import annotations

from golden_set import FLAGS, GOLDEN

from openelm_mlx.convert.infer import infer_config
from openelm_mlx.convert.names import renamed_tensors
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.model.config import OpenELMConfig


def small_model(name: str = "tied-gqa4") -> tuple[OpenELMConfig, dict[str, mx.array]]:
    """Configuration and float32 weights under Hugging Face's names."""
    source = TorchCheckpoint(GOLDEN / name / "checkpoint.pt")
    names = renamed_tensors(source.tensors)
    shapes = {new: source.tensors[old].shape for new, old in names.items()}
    config = infer_config(
        shapes,
        {"vocab_size": shapes["transformer.token_embeddings.weight"][0], "max_context_length": 64},
        **FLAGS.get(name, {}),
    )
    return config, {new: source.load(old).astype(mx.float32) for new, old in names.items()}


def random_tokens(config: OpenELMConfig, rows: int = 6, length: int = 32) -> mx.array:
    return mx.random.randint(3, config.vocab_size, (rows, length), key=mx.random.key(5)).astype(
        mx.int32
    )
