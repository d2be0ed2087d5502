"""Batches: examples packed into rows, each example once an epoch in a new order.

tokens     BOS A B C EOS  BOS D E EOS   -  -
segments    1  1 1 1  1    2  2 2  2    0  0     who sees whom: the same number, earlier
positions   0  1 2 3  4    0  1 2  3    0  0
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.finetune.examples import Example, Pair
from openelm_mlx.finetune.options import FinetuneOptions


class Batch(NamedTuple):
    """Packed rows, [rows, length] each; what follows the last token of a row is padding."""

    tokens: mx.array  # int32
    segments: mx.array  # int32, from 1; 0 is padding
    positions: mx.array  # int32, from 0 in each segment
    targets: mx.array  # int32: the token after each
    weights: mx.array  # float32: 1 where the loss counts the target


def batches(
    examples: Sequence[Example | Pair], options: FinetuneOptions, length: int, epoch: int
) -> Iterator[Batch]:
    """Yield the batches of an epoch; they follow from the seed and the epoch alone."""
    order = list(range(len(examples)))
    random.Random(f"{options.seed} {epoch}").shuffle(order)
    rows: list[list[Any]] = []
    room = 0
    for number in order:
        example = examples[number]
        assert isinstance(example, Example)
        if len(example.tokens) > room:
            rows.append([])
            room = length
        rows[-1].append(example)
        room -= len(example.tokens)
    for start in range(0, len(rows), options.batch):
        yield packed(rows[start : start + options.batch], options.batch, length)


def packed(rows: Sequence[Sequence[Example]], count: int, length: int) -> Batch:
    """Return the rows as a batch of `count` rows."""
    columns: list[list[list[float]]] = [[] for _ in Batch._fields]
    for row in [*rows, *[[]] * (count - len(rows))]:
        parts: list[list[float]] = [[] for _ in Batch._fields]
        for segment, example in enumerate(row, 1):
            size = len(example.tokens)
            values: tuple[Any, ...] = (
                example.tokens,
                [segment] * size,
                range(size),
                [*example.tokens[1:], 0],
                [*map(float, example.trained[1:]), 0.0],
            )
            for part, value in zip(parts, values, strict=True):
                part.extend(value)
        for column, part in zip(columns, parts, strict=True):
            column.append([*part, *[0] * (length - len(part))])
    *whole, weights = columns
    tokens, segments, positions, targets = (mx.array(column, mx.int32) for column in whole)
    return Batch(tokens, segments, positions, targets, mx.array(weights, mx.float32))
