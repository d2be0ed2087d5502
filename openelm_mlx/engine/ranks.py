"""The processes that `mlx.launch` starts: which one this is, and what they tell each other."""

from __future__ import annotations

from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import OptionError, reason


class Ranks(NamedTuple):
    """The processes that `mlx.launch` has started: the number of this one, and how many."""

    rank: int = 0
    size: int = 1

    @device_work
    def gather(self, text: str) -> list[str]:
        """Return the texts that all processes give, each once all have called this.

        Raises `OptionError` if one of them has ended.
        """
        if self.size == 1:
            return [text]
        data = text.encode()
        try:
            lengths: Any = gathered(mx.array([len(data)], mx.uint32)).tolist()
            padded = mx.array(list(data.ljust(max(*lengths, 1))), mx.uint8)
            rows = gathered(padded).reshape(self.size, -1)
            texts = [bytes(row)[:length] for row, length in zip(rows, lengths, strict=True)]
        except RuntimeError:
            what = "another process of mlx.launch has ended"
            raise OptionError(f"{what}; see what it said, and run the same command") from None
        return [text.decode() for text in texts]


def gathered(values: mx.array) -> mx.array:
    """Return the values of all processes, one after another."""
    return mx.distributed.all_gather(values, stream=mx.cpu)


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
