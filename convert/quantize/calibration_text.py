"""The text on which quantization is measured and learned: the user's own, or what the exact model
itself writes.

A model's own samples show the distribution that quantization must keep, need no download and no
licence, and are the same on every run: fixed prompts, fixed seed (data-free calibration: Liu et
al., arXiv:2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.score import own_text
from openelm_mlx.files import read_text
from openelm_mlx.model.config import BOS, EOS, UNK, OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.model.decoder import OpenELM

Encode = Callable[[str], list[int]]  # text to ids, without BOS
PROMPTS = (
    "",
    "The",
    "In",
    "A",
    "It was",
    "This is",
    "When",
    "He said",
    "She",
    "There was once",
    "We",
    "How to",
    "I think",
    "On the",
    "If you",
    "Once upon a time",
)
QUESTIONS = (
    "Hello!",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how rain forms.",
    "Give me three tips for sleeping well.",
    "Tell me a story about a fox.",
    "How do I bake bread?",
    "Who are you?",
)
SEED = 17
LENGTH = 257  # tokens in a row: BOS and 256
ROWS_AT_ONCE = 16  # sampled together; a row's text does not depend on how many rows are asked for
CONTROL = (
    0,
    BOS,
    EOS,
)  # a plain sample never ends early, so that every row is full; an answer goes on with the next turn


def row_length(config: OpenELMConfig) -> int:
    return min(LENGTH, config.max_context_length)


def text_tokens(path: Path, encode: Encode, length: int, limit: int | None = None) -> mx.array:
    """A text file as rows [n, length], each after BOS, at most `limit` rows spread evenly over the
    text.

    Raises `OptionError` for a file that cannot be read as UTF-8, `ConversionError` for one shorter
    than a row.
    """
    ids = encode(read_text(path, "--calibration-text"))
    rows = [
        [BOS, *ids[start : start + length - 1]]
        for start in range(0, len(ids) - length + 2, length - 1)
    ]
    if not rows:
        raise ConversionError(
            f"{path} has {len(ids)} tokens; at least {length - 1} are needed to measure anything"
        )
    if limit is not None and len(rows) > limit:
        rows = [rows[number * len(rows) // limit] for number in range(limit)]
    return mx.array(rows, dtype=mx.int32)


def sampled_tokens(
    model: OpenELM,
    encode: Encode,
    rows: int,
    length: int,
    progress: Callable[[int, int, str], None] | None = None,
    instruct: bool = False,
) -> mx.array:
    """Rows [rows, length] that `model` writes at temperature 1 after each of `PROMPTS` in turn.

    Of an Instruct model every other row is a conversation that starts with one of `QUESTIONS`.
    """
    parts = []
    for first in range(
        0, rows, ROWS_AT_ONCE
    ):  # whole batches: draws are the same however many rows are wanted
        numbers = range(first, first + ROWS_AT_ONCE)
        prompts = [prompt_ids(encode, number, instruct)[:length] for number in numbers]
        banned = mx.zeros((ROWS_AT_ONCE, model.args.vocab_size))
        for row, number in enumerate(numbers):
            banned[row, mx.array((UNK, BOS) if asks(number, instruct) else CONTROL)] = -mx.inf
        parts.append(own_text(model, prompts, length, SEED + first, banned))
        if progress is not None:
            progress(min(first + ROWS_AT_ONCE, rows), rows, "the model writes calibration text")
    return mx.concatenate(parts)[:rows]


def asks(row: int, instruct: bool) -> bool:
    return instruct and row % 2 == 1


def prompt_ids(encode: Encode, row: int, instruct: bool) -> list[int]:
    """The tokens a row begins with, BOS included."""
    if not asks(row, instruct):
        return [BOS, *encode(PROMPTS[row % len(PROMPTS)])]
    question = QUESTIONS[row // 2 % len(QUESTIONS)]
    turns = (
        "<|system|>\n",
        f"\n<|user|>\n{question}",
        "\n<|assistant|>\n",
    )  # as openelm_mlx.engine.prompts builds them
    system, user, assistant = (encode(turn) for turn in turns)
    return [BOS, *system, EOS, *user, EOS, *assistant]
