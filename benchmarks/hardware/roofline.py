"""Bytes that one decoded token must read, by part of the model, and the tokens a second that a
bandwidth gives.

Every weight is read once a token, whatever the kernels: batch size one does no work twice. From the
configuration alone; the ledger counts the same bytes on the graph, and a test holds both equal.
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
    """The part that a tensor of the model belongs to; the head counts as embedding, which it is
    where it is tied.
    """
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
    """Bytes read for one token that attends to `context_tokens` tokens (itself included), by part.

    `dtype` is that of activations, norms, unquantized matrices, scales, and of keys and values
    unless `kv_bits` says otherwise. `quantization` is config.json's, with false for tensors that
    are not quantized. Raises `BenchmarkError` for a dtype or rows it cannot size, `ConfigError` for
    settings that MLX does not have, `CacheError` for heads that `kv_bits` does not fit.

        bytes_per_token(OpenELMConfig.from_name("270m"), "bfloat16", {"bits": 4, "group_size": 64}, 64)
    """
    if dtype not in FLOATS:
        raise BenchmarkError(f"dtype is {dtype!r}; allowed: {', '.join(FLOATS)}")
    if context_tokens < 0:
        raise BenchmarkError(f"context_tokens is {context_tokens}; it must be at least 0")
    parts = dict.fromkeys(PARTS, 0.0)
    tied = config.share_input_output_layers
    for tensor, shape in expected_tensors(config).items():
        weights, scales = matrix_bytes(tensor, shape, dtype, quantization or {})
        if "token_embeddings" in tensor:  # one row is looked up; a tied matrix is the head too
            rows = shape[0]
            weights, scales = (part / rows + (part if tied else 0) for part in (weights, scales))
        parts[part_of(tensor)] += weights
        parts["scales"] += scales
    kind = CacheKind.of(config, EngineOptions(kv_bits=kv_bits))
    parts["kv"] = float(kind.bytes_per_token(config, itemsize(dtype)) * context_tokens)
    return parts


def matrix_bytes(
    tensor: str, shape: tuple[int, ...], dtype: str, quantization: Mapping[str, Any]
) -> tuple[float, float]:
    """Return the bytes of a tensor's numbers, and of its scales and biases."""
    stem, quantizable = tensor.removesuffix(".weight"), bool(quantization) and len(shape) == 2
    spec = spec_of(quantization, stem) if quantizable else None
    if spec is None:
        return math.prod(shape) * itemsize(dtype), 0.0
    if shape[1] % spec.group_size:
        what = f"no multiple of group_size {spec.group_size}"
        raise BenchmarkError(f"{tensor} has rows of {shape[1]}, {what}")
    return spec.weight_bytes(shape), spec.scale_bytes(shape, dtype)


def bound(bytes_read: float | Mapping[str, float], bandwidth: float) -> float:
    """Tokens a second where `bytes_read` come at `bandwidth`, bytes a second (arXiv:2211.05102,
    section 2.1).

    Decoding stays below it if nothing reads faster: a measured copy need not be the fastest reader,
    nor memory the place where small weights come from.
    """
    total = sum(bytes_read.values()) if isinstance(bytes_read, Mapping) else bytes_read
    if total <= 0 or bandwidth <= 0:
        raise BenchmarkError(f"bytes and bandwidth must be above 0, not {total} and {bandwidth}")
    return bandwidth / total
