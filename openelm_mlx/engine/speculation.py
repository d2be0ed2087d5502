"""Speculative decoding that no draft can be seen in: tokens are drafted, verified in one pass, kept
while they agree.

The target draws its own token at every position, exactly as it does without a draft:
argmax(filtered logits + Gumbel noise), the noise being a function of key and position. The draft
model draws with the same noise, so the two agree often, and a seed gives the same text with any
draft and with none (drafter-invariant coupling, Daliri, Musco and Suresh, arXiv:2408.07978). A
token drafted from q is kept by a target with distribution p with the probability sum over x of 1 /
sum over y of max(p(y) / p(x), q(y) / q(x)), not far below sum(min(p, q)), the most there can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.drafts import (
    LENGTHS,
    Draft,
    DraftLength,
    DraftRows,
    ModelDraft,
    PromptLookup,
)
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import UNFIT, as_annotated, shown

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import State, StepSpec
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import Request


class Proposal(NamedTuple):
    """What is drafted for every row. Lengths may be shortened; reading the tokens waits for a draft
    model.
    """

    tokens: mx.array  # [B, k] uint32
    lengths: list[int]  # of each row: the first so many tokens are its draft, 0 to k


@dataclass
class RowDrafts:
    """What one request drafts with: prompt lookup, and a model or a source of the caller's."""

    lookup: PromptLookup | None
    length: DraftLength | None  # of the model's or the caller's drafts
    known: int = 0  # tokens of the text at the latest draft
    looked_up: bool = False  # whether that was the lookup's


class Speculation:
    """The drafts of all rows of a scheduler, which numbers them; prompt lookup first, the draft
    where it finds nothing.

    Raises `OptionError` where a draft model has another tokenizer than `engine`.
    """

    def __init__(self, engine: Engine, draft: Engine | ModelDraft | Draft | None = None) -> None:
        self.vocab, self.cost = engine.vocab, 0.0
        self.model: DraftRows | None = None
        self.custom: Draft | None = None
        if isinstance(draft, ModelDraft):
            draft.check(engine)
        elif draft is not None and not hasattr(draft, "propose"):
            draft = ModelDraft(engine, draft)
        if isinstance(draft, ModelDraft):
            self.model, self.cost = DraftRows(draft), draft.cost
        else:
            self.custom = draft
        self._rows: dict[int, RowDrafts] = {}

    @property
    def has_model(self) -> bool:
        """Whether there is a draft besides prompt lookup, which requests ask for themselves."""
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
        """End the drafts of `row`; what the draft model has read is kept for a later text that
        begins alike.
        """
        del self._rows[row]
        if self.model is not None:
            self.model.release(row)

    def move(self, rows: list[int], count: int) -> None:
        """Renumber `rows` as 0, 1, ... of `count`."""
        self._rows = {new: self._rows[old] for new, old in enumerate(rows) if old in self._rows}
        if self.model is not None:
            self.model.move(rows, count)

    def hopeful(self, live: list[tuple[int, Request]]) -> bool:
        """Return whether a draft of any row would pay; looks at the host's lists only, nothing is
        computed.
        """
        return any(sum(self._lengths(row, request)) > 0 for row, request in live)

    def _lengths(self, row: int, request: Request) -> tuple[int, int]:
        """Return how many tokens to look up for a row, and where that is 0, how many to ask of the
        draft.
        """
        one, known = self._rows[row], request.known
        room = max(request.left - 1, 0)  # verifying draws one token more than the draft has
        looked_up = min(one.lookup.length(known), room) if one.lookup is not None else 0
        if looked_up or one.length is None:
            return looked_up, 0
        if self.model is not None:
            context = self.model.draft.engine.config.max_context_length
            room = max(min(room, context - len(known)), 0)
        return 0, min(one.length.length(len(known)), room)

    def propose(
        self, live: list[tuple[int, Request]], state: State, spec: StepSpec
    ) -> Proposal | None:
        """Return drafts of what follows the newest tokens, or None where no row has one."""
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
        """Learn that of the latest draft of `row`, of `drafted` tokens, the first `accepted` were
        kept.
        """
        one = self._rows[row]
        if not drafted or one.looked_up or one.length is None:
            return  # a lookup counts its own hits
        one.length.record(one.known, drafted, accepted)
        if self.model is not None:
            self.model.record(row, one.known, drafted, accepted)
