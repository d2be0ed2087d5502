"""The plan of a run: which examples each batch has, known before the first step.

The rows of all epochs are one sequence that is cut into batches, and these into steps. An epoch is
a new permutation of the examples. Its last row stays open for examples of the next one, and its
last batch for rows of that, so that an epoch of few rows wastes no more than one of many.

    epoch 1 has a b c d e       epoch 2 has d b c e a        two rows a batch
    [aabb] [cccd]               [eeaa] [cccd]                [bbee] ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import TYPE_CHECKING, NamedTuple

from openelm_mlx.engine.ranks import Ranks
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.examples import Example, Pair, sequences_of
from openelm_mlx.finetune.options import STEPS, FinetuneOptions
from openelm_mlx.finetune.packing import (
    Rows,
    before,
    best_part,
    joined,
    lengths_for,
    order_of,
    pack,
    rounded_up,
)

if TYPE_CHECKING:
    import numpy as np

ALONE = Ranks()
MOST_LENGTHS = 12  # of the rows of a run
MOST_SHARES = 3  # of trained targets, for each length
BATCHES_PER_SHAPE = 8  # so that a short run does not spend its time on tracing
EIGHTHS = 8  # room for the trained targets is so many parts of a batch
MOST_ROWS = 20_000_000  # of a run
SAMPLE = 4096  # examples by whose packing the lengths are chosen


class Form(NamedTuple):
    """The form of the batches of a run."""

    lengths: tuple[int, ...]  # of rows in tokens, ascending; examples are packed to the last one
    rows: int  # of a batch, all processes together
    batches: int  # of a step


class Plan:
    """The steps of a run, from 1 on, and the batches of each for one of several processes.

    It follows from the lengths of the examples and the options alone, so a run that goes on later
    has the same. The processes share the rows of each batch: together they compute the batch of
    one process that has as many times the rows.
    """

    def __init__(
        self,
        examples: Sequence[Example | Pair],
        options: FinetuneOptions,
        length: int,
        ranks: Ranks = ALONE,
    ) -> None:
        import numpy as np

        units = [sequences_of(unit) for unit in examples]
        sizes = np.array([sum([len(one.tokens) for one in unit]) for unit in units])
        trained = np.array([sum([one.trained.count(1) for one in unit]) for unit in units])
        form = form_of(sizes, options, length * len(units[0]), ranks.size)
        end = None if options.steps is None else options.steps * form.batches * form.rows
        check_size(options.epochs * len(units) if end is None else end, options)
        rows = first_of(end, epochs_of(sizes, options, form))
        self.examples, self.accumulate, self._rows = examples, form.batches, rows
        self._tokens = before(rows.tokens(sizes))
        self._bounds = np.append(np.arange(0, len(rows), form.rows), len(rows))  # of batches
        counts = -(-np.diff(self._bounds) // ranks.size)
        lengths = batch_lengths(rows.tokens(sizes), self._bounds, form)
        slots = int((counts * lengths).sum()) * ranks.size
        self.waste = float(1 - self._tokens[-1] / slots)
        """The share of padding in what all processes compute."""
        # the rows of this process in each batch: in the last one maybe fewer, or none
        self._firsts = np.minimum(self._bounds[:-1] + ranks.rank * counts, self._bounds[1:])
        self._ends = np.minimum(self._firsts + counts, self._bounds[1:])
        targets = before(rows.tokens(trained))
        room = room_for(targets[self._ends] - targets[self._firsts], counts, lengths)
        most = int((rows.starts[self._ends] - rows.starts[self._firsts]).max()) * len(units[0])
        columns = zip(counts.tolist(), lengths.tolist(), room.tolist(), strict=True)
        self._shapes = [Shape(*column, most) for column in columns]

    @property
    def steps(self) -> int:
        """The number of steps; the last one may have fewer batches than the others."""
        return -(-len(self._shapes) // self.accumulate)

    @property
    def shapes(self) -> list[Shape]:
        """The different shapes of this process's batches, ascending."""
        return sorted(set(self._shapes))

    def batches(self, step: int) -> list[Batch]:
        """Return the batches of a step for this process, `accumulate` of them or fewer."""
        return [self._batch(number) for number in range(*self._range(step))]

    def units(self, step: int) -> list[Example | Pair]:
        """Return the examples, or pairs, of a step of all processes."""
        first, end = (self._rows.starts[self._bounds[number]] for number in self._range(step))
        return [self.examples[number] for number in self._rows.numbers[first:end].tolist()]

    def epoch(self, step: int) -> float:
        """Return how many epochs have passed after a step."""
        row = self._bounds[self._range(step)[1]]
        return float(self._rows.starts[row] / len(self.examples))

    def tokens(self, step: int) -> int:
        """Return the number of tokens in a step of all processes, without padding."""
        first, end = (self._tokens[self._bounds[number]] for number in self._range(step))
        return int(end - first)

    def _range(self, step: int) -> tuple[int, int]:
        """Return the first batch of a step, and the one after its last."""
        first = (step - 1) * self.accumulate
        return first, min(first + self.accumulate, len(self._shapes))

    def _batch(self, number: int) -> Batch:
        starts = self._rows.starts[self._firsts[number] : self._ends[number] + 1].tolist()
        rows = [
            [self.examples[unit] for unit in self._rows.numbers[first:end].tolist()]
            for first, end in pairwise(starts)
        ]
        return packed(rows, self._shapes[number])


def check_size(rows: float, options: FinetuneOptions) -> None:
    """Raise `OptionError` for a run whose plan would not end, or not fit into memory."""
    if rows > MOST_ROWS:
        name = "epochs" if options.steps is None else "steps"
        what = f"{name} is {getattr(options, name)}, which takes more than {MOST_ROWS:,} rows"
        raise OptionError(f"{what}; give fewer")


def once(
    examples: Sequence[Example | Pair],
    options: FinetuneOptions,
    length: int,
    ranks: Ranks = ALONE,
) -> Plan:
    """Return the plan of one pass over examples, a batch a step: an evaluation."""
    return Plan(examples, replace(options, epochs=1, steps=None, accumulate=1), length, ranks)


def sized(
    trained: Sequence[Example | Pair],
    held_out: Sequence[Example | Pair],
    options: FinetuneOptions,
    length: int,
) -> tuple[FinetuneOptions, int]:
    """Return the options with their batch, and how long rows are.

    Packed rows of the usual length hold a small data set in a few steps, from which a model learns
    next to nothing. Unless the batch is given, rows and then batches are halved until an epoch has
    `STEPS` steps or more, or each row has the longest example alone.
    """
    rows = options.rows
    if options.batch is None:
        sizes, others = (
            [sum(len(one.tokens) for one in sequences_of(unit)) for unit in units]
            for units in (trained, held_out)
        )
        part = len(sequences_of(trained[0]))  # a pair has a row of two lengths

        def few() -> bool:
            """Return whether an epoch has too few steps."""
            in_epoch = sum(sizes) / (part * length) if options.packing else len(sizes)
            return in_epoch < STEPS * rows

        longest = max([*sizes, *others])
        shortens = options.packing and options.length is None
        while shortens and few() and part * (length // 2) >= longest:
            length //= 2
        while rows > 1 and few():
            rows //= 2
    return replace(options, batch=rows), length


def form_of(sizes: np.ndarray, options: FinetuneOptions, length: int, processes: int) -> Form:
    """Return the form of a run on examples of so many tokens, none of them more than `length`.

    Rows may be a half, a quarter, ... of `length`; there are twice, four times as many then. A
    step is at most an epoch.
    """
    import numpy as np

    sample = sizes[order_of(sizes, np.random.default_rng(options.seed), SAMPLE)]
    part, fills = best_part(sample, length) if options.packing else (1, sample)
    in_epoch = max(1, int(sizes.sum() // fills.max())) if options.packing else len(sizes)
    rows = min(options.rows * processes * part, in_epoch)
    batches = min(options.accumulate, in_epoch // rows)
    epoch = len(fills) * len(sizes) / len(sample) / rows
    run = options.steps * batches if options.steps else options.epochs * epoch
    most = max(1, min(MOST_LENGTHS, int(run / BATCHES_PER_SHAPE)))
    lengths = lengths_for(np.append(fills, sizes.max()), length // part, most)
    return Form(lengths, rows, batches)


def epochs_of(sizes: np.ndarray, options: FinetuneOptions, form: Form) -> Iterator[Rows]:
    """Yield the rows of each epoch in the order of their batches, of which the run's last may have
    fewer. There is no last one if `options.steps` says where to end.
    """
    import numpy as np

    left = None if options.steps else max(1, round(options.epochs * len(sizes)))
    waiting = Rows(np.arange(0), np.arange(1))  # for the first batch of the next epoch
    for epoch in count():
        random = np.random.default_rng((options.seed, epoch))
        order = order_of(sizes, random, left, options.packing)
        left = None if left is None else left - len(order)
        begun = form.rows if len(waiting) else 0  # the first batch keeps its place
        if options.packing:
            rows = packed_on(waiting, order, sizes, form.lengths[-1], random)
        else:
            rows = joined([waiting, Rows(order, np.arange(len(order) + 1))])
        rest = len(rows) % form.rows if left == 0 else (len(rows) - 1) % form.rows + 1
        places = np.arange(len(rows))
        between = places[begun : len(rows) - rest]
        if len(form.lengths) > 1:
            classes = np.searchsorted(form.lengths, rows.tokens(sizes)[between])
            between = between[np.argsort(-classes, kind="stable")]
        batches = random.permutation(between.reshape(-1, form.rows))
        places[begun : len(rows) - rest] = batches.ravel()
        end = len(rows) if left == 0 else len(rows) - rest
        yield rows.take(places[:end])
        if left == 0:
            return
        waiting = rows.take(places[end:])


def packed_on(
    waiting: Rows, order: np.ndarray, sizes: np.ndarray, length: int, random: np.random.Generator
) -> Rows:
    """Return the waiting rows, of which the last is packed on, and then new ones of all examples of
    `order` in a random order, but for the one with the most room: it comes last.
    """
    import numpy as np

    whole = max(0, len(waiting) - 1)
    opened = len(waiting) - whole  # one row, or none
    rows = pack(np.append(waiting.numbers[waiting.starts[whole] :], order), sizes, length)
    places = np.arange(len(rows))
    random.shuffle(places[opened:])
    if opened < len(rows):
        least = opened + int(rows.tokens(sizes)[places[opened:]].argmin())
        places[[least, -1]] = places[[-1, least]]
    return joined([waiting.take(np.arange(whole)), rows.take(places)])


def first_of(count: int | None, parts: Iterable[Rows]) -> Rows:
    """Return the first `count` rows of all parts, or all."""
    import numpy as np

    found: list[Rows] = []
    so_far = 0
    for part in parts:
        found.append(part)
        so_far += len(part)
        if count is not None and so_far >= count:
            break
    return joined(found).take(np.arange(so_far if count is None else count))


def batch_lengths(tokens: np.ndarray, bounds: np.ndarray, form: Form) -> np.ndarray:
    """Return how long the rows of each batch are; `tokens` are those of all rows."""
    import numpy as np

    fullest = np.maximum.reduceat(tokens, bounds[:-1])
    lengths = np.array(form.lengths)[np.searchsorted(form.lengths, fullest)]
    if bounds[-1] - bounds[-2] < form.rows:  # its shape is another one anyway
        lengths[-1] = rounded_up(fullest[-1], lengths[-1])
    return lengths


def room_for(targets: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return how many targets each batch has room for: some eighths of its places, few different
    ones for each shape of rows.
    """
    import numpy as np

    slots = counts * lengths
    eighths = np.maximum(-(-targets * EIGHTHS // slots), 1)
    for size in np.unique(slots):
        same = slots == size
        most = max(1, min(MOST_SHARES, int(same.sum()) // BATCHES_PER_SHAPE))
        few = lengths_for(eighths[same], EIGHTHS, most)
        eighths[same] = np.array(few)[np.searchsorted(few, eighths[same])]
    return -(-slots * eighths // EIGHTHS)
