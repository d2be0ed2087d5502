"""Small models, made in a moment: random ones with any tokenizer, and one of the golden set."""

from __future__ import annotations

from dataclasses import replace

from golden_set import FLAGS, GOLDEN

from openelm_mlx.benchmarks.checks import random_engine, random_model
from openelm_mlx.convert.quantize.losses import Reference, Rounding, rounded_weights
from openelm_mlx.convert.sources import infer_config
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.model.adapters import Adapter, LowRank, dense
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig, expected_tensors
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.quantization import Plan, matrices, stem_of

__all__ = [
    "merged_model",
    "random_adapter",
    "random_engine",
    "random_model",
    "random_tokens",
    "small_model",
    "true_loss",
]


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


def true_loss(reference: Reference, plan: Plan, rounding: Rounding) -> float:
    """Return the loss with every matrix in its spec at once, and all tensors as they are stored."""
    return reference.loss(rounded_weights(reference.weights, plan, rounding))


def random_adapter(
    model: OpenELM, seed: int, dora: bool = False, tied: bool = False, only: str = ""
) -> Adapter:
    """Return an adapter of every matrix, or of those whose stems contain `only`.

    Ranks differ from part to part. With `tied` input and output side have the same part.
    """
    shapes = matrices(expected_tensors(model.args))
    shapes.setdefault(HEAD, shapes[EMBEDDINGS])
    parts = {}
    for number, (stem, (rows, columns)) in enumerate(shapes.items()):
        rank, key = 1 + number % 5, mx.random.key(1000 * seed + number)
        k1, k2, k3 = mx.random.split(key, 3)
        a, b = mx.random.normal((rank, columns), key=k1), mx.random.normal((rows, rank), key=k2)
        lengths = mx.random.uniform(0.5, 2.0, (rows,), key=k3) if dora else None
        if only in stem:
            parts[stem] = LowRank(a, b * columns**-0.5, 0.25, lengths)
    if tied:
        parts[HEAD] = parts[EMBEDDINGS]
    return Adapter(f"random-{seed}", parts)


def merged_model(model: OpenELM, adapter: Adapter) -> OpenELM:
    """Return the float32 model with the adapter merged into its matrices, untied if they differ."""
    modules = dict(model.named_modules())
    arrays = {
        name: dense(modules[stem_of(name)]) if len(shape) == 2 else parameters(model)[name]
        for name, shape in expected_tensors(model.args).items()
    }
    arrays = {name: array.astype(mx.float32) for name, array in arrays.items()}
    arrays.setdefault(f"{HEAD}.weight", arrays[f"{EMBEDDINGS}.weight"])
    for stem, part in adapter.parts.items():
        arrays[f"{stem}.weight"] = part.merged(arrays[f"{stem}.weight"])
    merged = OpenELM(replace(model.args, share_input_output_layers=False))
    merged.load_weights(list(arrays.items()))
    return merged
