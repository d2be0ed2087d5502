"""Where drafts come from: the context itself, a smaller model, or one after the other; and how long they should be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx

from openelm_mlx.cache import level, step_caches
from openelm_mlx.decode import StepSpec, flat
from openelm_mlx.errors import OptionError
from openelm_mlx.kv import CacheKind
from openelm_mlx.model import OpenELM
from openelm_mlx.options import check_loaded
from openelm_mlx.prompt_cache import PromptCache
from openelm_mlx.sampling import DRAFTING, History, filter_logits, gumbel

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine


class Request(NamedTuple):
    """What a draft may look at: the text so far, and what the next tokens will be drawn with."""

    known: list[int]
    spec: StepSpec
    key: mx.array  # [1, 2]
    history: History | None


class Proposal(NamedTuple):
    """Drafted tokens [k] and the filtered logits [k, vocab] they were drawn from; None where they were certain."""

    tokens: mx.array
    logits: mx.array | None


class Policy(Protocol):
    """How many tokens to draft, from what has been accepted; 0 while drafting does not pay.

    A pure function of tokens, never of time, so that a seed gives the same text on every run.
    """

    def next(self, known: list[int]) -> int: ...
    def record(self, known: int, drafted: int, accepted: int) -> None: ...


class Draft(Protocol):
    """A source of guesses. `propose` may return None; which were accepted, the next request's tokens tell."""

    def policy(self, limit: int, adaptive: bool) -> Policy: ...
    def propose(self, request: Request, length: int) -> Proposal | None: ...


class PromptLookup:
    """Guess what followed the last time the latest tokens were seen: the latest `ngram` of them, or else fewer.

    known    the cat sat on a mat . the cat
             ^^^^^^^ earlier match  ^^^^^^^ the latest two
    draft    sat on a mat . the cat sat ...       (what runs over the end repeats: a loop goes on)

    Guessing costs nothing, so it is done at every token, drafted or not: how often the first guess was right
    is known, for each length of match, before the first draft is made; nothing is drafted before a guess came true.
    """

    MEMORY = 0.8  # weight of the past at each guess
    PRIOR = 0.1  # share of right guesses before there was one

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.hits = [self.PRIOR] * (ngram + 1)  # by length of match: the share of right guesses, the latest weighing most
        self._after: dict[tuple[int, ...], int] = {}  # an n-gram -> the place behind its latest occurrence
        self._seen = 0

    def find(self, known: list[int]) -> tuple[int, int] | None:
        """Find the latest earlier occurrence of the longest end of `known` that occurred before.

        Return the place behind it, and its length.
        """
        for end in range(self._seen, len(known)):
            guess = self._match(known, end)
            if guess is not None:
                place, n = guess
                self.hits[n] = self.MEMORY * self.hits[n] + (1 - self.MEMORY) * (known[place] == known[end])
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

    def policy(self, limit: int, adaptive: bool) -> Policy:
        return LookupLength(self, limit, adaptive)

    def propose(self, request: Request, length: int) -> Proposal | None:
        known, match = request.known, self.find(request.known)
        if match is None:
            return None
        place, period = match[0], len(known) - match[0]
        return Proposal(mx.array([known[place + i % period] for i in range(length)], dtype=mx.uint32), None)


class ModelDraft:
    """Guesses of a smaller model with the same tokenizer, drawn with the target's own sampling options.

    Keeps its cache between generations, so that a conversation's draft model prefills only what is new too.
    Raises `OptionError` when the tokenizers differ.
    """

    def __init__(self, target: Engine, draft: Engine) -> None:
        check_loaded("target", target)
        check_loaded("draft", draft)
        if not draft.tokenizer.same_pieces(target.tokenizer) or draft.vocab != target.vocab:
            raise OptionError(
                f"the draft model {draft.name} has another tokenizer than {target.name}; a draft must share it token for token"
            )
        self.engine = draft
        layers = len(draft.model.layers) / len(target.model.layers)
        self.cost = (draft.nbytes / target.nbytes + layers) / 2  # a token costs bytes read and kernels launched
        self._cache = PromptCache.for_config(draft.config)
        self._fed: mx.array | None = None  # tokens of the latest draft that the cache holds

    def policy(self, limit: int, adaptive: bool) -> Policy:
        self.engine.steps.refresh()
        return DraftLength(limit, self.cost, adaptive)

    def propose(self, request: Request, length: int) -> Proposal | None:
        known = request.known
        length = min(length, self.engine.config.max_context_length - len(known))
        if length < 1:
            return None
        self._catch_up(known, length)
        spec, cache = request.spec, self._cache
        run = self.engine.steps.cached(
            ("draft", spec, length), lambda: make_drafter(self.engine.model, spec, cache.kind, length)
        )
        arrays = [layer.arrays for layer in cache.layers]
        for layer in cache.layers:
            layer.arrays = []  # a second reference would forbid updating in place
        position = mx.array([len(known) - 1], dtype=mx.int32)
        tokens, logits, arrays = run([mx.array([known[-2:]]), position, request.key, flat(request.history), arrays])
        for layer, held in zip(cache.layers, arrays, strict=True):
            layer.arrays = held
        cache.tokens[:] = known
        self._fed = tokens[:-1]  # the last drafted token is never fed
        return Proposal(tokens, None if spec.sampling.greedy else logits)

    def _catch_up(self, known: list[int], length: int) -> None:
        """Bring the cache to all but the last two tokens of `known`; those two start the draft."""
        cache = self._cache
        fed, self._fed = self._fed, None
        if fed is not None:
            drafted: Any = fed.tolist()
            cache.tokens.extend(drafted)  # of which `reuse` keeps what was accepted
        for layer in cache.layers:
            layer.settle(len(cache.tokens) if layer.arrays else 0)
        held = cache.reuse(known[:-1])
        missing = known[held:-2] or ([] if cache.layers[0].arrays else known[:1])
        for first in range(0, len(missing), 512):
            hidden = self.engine.model.hidden(mx.array([missing[first : first + 512]]), cache.layers)
            mx.eval(hidden, [layer.arrays for layer in cache.layers])
        for layer in cache.layers:
            layer.settle(len(known) - 2)
            layer.reserve(len(known) + length)
        level(cache.layers)


def make_drafter(model: OpenELM, spec: StepSpec, kind: CacheKind, length: int) -> Callable[[list[Any]], Any]:
    """`length` draft steps as one function: no return to the host between them.

    It starts with two tokens: after a wholly accepted draft the cache lacks the last one, and feeding it again in
    every other case keeps the shapes, and costs no second pass.
    """

    def run(arrays: list[Any]) -> list[Any]:
        pair, position, key, history, buffers = arrays
        seen = History(*history) if history else None
        caches = step_caches(buffers, position - 1, kind)
        hidden = model.hidden(pair, caches, last=True)
        tokens, logits = [], []
        for index in range(length):
            row = model.logits(hidden)[:, : spec.vocab].astype(mx.float32)
            row = filter_logits(row, spec.sampling, seen)
            noise = 0.0 if spec.sampling.greedy else gumbel(key, position + 1 + index, spec.vocab, DRAFTING)
            token = mx.argmax(row + noise, axis=-1).astype(mx.uint32)
            tokens.append(token)
            logits.append(row)
            seen = None if seen is None else seen.plus(token)
            if index + 1 < length:
                caches = step_caches([cache.arrays for cache in caches], position + 1 + index, kind)
                hidden = model.hidden(token, caches, last=True)
        return [mx.concatenate(tokens), mx.concatenate(logits), [cache.arrays for cache in caches]]

    return mx.compile(run) if spec.compiled else run


LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # each length is a trace of its own, so not every number
EXTRA = 0.05  # passes that one more token in the target's pass costs; memory-bound devices take it almost free
LEAVING = 0.15  # passes that a draft costs beside: the device is no longer one token ahead


def gain(acceptance: float, k: int, cost: float) -> float:
    """Tokens that drafting k gives for the price of one by one: (1 - a^(k+1)) / (1 - a) tokens, with a the acceptance
    of each (arXiv:2211.17192, eq. 1), for 1 + LEAVING + k (cost + EXTRA) passes."""
    a = min(acceptance, 0.999)
    return (1 - a ** (k + 1)) / (1 - a) / (1 + LEAVING + k * (cost + EXTRA))


class LookupLength:
    """Drafts whenever the guesses of late, for a match as long as this one, promise a clear gain."""

    MARGIN = 1.2  # a few lucky guesses are no pattern, and a rejected draft costs most where passes are not memory-bound

    def __init__(self, lookup: PromptLookup, limit: int, adaptive: bool = True) -> None:
        self.lookup, self.limit, self.adaptive = lookup, limit, adaptive
        self.lengths = [k for k in LENGTHS if k <= limit]

    def next(self, known: list[int]) -> int:
        match = self.lookup.find(known)
        if match is None:
            return 0
        if not self.adaptive:
            return self.limit
        best = max(self.lengths, key=lambda k: gain(self.lookup.hits[match[1]], k, 0.0))
        return best if gain(self.lookup.hits[match[1]], best, 0.0) > self.MARGIN else 0

    def record(self, known: int, drafted: int, accepted: int) -> None:
        """Nothing to do: the lookup counts its own hits."""


class DraftLength:
    """For a draft that costs something. When no length pays, it pauses for PAUSE tokens, twice as long each time,
    and then tries a short one."""

    MEMORY = 0.9  # weight of the past at each tested token
    PAUSE, LONGEST_PAUSE = 16, 256

    def __init__(self, limit: int, cost: float, adaptive: bool = True) -> None:
        self.limit, self.cost, self.adaptive = limit, cost, adaptive
        self.lengths = [k for k in LENGTHS if k <= limit]
        self.acceptance = 0.7
        self._resume, self._pause, self._probing = 0, self.PAUSE, False

    def next(self, known: list[int]) -> int:
        if not self.adaptive:
            return self.limit
        if len(known) < self._resume:
            return 0
        if self._probing:
            return min(2, self.limit)
        return max(self.lengths, key=lambda k: gain(self.acceptance, k, self.cost))

    def record(self, known: int, drafted: int, accepted: int) -> None:
        tested = min(accepted + 1, drafted)  # tokens after the first rejection say nothing
        for index in range(tested):
            hit = 1.0 if index < accepted else 0.0
            self.acceptance = self.MEMORY * self.acceptance + (1 - self.MEMORY) * hit
        if self._probing and accepted:
            self._probing, self._pause = False, self.PAUSE
            self.acceptance = max(self.acceptance, 0.6)
        elif self._probing or max(gain(self.acceptance, k, self.cost) for k in self.lengths) < 1:
            self._resume, self._probing = known + self._pause, True
            self._pause = min(2 * self._pause, self.LONGEST_PAUSE)


class Chain:
    """Several drafts, the first that has a proposal; each with a policy of its own."""

    def __init__(self, drafts: list[Draft], limit: int, adaptive: bool = True) -> None:
        self._parts = [(draft, draft.policy(limit, adaptive)) for draft in drafts]
        self._active = self._parts[0][1]  # the policy of the latest proposal
        self._known = 0

    def hopeful(self, known: list[int]) -> bool:
        """Whether a draft of what follows `known` would pay; a look at the host's own lists, nothing is computed."""
        return any(policy.next(known) for _, policy in self._parts)

    def propose(self, request: Request, length: int) -> Proposal | None:
        self._known = len(request.known)
        for draft, policy in self._parts:
            asked = min(policy.next(request.known), length)
            proposal = draft.propose(request, asked) if asked else None
            if proposal is not None:
                self._active = policy
                return proposal
        return None

    def record(self, drafted: int, accepted: int) -> None:
        self._active.record(self._known, drafted, accepted)
