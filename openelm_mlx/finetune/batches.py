"""Batches: the arrays of examples that are packed into rows.

tokens     BOS A B C EOS  BOS D E EOS   -  -
segments    1  1 1 1  1    2  2 2  2    0  0     who sees whom: the same number, earlier
positions   0  1 2 3  4    0  1 2  3    0  0
sequences   0  0 0 0  0    1  1 1  1    0  0     the next row begins with 2

The two answers of a preference pair are two segments of one row, the preferred one first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.finetune.examples import Example, Pair, sequences_of


class Batch(NamedTuple):
    """Packed rows, [rows, length] each; what follows the last token of a row is padding."""

    tokens: mx.array  # int32
    segments: mx.array  # int32, from 1; 0 is padding
    positions: mx.array  # int32, from 0 in each segment
    targets: mx.array  # int32: the token after each
    weights: mx.array  # float32: 1 where the loss counts the target
    sequences: mx.array  # int32, from 0 in the batch; pair k is 2 k, chosen, and 2 k + 1, rejected
    counts: mx.array  # float32 [sequences]: sums of the weights of each; zeros at the end
    trained: mx.array  # int32: where in the flat weights those above 0 are; then a place with 0


class Shape(NamedTuple):
    """The sizes of a batch; a compiled step is traced for each."""

    rows: int
    length: int
    trained: int  # at least the number of trained targets
    sequences: int  # at least the number of sequences


def packed(rows: Sequence[Sequence[Example | Pair]], shape: Shape) -> Batch:
    """Return the rows as a batch; there may be fewer than the shape has."""
    import numpy as np

    size = (shape.rows, shape.length)
    tokens, segments, positions, targets, sequences = np.zeros((5, *size), np.int32)
    weights = np.zeros(size, np.float32)
    counts = np.zeros(shape.sequences, np.float32)
    number = 0
    for row, units in enumerate(rows):
        start = 0
        for segment, example in enumerate(chain.from_iterable(map(sequences_of, units)), 1):
            end = start + len(example.tokens)
            tokens[row, start:end] = example.tokens
            segments[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            targets[row, start : end - 1] = example.tokens[1:]
            weights[row, start : end - 1] = np.frombuffer(example.trained, np.uint8)[1:]
            sequences[row, start:end] = number
            counts[number] = weights[row, start : end - 1].sum()
            number, start = number + 1, end
    trained = np.full(shape.trained, shape.length - 1, np.int32)  # a row's last has no target
    found = np.flatnonzero(weights)
    trained[: len(found)] = found
    columns = (tokens, segments, positions, targets, weights, sequences, counts, trained)
    return Batch(*map(mx.array, columns))
