"""Bytes that one decoded token must read, by part of the model, and the tokens a second that a
bandwidth gives.

Every weight is read once a token, whatever the kernels: batch size one does no work twice. From the
configuration alone; the ledger counts the same bytes on the graph, and a test holds both equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

PARTS = ("embedding", "attention", "ffn", "norms", "scales", "kv")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


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
    unless `kv_bits` says otherwise. `quantization` is config.json's, in mlx-lm's form: a default,
    and settings or false for single layers. Raises `BenchmarkError` for a dtype or a setting it
    cannot size, `CacheError` for heads that `kv_bits` does not fit.

        bytes_per_token(OpenELMConfig.from_name("270m"), "bfloat16", {"bits": 4, "group_size": 64}, 64)
    """
    if dtype not in ITEMSIZE:
        raise BenchmarkError(f"dtype is {dtype!r}; allowed: {', '.join(ITEMSIZE)}")
    if context_tokens < 0:
        raise BenchmarkError(f"context_tokens is {context_tokens}; it must be at least 0")
    parts = dict.fromkeys(PARTS, 0.0)
    tied = config.share_input_output_layers
    for tensor, shape in expected_tensors(config).items():
        weights, scales = matrix_bytes(tensor, shape, ITEMSIZE[dtype], quantization)
        if "token_embeddings" in tensor:  # one row is looked up; a tied matrix is the head too
            rows = shape[0]
            weights, scales = (part / rows + (part if tied else 0) for part in (weights, scales))
        parts[part_of(tensor)] += weights
        parts["scales"] += scales
    kind = CacheKind.of(config, EngineOptions(kv_bits=kv_bits))
    parts["kv"] = float(kind.bytes_per_token(config, ITEMSIZE[dtype]) * context_tokens)
    return parts


def matrix_bytes(
    tensor: str, shape: tuple[int, ...], itemsize: int, quantization: Mapping[str, Any] | None
) -> tuple[float, float]:
    """Bytes of a tensor's numbers, and of its scales and biases."""
    form = settings(tensor.removesuffix(".weight"), quantization) if len(shape) == 2 else None
    if form is None:
        return math.prod(shape) * itemsize, 0.0
    rows, columns = shape
    bits, group = form["bits"], form["group_size"]
    if columns % group:
        raise BenchmarkError(f"{tensor} has rows of {columns}, no multiple of group_size {group}")
    per_group = (
        2 * itemsize if form.get("mode", "affine") == "affine" else 1
    )  # scale and bias, or one byte of scale
    return rows * columns * bits / 8, rows * columns / group * per_group


def settings(path: str, quantization: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """How the layer at `path` is quantized: its own entry, the default, or not at all."""
    if not quantization:
        return None
    own = quantization.get(path, quantization)
    if own is False:
        return None
    if (
        not isinstance(own, Mapping)
        or not isinstance(own.get("bits"), int)
        or not isinstance(own.get("group_size"), int)
    ):
        raise BenchmarkError(
            f"quantization of {path} is {own!r}; it needs whole numbers bits and group_size"
        )
    return own


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
