"""Batches: examples packed into rows, each example once an epoch in a new order.

tokens     BOS A B C EOS  BOS D E EOS   -  -
segments    1  1 1 1  1    2  2 2  2    0  0     who sees whom: the same number, earlier
positions   0  1 2 3  4    0  1 2  3    0  0
sequences   0  0 0 0  0    1  1 1  1    0  0     the next row begins with 2

The two answers of a preference pair are two segments of one row, the preferred one first.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    sequences: mx.array  # int32, from 0 in the batch; pair k is 2 k, chosen, and 2 k + 1, rejected
    counts: mx.array  # float32 [sequences]: sums of the weights of each; zeros at the end


def batches(
    examples: Sequence[Example | Pair], options: FinetuneOptions, length: int, epoch: int
) -> Iterator[Batch]:
    """Yield the batches of an epoch; they follow from the seed and the epoch alone."""
    order = list(range(len(examples)))
    random.Random(f"{options.seed} {epoch}").shuffle(order)
    if isinstance(examples[0], Pair):
        length *= 2
    rows: list[list[Example | Pair]] = []
    room = 0
    for number in order:
        size = sum(len(part.tokens) for part in sequences_of(examples[number]))
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(examples[number])
        room -= size
    chunks = [rows[start : start + options.batch] for start in range(0, len(rows), options.batch)]
    most = max(sum(len(sequences_of(unit)) for row in chunk for unit in row) for chunk in chunks)
    for chunk in chunks:
        yield packed(chunk, options.batch, length, most)


def sequences_of(unit: Example | Pair) -> tuple[Example, ...]:
    """Return what is packed together: an example, or the two answers of a pair."""
    return tuple(unit) if isinstance(unit, Pair) else (unit,)


def packed(rows: Sequence[Sequence[Example | Pair]], count: int, length: int, most: int) -> Batch:
    """Return the rows as a batch of `count` rows, with room for `most` sequences."""
    import numpy as np

    tokens, segments, positions, targets, sequences = np.zeros((5, count, length), np.int32)
    weights = np.zeros((count, length), np.float32)
    counts = np.zeros(most, np.float32)
    number = 0
    for row, units in enumerate(rows):
        start = 0
        parts = [part for unit in units for part in sequences_of(unit)]
        for segment, example in enumerate(parts, 1):
            size = len(example.tokens)
            place = np.s_[row, start : start + size]
            tokens[place] = example.tokens
            segments[place] = segment
            positions[place] = np.arange(size)
            targets[row, start : start + size - 1] = example.tokens[1:]
            weights[row, start : start + size - 1] = example.trained[1:]
            sequences[place] = number
            counts[number] = sum(example.trained[1:])
            number += 1
            start += size
    columns = (tokens, segments, positions, targets, weights, sequences, counts)
    return Batch(*map(mx.array, columns))
