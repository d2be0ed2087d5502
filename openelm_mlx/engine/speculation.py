"""Speculative decoding: tokens are drafted, verified in one pass, and kept while they agree.

No draft changes the text. The target draws its own token at every position, exactly as it does
without a draft: argmax(filtered logits + Gumbel noise), the noise being a function of key and
position. The draft model draws with the same noise, so the two agree often, and a seed gives the
same text with any draft and with none (drafter-invariant coupling, Daliri, Musco and Suresh,
arXiv:2408.07978). A token drafted from q is kept by a target with distribution p with the
probability sum over x of 1 / sum over y of max(p(y) / p(x), q(y) / q(x)), not far below the upper
bound sum(min(p, q)).

Drafts come from the text itself (`PromptLookup`), a smaller model (draft_model.py) or a caller
(`Draft`). Their lengths are functions of tokens alone, never of time, so that a run can be repeated
pass by pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple, Protocol

from openelm_mlx.device import mx
from openelm_mlx.engine.draft_model import DraftRows, ModelDraft
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import UNFIT, as_annotated, shown

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import State, StepSpec
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import Request

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # each length is a trace of its own, so not every number
# passes that one more token in the target's pass costs; memory-bound devices take it almost free
EXTRA = 0.05
LEAVING = 0.15  # passes that each draft costs too, as the device is not one token ahead then


class Draft(Protocol):
    """A caller's own source of drafts. Wrong tokens cost time and never change the text."""

    def propose(self, known: list[int], length: int) -> list[int]:
        """Return at most `length` tokens that may follow `known`, the prompt and the answer."""
        ...


def gain(acceptance: float, k: int, cost: float) -> float:
    """Return the tokens that a draft of k gives for the price of one token by plain decoding.

    A draft gives (1 - a^(k+1)) / (1 - a) tokens, where a is the acceptance of each
    (arXiv:2211.17192, eq. 1), for 1 + LEAVING + k (cost + EXTRA) passes of the target.
    """
    a = min(acceptance, 0.999)
    return (1 - a ** (k + 1)) / (1 - a) / (1 + LEAVING + k * (cost + EXTRA))


def longest_gain(acceptance: float, limit: int, cost: float) -> tuple[int, float]:
    """Return the length up to `limit` that gains most, and its gain."""
    lengths = [k for k in LENGTHS if k <= limit]
    gains = [gain(acceptance, k, cost) for k in lengths]
    most = max(gains)
    return lengths[gains.index(most)], most


class PromptLookup:
    """Guesses what followed the last time the latest tokens were seen.

    It searches for the latest `ngram` of them first, then for fewer.

    known    the cat sat on a mat . the cat
             ^^^^^^^ earlier match  ^^^^^^^ the latest two
    draft    sat on a mat . the cat sat ...       (what runs over the end repeats: a loop goes on)

    Guessing costs nothing, so it is done at every token, drafted or not: the share of right guesses
    is known for each length of match before the first draft is made. Nothing is drafted before a
    guess was right.
    """

    MEMORY = 0.8  # weight of the past at each guess
    PRIOR = 0.1  # share of right guesses before there was one
    MARGIN = 1.2  # the least gain of an adaptive draft: a few lucky guesses are not a pattern

    def __init__(self, ngram: int, limit: int, adaptive: bool = True) -> None:
        self.ngram, self.limit, self.adaptive = ngram, limit, adaptive
        self.hits = [self.PRIOR] * (ngram + 1)  # share of right guesses by length of match
        self._after: dict[tuple[int, ...], int] = {}  # the place after an n-gram's latest one
        self._seen = 0

    def find(self, known: list[int]) -> tuple[int, int] | None:
        """Find the latest earlier occurrence of the longest end of `known` that occurred before.

        Return the place after it, and its length.
        """
        for end in range(self._seen, len(known)):
            guess = self._match(known, end)
            if guess is not None:
                place, n = guess
                hit = (1 - self.MEMORY) * (known[place] == known[end])
                self.hits[n] = self.MEMORY * self.hits[n] + hit
            for n in range(1, min(self.ngram, end) + 1):
                self._after[tuple(known[end - n : end])] = end
        self._seen = len(known)
        return self._match(known, len(known))

    def _match(self, known: list[int], end: int) -> tuple[int, int] | None:
        for n in range(min(self.ngram, end), 0, -1):
            place = self._after.get(tuple(known[end - n : end]))
            if place is not None:
                return place, n
        return None

    def length(self, known: list[int]) -> int:
        """Return how many tokens to draft after `known`.

        It is 0 if nothing matches, or if recent matches of this length promise no gain.
        """
        match = self.find(known)
        if match is None:
            return 0
        if not self.adaptive:
            return self.limit
        best, most = longest_gain(self.hits[match[1]], self.limit, 0.0)
        return best if most > self.MARGIN else 0

    def propose(self, known: list[int], length: int) -> list[int]:
        """Return `length` tokens that may follow `known`, or none if nothing matches."""
        match = self.find(known)
        if match is None:
            return []
        place, period = match[0], len(known) - match[0]
        return [known[place + index % period] for index in range(length)]


class DraftLength:
    """How long a draft that costs something should be, by how much of earlier ones was accepted.

    If no length pays, it pauses for PAUSE tokens, twice as long each time, and then tries a short
    draft.
    """

    MEMORY = 0.9  # weight of the past at each tested token
    PAUSE, LONGEST_PAUSE = 16, 256

    def __init__(self, limit: int, cost: float, adaptive: bool = True) -> None:
        self.limit, self.cost, self.adaptive = limit, cost, adaptive
        self.acceptance = 0.7
        self._resume, self._pause, self._probing = 0, self.PAUSE, False

    def length(self, known: int) -> int:
        """Return how many tokens to draft after `known`; 0 while drafting does not pay."""
        if not self.adaptive:
            return self.limit
        if known < self._resume:
            return 0
        if self._probing:
            return min(2, self.limit)
        return longest_gain(self.acceptance, self.limit, self.cost)[0]

    def record(self, known: int, drafted: int, accepted: int) -> None:
        """Learn that the first `accepted` tokens of a draft after `known` tokens were kept."""
        tested = min(accepted + 1, drafted)  # tokens after the first rejection say nothing
        for index in range(tested):
            hit = 1.0 if index < accepted else 0.0
            self.acceptance = self.MEMORY * self.acceptance + (1 - self.MEMORY) * hit
        if self._probing and accepted:
            self._probing, self._pause = False, self.PAUSE
            self.acceptance = max(self.acceptance, 0.6)
        elif self._probing or longest_gain(self.acceptance, self.limit, self.cost)[1] < 1:
            self._resume, self._probing = known + self._pause, True
            self._pause = min(2 * self._pause, self.LONGEST_PAUSE)


class Proposal(NamedTuple):
    """The drafts of all rows. Lengths may be shortened; reading the tokens waits for the device."""

    tokens: mx.array  # [B, k] uint32
    lengths: list[int]  # of each row: the first so many tokens are its draft, 0 to k


@dataclass
class RowDrafts:
    """The sources of drafts for one request: prompt lookup, and a model or a caller's source."""

    lookup: PromptLookup | None
    length: DraftLength | None  # of the model's or the caller's drafts
    known: int = 0  # tokens of the text at the latest draft
    looked_up: bool = False  # whether prompt lookup made that draft


class Speculation:
    """The drafts of all rows of a scheduler: by prompt lookup, or else by the draft.

    Raises `OptionError` if a draft model has another tokenizer than `engine`.
    """

    def __init__(self, engine: Engine, draft: Engine | ModelDraft | Draft | None = None) -> None:
        self.vocab, self.cost = engine.vocab, 0.0
        self.model: DraftRows | None = None
        self.custom: Draft | None = None
        if isinstance(draft, ModelDraft):
            draft.check(engine)
        elif draft is not None and not hasattr(draft, "propose"):
            draft = ModelDraft(engine, draft)
        self.draft = draft
        if isinstance(draft, ModelDraft):
            self.model, self.cost = DraftRows(draft), draft.cost
        else:
            self.custom = draft
        self._rows: dict[int, RowDrafts] = {}

    @property
    def has_model(self) -> bool:
        """True if there is a draft besides prompt lookup, which requests ask for themselves."""
        return self.model is not None or self.custom is not None

    def admit(self, row: int, request: Request) -> None:
        """Begin to draft for `request` in `row`."""
        o = request.options
        lookup = length = None
        if o.prompt_lookup:
            lookup = PromptLookup(o.prompt_lookup, o.draft_tokens, o.adaptive_draft)
        if self.has_model:
            length = DraftLength(o.draft_tokens, self.cost, o.adaptive_draft)
        self._rows[row] = RowDrafts(lookup, length)
        if self.model is not None:
            self.model.admit(row, request)

    def release(self, row: int) -> None:
        """End the drafts of `row`; the draft model keeps what it has read for later texts."""
        del self._rows[row]
        if self.model is not None:
            self.model.release(row)

    def move(self, rows: list[int], count: int) -> None:
        """Renumber `rows` as 0, 1, ... of `count`."""
        self._rows = {new: self._rows[old] for new, old in enumerate(rows) if old in self._rows}
        if self.model is not None:
            self.model.move(rows, count)

    def pays(self, live: list[tuple[int, Request]]) -> bool:
        """Return whether a draft of any row would pay, from what the host knows: nothing is run."""
        return any(sum(self._lengths(row, request)) > 0 for row, request in live)

    def _lengths(self, row: int, request: Request) -> tuple[int, int]:
        """Return how many tokens to look up for a row, and how many to draft if that is 0."""
        one, known = self._rows[row], request.known
        most = max(request.left - 1, 0)  # verifying draws one token more than the draft has
        looked_up = min(one.lookup.length(known), most) if one.lookup is not None else 0
        if looked_up or one.length is None:
            return looked_up, 0
        if self.model is not None:
            context = self.model.draft.engine.config.max_context_length
            most = max(min(most, context - len(known)), 0)
        return 0, min(one.length.length(len(known)), most)

    def propose(
        self, live: list[tuple[int, Request]], state: State, spec: StepSpec
    ) -> Proposal | None:
        """Return drafts of what follows the newest tokens, or None if no row has one.

        Raises `OptionError` if a caller's source proposes anything but token ids.
        """
        count = state.token.size
        lengths, guesses, asked = [0] * count, [[0]] * count, {}
        for row, request in live:
            one, known = self._rows[row], request.known
            looked_up, drafted = self._lengths(row, request)
            one.known, one.looked_up = len(known), looked_up > 0
            if one.lookup is not None and looked_up:
                guesses[row] = one.lookup.propose(known, looked_up)
                lengths[row] = looked_up
            elif self.custom is not None and drafted:
                given = self.custom.propose(list(known), drafted)
                if (ids := as_annotated("tuple[int, ...]", given)) is UNFIT:
                    allowed = "allowed is a list of token ids, [] for no draft"
                    raise OptionError(f"draft proposed {shown(given)}; {allowed}")
                ids = takewhile(lambda token: 0 <= token < self.vocab, ids[:drafted])
                guesses[row] = list(ids)
                lengths[row] = len(guesses[row])
            elif drafted:
                asked[row] = drafted
        ready: list[int] = []
        if self.model is not None and asked:
            budget = self.model.ALONE if len(live) == 1 else self.model.SHARED
            ready = self.model.catch_up(list(asked), budget)
            for row in ready:
                lengths[row] = asked[row]
        if not any(lengths):
            return None
        k = next(k for k in LENGTHS if k >= max(lengths))
        tokens = mx.array([guess + [0] * (k - len(guess)) for guess in guesses], dtype=mx.uint32)
        if self.model is not None and ready:
            mine = mx.array([[row in ready] for row in range(count)])
            tokens = mx.where(mine, self.model.propose(ready, state, spec, k), tokens)
        return Proposal(tokens, lengths)

    def record(self, row: int, drafted: int, accepted: int) -> None:
        """Learn that `accepted` of the `drafted` tokens in the latest draft of `row` were kept."""
        one = self._rows[row]
        if not drafted or one.looked_up or one.length is None:
            return  # a lookup counts its own hits
        one.length.record(one.known, drafted, accepted)
        if self.model is not None:
            self.model.record(row, one.known, drafted, accepted)
