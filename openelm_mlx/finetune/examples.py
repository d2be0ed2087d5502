"""Examples: token ids, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.prompts import answer_prefix, turn_tokens
from openelm_mlx.finetune.options import FinetuneOptions


class Example(NamedTuple):
    """One sequence: ids, BOS included, and for each whether its prediction is trained."""

    tokens: list[int]
    trained: list[bool]  # the first is never predicted
    where: str  # names it in errors: "pairs.jsonl, line 3"


class Pair(NamedTuple):
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example


def encode(
    engine: Engine, record: Mapping[str, Any], where: str, options: FinetuneOptions
) -> list[Example]:
    """Return the examples of a record: one, or its parts if it is split."""
    tokenizer = engine.tokenizer
    if "text" in record:
        ids = [*tokenizer.encode(record["text"]), tokenizer.eos_id]
        return [Example(ids, [False, *[True] * (len(ids) - 1)], where)]
    messages = record.get("messages") or [
        {"role": "user", "content": record["prompt"]},
        {"role": "assistant", "content": record["completion"]},
    ]
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    tokens: list[int] = []
    trained: list[bool] = []
    for number, message in enumerate(messages):
        turn = turn_tokens(tokenizer, message["role"], message["content"], first=number == 0)
        own = message["role"] == "assistant"
        frame = len(answer_prefix(tokenizer)) if own else len(turn)
        tokens += turn
        trained += [False] * frame + [own] * (len(turn) - frame)
    return [Example(tokens, trained, where)]
