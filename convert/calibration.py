"""The text on which quantization is measured and learned: the user's own, or what the exact model itself writes.

A model's own samples show the distribution that quantization must keep, need no download and no licence, and are
the same on every run: fixed prompts, fixed seed (data-free calibration: Liu et al., arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from openelm_mlx.config import OpenELMConfig
from openelm_mlx.errors import ConversionError

if TYPE_CHECKING:
    from openelm_mlx.model import OpenELM

Encode = Callable[[str], list[int]]  # text to ids, without BOS
PROMPTS = (
    "", "The", "In", "A", "It was", "This is", "When", "He said", "She", "There was once", "We", "How to", "I think",
    "On the", "If you", "Once upon a time",
)  # fmt: skip
SEED = 17
LENGTH = 257  # tokens in a row: BOS and 256
ROWS_AT_ONCE = 16  # sampled together; a row's text does not depend on how many rows are asked for
CONTROL = (0, 1, 2)  # unknown, BOS, EOS: a sample never ends early, so that every row is full


def row_length(config: OpenELMConfig) -> int:
    return min(LENGTH, config.max_context_length)


def text_tokens(path: Path, encode: Encode, length: int, limit: int | None = None) -> mx.array:
    """A text file as rows [n, length], each after BOS, at most `limit` rows spread evenly over the text.

    Raises `ConversionError` for a file that cannot be read as UTF-8 or is shorter than one row.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as UTF-8 text: {error}") from None
    ids = encode(text)
    rows = [[1, *ids[start : start + length - 1]] for start in range(0, len(ids) - length + 2, length - 1)]
    if not rows:
        raise ConversionError(f"{path} has {len(ids)} tokens; at least {length - 1} are needed to measure anything")
    if limit is not None and len(rows) > limit:
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    return mx.array(rows, dtype=mx.int32)


def sampled_tokens(
    model: OpenELM, encode: Encode, rows: int, length: int, progress: Callable[[int, int, str], None] | None = None
) -> mx.array:
    """Rows [rows, length] that `model` writes at temperature 1 after each of `PROMPTS` in turn."""
    prompts = [[1, *encode(PROMPTS[row % len(PROMPTS)])][:length] for row in range(rows)]
    banned = mx.zeros((model.args.vocab_size,))
    banned[mx.array(CONTROL)] = -mx.inf
    parts = []
    for first in range(0, rows, ROWS_AT_ONCE):
        given = prompts[first : first + ROWS_AT_ONCE]
        given += [[1]] * (ROWS_AT_ONCE - len(given))  # so that draws are the same however many rows are wanted
        parts.append(sample_batch(model, given, banned, length, SEED + first))
        if progress is not None:
            progress(min(first + ROWS_AT_ONCE, rows), rows, "the model writes calibration text")
    return mx.concatenate(parts)[:rows]


def sample_batch(model: OpenELM, prompts: list[list[int]], banned: mx.array, length: int, seed: int) -> mx.array:
    from openelm_mlx.cache import KVCache

    caches = [KVCache() for _ in model.layers]
    key = mx.random.key(seed)
    done = [mx.array([ids[:1] for ids in prompts], dtype=mx.int32)]
    for position in range(1, length):
        logits = model(done[-1], caches)[:, -1].astype(mx.float32) + banned
        key, draw = mx.random.split(key)
        sampled = mx.random.categorical(logits, key=draw).astype(mx.int32)
        given = mx.array([ids[position] if position < len(ids) else -1 for ids in prompts], dtype=mx.int32)
        done.append(mx.where(given < 0, sampled, given)[:, None])
        mx.eval(done[-1])
    return mx.concatenate(done, axis=1)
