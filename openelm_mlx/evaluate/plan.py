"""Which requests share a pass of the model: decided from token ids alone, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Request(NamedTuple):
    """A continuation whose log-likelihood is wanted, after a context of one token or more."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def fed(self) -> tuple[int, ...]:
        """The tokens that the model is fed: all but the last, which is only predicted."""
        return (self.context + self.continuation)[:-1]


@dataclass(frozen=True)
class Pass:
    """The requests, by their number, that one pass of the model answers."""

    requests: tuple[int, ...]
    tokens: int  # that it takes, with padding


def plan(requests: Sequence[Request], batch_tokens: int) -> list[Pass]:
    """Return passes that answer each request once, each of at most `batch_tokens` with padding, or
    of a single longer sequence.

    The same requests always give the same passes, so that numbers do not depend on which of them
    were answered before, or by which process.
    """
    order = sorted(range(len(requests)), key=lambda n: -len(requests[n].fed))
    passes = []
    while order:
        longest = len(requests[order[0]].fed)
        numbers = tuple(order[: max(1, batch_tokens // longest)])
        del order[: len(numbers)]
        passes.append(Pass(numbers, longest * len(numbers)))
    return passes
