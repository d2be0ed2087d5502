"""Packing: which examples share a row, and how long rows are, from the lengths of examples alone.

An example of many tokens seldom leaves a row, and one of few fills what others have left:

    5 opens         [11111    ]
    3 fits there    [11111222 ]
    4 opens         [11111222 ]  [3333     ]
    1 fits best in  [111112224]  [3333     ]    not where it leaves more room

Some examples leave room in any order, as when each is longer than half a row. Then rows have
several lengths. There are few, because a compiled step is traced anew for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SHORTEST = 128  # tokens to which rows are shortened: attention to a short row costs less
STEPS = 128  # lengths are multiples of so many parts of the longest, but of 8 at most
WASTE = 0.02  # share of padding that is accepted for shorter rows, and for fewer lengths


@dataclass(frozen=True)
class Rows:
    """Rows of examples, which are numbered."""

    numbers: np.ndarray  # row by row
    starts: np.ndarray  # where each row begins in `numbers`, and where the last one ends

    def __len__(self) -> int:
        return len(self.starts) - 1

    def tokens(self, sizes: np.ndarray) -> np.ndarray:
        """Return the number of tokens in each row, of examples that have so many."""
        import numpy as np

        return np.diff(before(sizes[self.numbers])[self.starts])

    def take(self, places: np.ndarray) -> Rows:
        """Return the rows at these places, in their order."""
        import numpy as np

        starts = before(np.diff(self.starts)[places])
        shifts = np.repeat(self.starts[places] - starts[:-1], np.diff(starts))
        return Rows(self.numbers[shifts + np.arange(starts[-1])], starts)


def joined(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all, one after another."""
    import numpy as np

    counts = np.concatenate([np.diff(part.starts) for part in parts])
    return Rows(np.concatenate([part.numbers for part in parts]), before(counts))


def before(values: np.ndarray) -> np.ndarray:
    """Return the sum of the values before each place, and that of all at the end."""
    import numpy as np

    return np.append(0, np.cumsum(values))


def pack(order: np.ndarray, sizes: np.ndarray, length: int) -> Rows:
    """Return rows of at most `length` tokens; each example goes where it leaves the least room."""
    import numpy as np

    having: list[list[int]] = [[] for _ in range(length + 1)]  # rows, by the room they have
    rooms = 0  # bit r says that a row has room r
    count, places = 0, []
    for size in sizes[order].tolist():
        if enough := rooms >> size:
            room = size + (enough & -enough).bit_length() - 1
            rows = having[room]
            row = rows.pop()
            if not rows:
                rooms ^= 1 << room
        else:
            room, row, count = length, count, count + 1
        places.append(row)
        room -= size
        having[room].append(row)
        rooms |= 1 << room
    return Rows(order[np.argsort(places, kind="stable")], before(np.bincount(places)))


def order_of(
    sizes: np.ndarray,
    random: np.random.Generator,
    first: int | None = None,
    long_first: bool = False,
) -> np.ndarray:
    """Return the examples in a random order, or the `first` of them.

    With `long_first` long ones tend to come first: rows then fill as well as if they were sorted,
    and yet an example meets others in each order.
    """
    import numpy as np

    order = random.permutation(len(sizes))[:first]
    if not long_first:
        return order
    weights = sizes[order] * random.uniform(0.25, 1, len(order))
    return order[np.argsort(-weights, kind="stable")]


def best_part(sizes: np.ndarray, length: int) -> tuple[int, np.ndarray]:
    """Return by what rows of `length` tokens are best divided, and the tokens in each such row.

    It is the largest power of two with which rows fill, and the one with which they fill most if
    they do with none. Rows may end before the last sixteenths, of which examples may fill none.
    """
    import numpy as np

    longest = int(sizes.max())
    order = order_of(sizes, np.random.default_rng(0), long_first=True)
    tried: list[tuple[float, int, np.ndarray]] = []
    part = 1 << (length // max(longest, min(SHORTEST, length))).bit_length() - 1
    while part and not (tried and tried[-1][0] <= WASTE):
        for sixteenths in range(16, 8, -1):
            end = length * sixteenths // part // 16
            if end < longest or (tried and tried[-1][0] <= WASTE):
                break
            fills = np.sort(pack(order, sizes, end).tokens(sizes))
            full = fills[1:] if len(fills) > 1 else fills  # the emptiest will be filled in a run
            tried.append((1 - full.mean() / full.max(), part, fills))
        part //= 2
    _, part, fills = min(tried, key=lambda found: found[0])
    return part, fills


def rounded_up(tokens: np.ndarray, longest: int) -> np.ndarray:
    """Return the lengths of rows that hold so many tokens."""
    import numpy as np

    multiple = max(1, min(8, longest // STEPS))
    return np.minimum(-(-tokens // multiple) * multiple, longest)


def lengths_for(fills: np.ndarray, longest: int, most: int) -> tuple[int, ...]:
    """Return the lengths, ascending, that leave the least padding in rows with so many tokens.

    There are at most `most`, and no more than `WASTE` asks for. The last is that of the fullest
    row, and at most `longest`.
    """
    import numpy as np

    values, counts = np.unique(rounded_up(fills, longest), return_counts=True)
    up_to = np.cumsum(counts)
    # slots[j] is the cost of all rows up to the j-th length, if that is the last of the chosen
    slots = values * up_to
    previous: list[np.ndarray] = []
    later, earlier = np.tril_indices(len(values), -1)
    while len(previous) + 1 < min(most, len(values)) and 1 - fills.sum() / slots[-1] > WASTE:
        costs = np.full((len(values), len(values)), np.inf)
        rows = up_to[later] - up_to[earlier]
        costs[later, earlier] = slots[earlier] + values[later] * rows
        slots, best = costs.min(1), costs.argmin(1)
        previous.append(best)
    chosen = [len(values) - 1]
    for best in reversed(previous):
        chosen.append(int(best[chosen[-1]]))
    return tuple(values[chosen[::-1]].tolist())
