"""Lossless speculative decoding: a draft is verified in one pass of the model, and what is drawn stays the same.

Greedy: drafted tokens are kept as long as they are the model's own choice. Sampled: token d drawn from q is kept
with probability min(1, p(d) / q(d)); at the first rejection a token is drawn from max(p - q, 0), normalised, and
after a wholly accepted draft one from p (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318). p and q
are the distributions after every sampling option, penalties included, so acceptance is sum(min(p, q)).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.cache import KVCache, step_caches
from openelm_mlx.decode import Drawn, Flight, State, StepSpec, flat, logprob_fields, read, submit
from openelm_mlx.drafts import Chain, Proposal, Request
from openelm_mlx.model import OpenELM
from openelm_mlx.sampling import ACCEPTING, NEVER, History, Logprobs, filter_logits, gumbel, keyed, logprobs

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine


@dataclass
class SpeculationCounts:
    """What speculation did: tokens drafted, tokens of them kept, passes of the target."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0


def speculate(
    engine: Engine,
    spec: StepSpec,
    state: State,
    caches: list[KVCache],
    prompt: list[int],
    draft: Chain,
    max_tokens: int,
    counts: SpeculationCounts,
) -> Generator[Drawn, None, None]:
    """Yield tokens like `decode.decode`, verifying drafts where there are any and stepping plainly, one token
    ahead, where there are none. On every way out the caches hold what was fed and nothing is in flight."""
    known, left, written = list(prompt), max_tokens, 0
    flight = Flight(engine.steps.get(spec), state, caches)
    try:
        submit(flight.state)
        unread = True  # the newest token is still being computed
        while True:
            if unread:
                ahead = left > 1 and not draft.hopeful(known)
                current = flight.state._replace(buffers=[])
                if ahead:
                    flight.advance()
                    counts.passes += 1
                drawn = read(current)
                known.append(drawn.token)
                left -= 1
                yield drawn
                if left == 0:
                    return
                if ahead:
                    continue
            request = Request(known, spec, flight.state.key, flight.state.history)
            proposal = draft.propose(request, left - 1) if left > 1 else None
            counts.passes += 1
            unread = proposal is None
            if proposal is None:
                flight.advance()
                continue
            drafted = proposal.tokens.size
            emitted = verify(engine, flight, spec, proposal)
            counts.drafted += drafted
            counts.accepted += len(emitted) - 1
            written = flight.fed + drafted
            draft.record(drafted, len(emitted) - 1)
            for drawn in emitted:
                known.append(drawn.token)
                left -= 1
                yield drawn
            if left == 0:
                return
    finally:
        flight.land(written)


def verify(engine: Engine, flight: Flight, spec: StepSpec, proposal: Proposal) -> list[Drawn]:
    """One pass of the target over the newest token and the draft; the tokens it keeps, its own last one included."""
    length = proposal.tokens.size
    flight.reserve(length + 1)
    run = engine.steps.cached(
        ("verify", spec, length, proposal.logits is None), lambda: make_verify(engine.model, spec, length)
    )
    state = flight.state
    flight.state = state._replace(buffers=[])
    q = [] if proposal.logits is None else [proposal.logits]
    tokens, count, newest, position, history, detail, buffers = run(
        [state.token, proposal.tokens, q, state.position, state.key, flat(state.history), state.buffers]
    )
    del state
    flight.state = flight.state._replace(
        token=newest, position=position, history=History(*history) if history else None, buffers=buffers
    )
    mx.eval(tokens, count, detail)
    kept = int(count.item()) + 1
    flight.fed += kept
    found = Logprobs(*detail) if detail else None
    values: Any = tokens.tolist()
    return [Drawn(int(token), *logprob_fields(found, row)) for row, token in enumerate(values[:kept])]


def make_verify(model: OpenELM, spec: StepSpec, length: int) -> Callable[[list[Any]], Any]:
    """The pass and the decision as one function: tokens [length + 1], how many drafts are kept, and the state after."""

    def run(arrays: list[Any]) -> list[Any]:
        token, drafted, q, position, key, history, buffers = arrays
        caches = step_caches(buffers, position, spec.kind)
        hidden = model.hidden(mx.concatenate([token, drafted])[None], caches)
        logits = model.logits(hidden)[0, :, : spec.vocab].astype(mx.float32)  # [length + 1, vocab]
        seen = along(History(*history), drafted) if history else None
        scores = filter_logits(logits, spec.sampling, seen)
        if spec.sampling.greedy:
            tokens, count = keep_greedy(scores, drafted)
        else:
            tokens, count = keep_sampled(scores, drafted, q[0] if q else None, key, position)
        newest = mx.take(tokens, count[None])
        after = [] if seen is None else flat(History(*(mx.take(part, count[None], axis=0) for part in seen)).plus(newest))
        detail = None if spec.logprobs is None else logprobs(logits, tokens, spec.logprobs)
        return [tokens, count, newest, position + count + 1, after, flat(detail), [c.arrays for c in caches]]

    return mx.compile(run) if spec.compiled else run


def along(history: History, drafted: mx.array) -> History:
    """Return what the penalties look at before and after each token of a draft [k].

    The arrays of the result are [k + 1, vocab].
    """
    one = (mx.arange(history.seen.shape[1]) == drafted[:, None]).astype(mx.float32)
    counts = mx.concatenate([mx.zeros((1, one.shape[1])), mx.cumsum(one, axis=0)])
    return History(history.seen | (counts > 0), history.generated + counts)


def keep_greedy(scores: mx.array, drafted: mx.array) -> tuple[mx.array, mx.array]:
    """The model's own choices [k + 1], and how many drafted tokens agree with them from the first on."""
    tokens = mx.argmax(scores, axis=-1).astype(mx.uint32)
    agree = (tokens[:-1] == drafted).astype(mx.int32)
    return tokens, mx.cumprod(agree).sum()


def keep_sampled(
    scores: mx.array, drafted: mx.array, q_logits: mx.array | None, key: mx.array, position: mx.array
) -> tuple[mx.array, mx.array]:
    """Rejection sampling: tokens [k + 1] of which the first count + 1 are valid, and the count of drafts kept.

    `scores` [k + 1, vocab] are filtered logits of the target, `q_logits` [k, vocab] of the draft; None is a draft
    that was certain: q is 1 at its token.
    """
    k, vocab = drafted.size, scores.shape[1]
    p = mx.softmax(scores, axis=-1)
    one = mx.arange(vocab) == drafted[:, None]
    q = one.astype(mx.float32) if q_logits is None else mx.softmax(q_logits, axis=-1)
    p_drafted, q_drafted = (mx.where(one, x, 0.0).sum(axis=-1) for x in (p[:k], q))
    places = position + 1 + mx.arange(k)
    keys = mx.split(keyed(key, places, ACCEPTING), k)
    u = mx.concatenate([mx.random.uniform(shape=(1,), key=one[0]) for one in keys])
    count = mx.cumprod((u * q_drafted < p_drafted).astype(mx.int32)).sum()
    residual = mx.concatenate([mx.maximum(p[:k] - q, 0.0), p[k:]])
    row, own = (mx.take(x, count[None], axis=0) for x in (residual, p))  # [1, vocab]
    row = mx.where(row.sum() > 0, row, own)  # equal up to rounding: nothing is left, and p itself is right
    noise = gumbel(key, position + 1 + count, vocab)
    last = mx.argmax(mx.where(row > 0, mx.log(row), NEVER) + noise, axis=-1).astype(mx.uint32)
    return mx.where(mx.arange(k + 1) < count, mx.concatenate([drafted, drafted[-1:]]), last), count
