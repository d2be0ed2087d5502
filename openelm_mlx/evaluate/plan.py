"""Which requests share a pass of the model: decided from token ids alone, before anything runs.

Requests often begin alike: the choices of a question follow the same context, the questions of a
subject follow the same examples. The model is fed what they share once. Sequences that share a
beginning are a tree, laid out as one row of a pass; a token sees its own branch only:

    context         the cat sat              depth   0   1   2
    continuations               on  top      .                   3   (the last token is only
                                down the     .                   3    predicted, never fed)

    row             the cat sat on  down     a token sees   the  cat  sat  on  down
    depth            0   1   2   3   3       the             x
    end              5   5   5   4   5       cat             x    x
                                             sat             x    x    x
                                             on              x    x    x    x
                                             down            x    x    x         x

`end` is one past the last token that sees this one: the branches of a token follow it, so token j
is seen by j, ..., end[j] - 1. Rows of similar length are a pass, padded to the longest. A long
beginning that many rows share is a prefix of their passes: it is run by itself, and every row
attends to its keys and values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

PAIRS = 512  # pairs of tokens that attend to each other, for which one token more may be fed
WIDTH = 512  # tokens of a row at which a pass has as many as it may: longer ones make it smaller
SHORTEST = 64  # tokens of a prefix
WORTH = 64  # tokens that are worth a pass: one with a prefix, or with less padding


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
    """The requests, by their number, that one pass of the model answers.

    The first `rows[0]` of them are the tree of the first row, and so on. All begin with the same
    `prefix` tokens, which are run before, unless the pass before had the same ones.
    """

    requests: tuple[int, ...]
    tokens: int  # that it takes, with padding, and with the prefix if it is the first that has it
    rows: tuple[int, ...] = ()
    prefix: int = 0


class Item(NamedTuple):
    """A request among others that are sorted by the tokens they feed."""

    number: int
    length: int  # tokens it feeds
    first: int  # the first of them whose state predicts a token of the continuation
    shared: int  # tokens with which the one before it begins, too


class Row(NamedTuple):
    """Neighbours that are one tree."""

    tokens: int
    items: tuple[Item, ...]


def plan(requests: Sequence[Request], batch_tokens: int) -> list[Pass]:
    """Return passes that answer each request once, each of at most `batch_tokens` with padding, or
    of a single longer sequence; a prefix comes before these. Passes with the same one are together.

    Passes are smaller where rows are long, because attention takes memory for each pair of tokens.
    The same requests always give the same passes, so that numbers do not depend on which of them
    were answered before, or by which process.
    """
    passes = []
    for prefix, items in groups(sorted_items(requests), batch_tokens):
        rows = sorted(in_rows(items, prefix, batch_tokens), key=lambda row: -row.tokens)
        lengths, start, before = [row.tokens for row in rows], 0, prefix
        while start < len(rows):
            left = lengths[start : start + batch_tokens]  # a row has a token or more
            count = rows_of_a_pass(left, prefix, batch_tokens)
            taken = rows[start : start + count]
            numbers = tuple(item.number for row in taken for item in row.items)
            sizes = tuple(len(row.items) for row in taken)
            passes.append(Pass(numbers, before + taken[0].tokens * count, sizes, prefix))
            start, before = start + count, 0
    return passes


def rows_of_a_pass(lengths: Sequence[int], prefix: int, batch_tokens: int) -> int:
    """Return how many rows, of which the longest comes first, make one pass.

    They stop where more than `WORTH` tokens would be padding.
    """
    longest = lengths[0]
    pairs = longest * (prefix + longest)
    most = max(1, min(batch_tokens // longest, batch_tokens * WIDTH // pairs))
    padding = accumulate(longest - length for length in lengths[:most])
    return sum(tokens <= WORTH for tokens in padding)


def sorted_items(requests: Sequence[Request]) -> list[Item]:
    """Return the requests in the order of their tokens: what begins alike is side by side."""
    fed = as_texts(requests)
    order = sorted(range(len(fed)), key=fed.__getitem__)
    items, before = list[Item](), ""
    for number in order:
        first = len(requests[number].context) - 1
        items.append(Item(number, len(fed[number]), first, common(before, fed[number])))
        before = fed[number]
    return items


def as_texts(requests: Sequence[Request]) -> list[str]:
    """Return the tokens that each request feeds, as a text in which each is one character.

    It is in the same order, but takes a quarter of a tuple's memory.
    """
    texts, before, text = list[str](), tuple[int, ...](), ""
    for context, continuation in requests:
        if context is not before:
            before, text = context, "".join(map(chr, context))
        texts.append((text + "".join(map(chr, continuation)))[:-1])
    return texts


def common(a: Sequence[object], b: Sequence[object]) -> int:
    """Return how many tokens both begin with."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect_left(lengths, True, key=lambda length: a[:length] != b[:length])


def groups(items: list[Item], batch_tokens: int) -> list[tuple[int, list[Item]]]:
    """Return what is run with the same prefix: its length, 0 for none, and the items in order.

    From the shortest beginning that several items share to the longest, one becomes a prefix if
    rows without it take at least `WORTH` tokens more, or if some are too long for a pass: once all
    are, or none is any more with it.
    """
    owners, prefixes = [0] * len(items), [0]  # of each item; tokens of each owner
    parts = [(0, len(items), 0)]
    while parts:
        start, stop, owner = parts.pop()
        part = items[start:stop]
        if max((item.length for item in part), default=0) <= SHORTEST:
            continue
        inner = min((item.shared for item in part[1:]), default=part[0].length)
        prefix, current = min(inner, *(item.first for item in part)), prefixes[owner]
        if prefix >= max(SHORTEST, current + 1) and worth(part, prefix, current, batch_tokens):
            owner = len(prefixes)
            prefixes.append(prefix)
            owners[start:stop] = [owner] * len(part)
        if len(part) > 1:
            inside = (at for at in range(start + 1, stop) if items[at].shared == inner)
            parts += [(*ends, owner) for ends in pairwise((start, *inside, stop))]
    found: list[list[Item]] = [[] for _ in prefixes]
    alike = dict[int, int]()  # what the next item of an owner shares with its latest, if it does
    for item, owner in zip(items, owners, strict=True):
        kept = ((one, min(tokens, item.shared)) for one, tokens in alike.items())
        alike = {one: tokens for one, tokens in kept if tokens >= prefixes[one]}
        owner = next((one for one in alike if prefixes[one] == prefixes[owner]), owner)
        found[owner].append(item._replace(shared=alike.get(owner, 0)))
        alike[owner] = item.length
    return [(prefix, own) for prefix, own in zip(prefixes, found, strict=True) if own]


def worth(items: list[Item], prefix: int, current: int, batch_tokens: int) -> bool:
    """Return whether these items should have a longer prefix than the current one."""

    def too_long(length: int, before: int) -> bool:
        return (length - before) * length > batch_tokens * WIDTH

    def fed(before: int) -> int:
        return sum(row.tokens for row in in_rows(items, before, batch_tokens))

    lengths = [item.length for item in items]
    longest, shortest = max(lengths), min(lengths)
    if too_long(longest, current) and (
        too_long(shortest, current) or not too_long(longest, prefix)
    ):
        return True
    return fed(current) - (prefix + fed(prefix)) >= WORTH


def in_rows(items: Sequence[Item], prefix: int, batch_tokens: int) -> Iterator[Row]:
    """Yield the trees that neighbours make, each of at most `batch_tokens` if more than one.

    An item joins the row of the one before it if that saves more tokens than it costs attention:
    in a row of n tokens n * n pairs are computed, also those of different branches. It always does
    if it goes on from there, and would take as many tokens by itself.
    """
    row, tokens = list[Item](), 0
    for item in items:
        own, shared = item.length - prefix, item.shared - prefix if row else 0
        joined = tokens + own - shared
        pairs = joined**2 - tokens**2 - own**2
        fits = joined <= batch_tokens and joined * (prefix + joined) <= batch_tokens * WIDTH
        if row and joined > own and own > shared and not (fits and pairs <= shared * PAIRS):
            yield Row(tokens, tuple(row))
            row, joined = [], own
        row.append(item)
        tokens = joined
    if row:
        yield Row(tokens, tuple(row))


class Tree(NamedTuple):
    """Sequences that share a beginning, as one row: see the picture above."""

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]  # for each sequence the places of its tokens

    @classmethod
    def of(cls, sequences: Sequence[tuple[int, ...]]) -> Tree:
        """Return the tree of sequences that are in order."""
        tree, path, before = cls([], [], [], []), list[int](), tuple[int, ...]()
        for sequence in sequences:
            shared = common(before, sequence)
            for place in path[shared:]:
                tree.ends[place] = len(tree.tokens)
            path = path[:shared]
            for depth in range(shared, len(sequence)):
                path.append(len(tree.tokens))
                tree.tokens.append(sequence[depth])
                tree.depths.append(depth)
                tree.ends.append(-1)
            tree.paths.append(path)
            before = sequence
        for place in path:
            tree.ends[place] = len(tree.tokens)
        return tree

    @property
    def branches(self) -> bool:
        """Whether any token does not see all before it."""
        return self.depths[-1] + 1 < len(self.tokens)
