"""The processes that `mlx.launch` starts: which one this is, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import OptionError, reason

SUM_BYTES = 32 << 20  # that are sent together


class Ranks(NamedTuple):
    """The processes that `mlx.launch` has started: the number of this one, and how many.

    What their methods return is the same in all, once all have called them. They raise
    `OptionError` if one of them has ended.
    """

    rank: int = 0
    size: int = 1

    @device_work
    def gather(self, text: str) -> list[str]:
        """Return the texts that all processes give."""
        if self.size == 1:
            return [text]
        data = text.encode()
        with connected():
            lengths: Any = gathered(mx.array([len(data)], mx.uint32)).tolist()
            padded = mx.array(list(data.ljust(max(*lengths, 1))), mx.uint8)
            rows = gathered(padded).reshape(self.size, -1)
            texts = [bytes(row)[:length] for row, length in zip(rows, lengths, strict=True)]
        return [text.decode() for text in texts]

    def sums(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return the sums over all processes of arrays, which have the same shapes in each."""
        if self.size == 1:
            return list(arrays)
        found: list[mx.array] = []
        with connected():
            for part in portions(arrays):
                flat = mx.concatenate([array.reshape(-1) for array in part])
                whole = mx.distributed.all_sum(flat, stream=mx.cpu)
                mx.eval(whole)
                ends = [0]
                for array in part:
                    ends.append(ends[-1] + array.size)
                    found.append(whole[ends[-2] : ends[-1]].reshape(array.shape))
        return found

    def firsts(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """Return the arrays of the first process; the others give some of the same shapes."""
        if self.size == 1:
            return list(arrays)
        with connected():
            return [gathered(array[None])[0] for array in arrays]


def portions(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Yield the arrays in order, those of one type together up to `SUM_BYTES`."""
    part: list[mx.array] = []
    for array in arrays:
        size = sum(one.nbytes for one in part) + array.nbytes
        if part and (size > SUM_BYTES or array.dtype != part[0].dtype):
            yield part
            part = []
        part.append(array)
    if part:
        yield part


@contextmanager
def connected() -> Iterator[None]:
    """Raise `OptionError` where MLX says that a process cannot be reached any more."""
    try:
        yield
    except RuntimeError:
        what = "another process of mlx.launch has ended"
        raise OptionError(f"{what}; see what it said, and run the same command") from None


def gathered(values: mx.array) -> mx.array:
    """Return the values of all processes, one after another."""
    found = mx.distributed.all_gather(values, stream=mx.cpu)
    mx.eval(found)
    return found


def check_alike(given: Sequence[Mapping[str, Any]]) -> None:
    """Raise `OptionError` if a process does something else than the first, by what they gave."""
    first = given[0]
    for rank, theirs in enumerate(given):
        if wrong := [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]:
            other = f"process {rank + 1} of mlx.launch has other {' and '.join(wrong)}"
            remedy = "give all the same, and each such command here its own --starting-port"
            raise OptionError(f"{other} than the first; {remedy}")


def launched() -> Ranks:
    """Return the number of this process, and how many `mlx.launch` has started.

    Raises `OptionError` if they cannot be connected: the ring of one process, say.
    """
    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        what = f"the processes of mlx.launch cannot be connected ({reason(error)})"
        raise OptionError(f"{what}; give it -n 2 or more, or run the command without it") from None
    return Ranks(group.rank(), group.size())
