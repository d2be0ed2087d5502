"""Log probabilities of text, in nats.

The logits of a long text are never in memory all at once: they are made and used for `POSITIONS`
positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import logprobs
from openelm_mlx.engine.memory import chunk_for
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import PromptError
from openelm_mlx.evaluate.plan import Pass, Request, Tree, plan
from openelm_mlx.fields import check_count
from openelm_mlx.model.cache import KVCache, causal
from openelm_mlx.model.cache_kinds import CacheKind, Mask, halves, sdpa
from openelm_mlx.model.footprint import layers_at_once
from openelm_mlx.model.heads import Projection

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import TokenLogprobs


class Answer(NamedTuple):
    """The log-likelihood of a continuation, and whether greedy decoding gives exactly it."""

    logprob: float
    greedy: bool


POSITIONS = 256  # whose logits exist at one time: 33 MB for 32,000 ids


def log_probs(logits: mx.array) -> mx.array:
    """Return the logarithms, in float32, of the softmax over the last axis."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def perplexity_of(mean: float) -> float:
    """Return the perplexity of a mean negative log probability: infinite beyond float64."""
    return math.inf if mean > 700 else math.exp(mean)


def score(
    engine: Engine, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 4096
) -> list[list[float]]:
    """Return, for each sequence, the log probability (natural) of every token after its first.

    >>> score(engine, [engine.tokenizer.encode("Once upon a time")])
    [[-2.1, -0.3, ...]]

    They are those of the model itself, given all tokens before: what `logprobs` reports for a drawn
    token. An id that is never drawn has -inf. One pass of the model takes sequences of similar
    length, at most `batch_tokens` with their padding, or a single longer one; the choice changes
    the numbers by rounding only. Raises `PromptError`, before any work, for a sequence that
    is empty or beyond the model's context, and for ids outside the vocabulary.
    """
    check_loaded("engine", engine)
    check_count("batch_tokens", batch_tokens, 1)
    if isinstance(sequences, (str, bytes)):
        raise PromptError("sequences is one text; give a list, also for a single one: [text]")
    checked = []
    for number, sequence in enumerate(sequences, 1):
        try:
            checked.append(prompt_tokens(engine, sequence))
        except PromptError as error:
            raise PromptError(f"sequence {number}: {error}") from None
    scores: list[list[float]] = [[] for _ in checked]
    longer = [number for number, tokens in enumerate(checked) if len(tokens) > 1]
    requests = [Request(tuple(checked[n][:1]), tuple(checked[n][1:])) for n in longer]
    scorer = Scorer(engine)
    for work in plan(requests, batch_tokens):
        found = scorer.by_token(requests, work)
        for number, (row, _) in zip(work.requests, found, strict=True):
            scores[longer[number]] = row
    return scores


class Scorer:
    """Answers requests with the model of an engine, pass by pass.

    It keeps the keys and values of the last prefix: passes that share one follow each other.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.prefix: tuple[int, ...] = ()
        self.before: list[mx.array] = []  # from `keys_and_values`

    def run(self, requests: Sequence[Request], work: Pass) -> list[Answer]:
        """Return the answers to `work.requests`, in their order."""
        return [
            Answer(math.fsum(scores), all(best)) for scores, best in self.by_token(requests, work)
        ]

    @device_work
    def by_token(
        self, requests: Sequence[Request], work: Pass
    ) -> list[tuple[list[float], list[bool]]]:
        """Return, for each of `work.requests`, the log probability of every token of its
        continuation, and whether it is the likeliest there.
        """
        asked = [requests[number] for number in work.requests]
        fed = [request.fed for request in asked]
        prefix, left = fed[0][: work.prefix], iter(fed)
        trees = [
            Tree.of([sequence[work.prefix :] for sequence in islice(left, size)])
            for size in work.rows
        ]
        length = max(len(tree.tokens) for tree in trees)
        hidden = self.hidden(prefix, trees, length).reshape(len(trees) * length, -1)
        paths = (
            [row * length + place for place in path]
            for row, tree in enumerate(trees)
            for path in tree.paths
        )
        wanted = [
            (place, token)
            for path, request in zip(paths, asked, strict=True)
            for place, token in zip(
                path[len(request.context) - 1 - work.prefix :], request.continuation, strict=True
            )
        ]
        found = iter(self.predictions(hidden, wanted))
        rows = ([next(found) for _ in request.continuation] for request in asked)
        return [([score for score, _ in row], [best for _, best in row]) for row in rows]

    def hidden(self, prefix: tuple[int, ...], trees: Sequence[Tree], length: int) -> mx.array:
        """Return the hidden states of the tokens of trees, [trees, length, model_dim]."""
        model, layers = self.engine.model, len(self.engine.model.layers)
        before: list[Any] = self.keys_and_values(prefix) if prefix else [None] * layers
        size = len(trees) * length
        # as often as a prompt is, and so that no more is in memory than a chunk of one takes
        fits = layers * chunk_for(self.engine, CacheKind()) // size
        every = max(1, min(layers_at_once(model, size) or layers, fits))
        tokens = mx.array([tree.tokens + [0] * (length - len(tree.tokens)) for tree in trees])
        forest = Forest.of(trees, length, len(prefix))
        caches = [
            TreeCache(forest, array, number % every == 0 and number < layers)
            for number, array in enumerate(before, 1)
        ]
        return model.hidden(tokens, caches)

    def keys_and_values(self, prefix: tuple[int, ...]) -> list[mx.array]:
        """Return those of a prefix in each layer, [2, 1, kv_heads, tokens, head_dim]."""
        if prefix != self.prefix:
            self.prefix, self.before, cache = (), [], KVCache(self.engine.config)
            chunk = chunk_for(self.engine, cache.kind)
            for start in range(0, len(prefix), chunk):
                part = mx.array([prefix[start : start + chunk]])
                self.engine.model.hidden(part, cache, last=True)
                mx.eval(cache.arrays)
            exact = cache.row(0, len(prefix))  # without the slots that are still free
            self.prefix, self.before = prefix, [array for (array,) in exact.arrays]
        return self.before

    def predictions(
        self, hidden: mx.array, wanted: Sequence[tuple[int, int]]
    ) -> list[tuple[float, bool]]:
        """Return the log probability of each token that is `wanted` at a place of hidden states
        [places, model_dim], and whether it is the likeliest there.

        Each place goes through the head once, however many tokens are wanted there.
        """
        model, vocab = self.engine.model, self.engine.vocab
        at = dict[int, list[int]]()
        for number, (place, _) in enumerate(wanted):
            at.setdefault(place, []).append(number)
        places, found = list(at), [(0.0, False)] * len(wanted)
        for start in range(0, len(places), POSITIONS):
            part = places[start : start + POSITIONS]
            numbers = [number for place in part for number in at[place]]
            rows = mx.array([row for row, place in enumerate(part) for _ in at[place]])
            tokens = mx.array([wanted[number][1] for number in numbers])
            logits = model.logits(hidden[mx.array(part)])[:, :vocab].astype(mx.float32)
            known = mx.minimum(tokens, vocab - 1)
            scores = logits[rows, known] - mx.logsumexp(logits, axis=-1)[rows]
            scores = mx.where(tokens < vocab, scores, -mx.inf)
            best = logits.argmax(axis=-1)[rows] == tokens
            both: Any = zip(scores.tolist(), best.tolist(), strict=True)  # type: ignore[arg-type]
            for number, pair in zip(numbers, both, strict=True):
                found[number] = pair
        return found


class Forest(NamedTuple):
    """The trees of a pass, as the model sees them in every layer."""

    positions: mx.array  # [trees, length]
    mask: Mask  # [trees, 1, length, prefix + length]: who sees whom

    @classmethod
    def of(cls, trees: Sequence[Tree], length: int, prefix: int) -> Forest:
        """Return the trees padded to `length`, after a prefix of so many tokens."""
        numbers = mx.arange(length)
        if not any(tree.branches for tree in trees):
            return cls(prefix + numbers[None], causal(length))
        depths = [tree.depths + [0] * (length - len(tree.depths)) for tree in trees]
        ends = [tree.ends + [length] * (length - len(tree.ends)) for tree in trees]
        before, last = numbers[:, None], mx.array(ends)[:, None, :]
        own = (numbers <= before) & (before < last)
        mask = mx.concatenate([mx.ones((len(trees), length, prefix), mx.bool_), own], axis=-1)
        return cls(prefix + mx.array(depths), mask[:, None])


class TreeCache:
    """One layer's cache for a pass over trees, which keeps nothing."""

    def __init__(self, forest: Forest, before: mx.array | None, waits: bool) -> None:
        self.forest, self.before, self.waits = forest, before, waits

    def positions(self, length: int) -> mx.array:
        return self.forest.positions

    def mask(self, length: int) -> Mask:
        return self.forest.mask

    def attend(self, projection: Projection, mask: Mask, scale: float) -> mx.array:
        q, kv = projection.heads()
        if self.before is not None:
            shape = (2, kv.shape[1], *self.before.shape[2:])
            kv = mx.concatenate([mx.broadcast_to(self.before, shape), kv], axis=-2)
        out = sdpa(q, *halves(kv), mask, scale)
        if self.waits:
            mx.eval(out)
        return out


def check_requests(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise `PromptError` for a request without a context or a continuation, for ids outside the
    vocabulary, and for tokens beyond the model's context, of which the last needs no place.
    """
    limit, vocab = engine.config.max_context_length, engine.config.vocab_size
    for number, (context, continuation) in enumerate(requests, 1):
        for name, ids in (("context", context), ("continuation", continuation)):
            if not ids:
                raise PromptError(f"request {number}: the {name} is empty; give at least one token")
            if wrong := [token for token in ids if not 0 <= token < vocab]:
                what = f"token id {wrong[0]} is outside the vocabulary of {vocab}"
                raise PromptError(f"request {number}: {what}")
        if (fed := len(context) + len(continuation) - 1) > limit:
            what = f"the model is fed {fed} tokens; its context is {limit}"
            raise PromptError(f"request {number}: {what}. Shorten the context")


@device_work
def likeliest(engine: Engine, tokens: list[int], top: int) -> list[TokenLogprobs]:
    """Return, for every token after the first, its log probability and pairs of the likeliest ones.

    They are what an event has as `logprob` and `top_logprobs`: `top` pairs (token, log
    probability), the likeliest first. Fewer than two tokens have none.
    """
    if len(tokens) < 2:
        return []
    targets = mx.array(tokens[1:])
    hidden = engine.model.hidden(mx.array([tokens[:-1]])).squeeze(0)
    found: list[TokenLogprobs] = []
    for start in range(0, targets.size, POSITIONS):
        part = targets[start : start + POSITIONS]
        logits = engine.model.logits(hidden[start : start + POSITIONS])[:, : engine.vocab]
        known = mx.minimum(part, engine.vocab - 1)
        chosen, ids, values = logprobs(logits.astype(mx.float32), known, top)
        chosen = mx.where(part < engine.vocab, chosen, -mx.inf)
        rows: Any = zip(chosen.tolist(), ids.tolist(), values.tolist(), strict=True)  # type: ignore[arg-type]
        found += [(own, tuple(zip(row[:top], best[:top], strict=True))) for own, row, best in rows]
    return found
