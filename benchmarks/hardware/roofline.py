"""The bytes that one decoded token must read, by part of the model, and the rate that follows.

Every weight is read once a token, whatever the kernels: at batch size one no work is done twice.
The configuration alone tells; the ledger counts the same bytes on the graph, and a test compares
both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from openelm_mlx.dtypes import FLOATS, itemsize
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import spec_of

PARTS = ("embedding", "attention", "ffn", "norms", "scales", "kv")


def part_of(tensor: str) -> str:
    """Return the part that a tensor belongs to. A head counts as embedding, as it may be tied."""
    if tensor.endswith((".scales", ".biases")):
        return "scales"
    if "token_embeddings" in tensor or "lm_head" in tensor:
        return "embedding"
    if "norm" in tensor:
        return "norms"
    return "attention" if ".attn." in tensor else "ffn"


def bytes_per_token(
    config: OpenELMConfig,
    dtype: str,
    quantization: Mapping[str, Any] | None = None,
    context_tokens: int = 0,
    kv_bits: int | None = None,
) -> dict[str, float]:
    """Return the bytes read for a token that attends to `context_tokens` (itself too), by part.

    `dtype` is that of activations, norms, unquantized matrices, scales, and of keys and values
    unless `kv_bits` says otherwise. `quantization` is that of config.json. Raises `BenchmarkError`
    or `ConfigError` for what cannot be sized, `CacheError` for heads that `kv_bits` does not fit.

        quantized = {"bits": 4, "group_size": 64}
        bytes_per_token(OpenELMConfig.from_name("270m"), "bfloat16", quantized, 64)
    """
    if dtype not in FLOATS:
        raise BenchmarkError(f"dtype is {dtype!r}; allowed: {', '.join(FLOATS)}")
    if context_tokens < 0:
        raise BenchmarkError(f"context_tokens is {context_tokens}; it must be at least 0")
    parts = dict.fromkeys(PARTS, 0.0)
    tied = config.share_input_output_layers
    for tensor, shape in expected_tensors(config).items():
        stem = tensor.removesuffix(".weight")
        weights, scales = float(math.prod(shape) * itemsize(dtype)), 0.0
        spec = spec_of(quantization, stem) if quantization and len(shape) == 2 else None
        if spec is not None:
            if shape[1] % spec.group_size:
                what = f"{tensor} has rows of {shape[1]}"
                raise BenchmarkError(f"{what}, not a multiple of group_size {spec.group_size}")
            weights, scales = spec.weight_bytes(shape), spec.scale_bytes(shape, dtype)
        if "token_embeddings" in tensor:  # one row is looked up; a tied matrix is the head too
            weights, scales = (part / shape[0] + tied * part for part in (weights, scales))
        parts[part_of(tensor)] += weights
        parts["scales"] += scales
    kind = CacheKind.of(config, EngineOptions(kv_bits=kv_bits))
    parts["kv"] = float(kind.bytes_per_token(config, itemsize(dtype)) * context_tokens)
    return parts


def bound(bytes_read: float | Mapping[str, float], bandwidth: float) -> float:
    """Return the tokens a second where `bytes_read` come at `bandwidth`, in bytes a second.

    Decoding stays below it (arXiv:2211.05102, section 2.1) unless something reads faster: a
    measured copy need not be the fastest reader, nor memory the place of small weights.
    """
    total = sum(bytes_read.values()) if isinstance(bytes_read, Mapping) else bytes_read
    if total <= 0 or bandwidth <= 0:
        raise BenchmarkError(f"bytes and bandwidth must be above 0, not {total} and {bandwidth}")
    return bandwidth / total
