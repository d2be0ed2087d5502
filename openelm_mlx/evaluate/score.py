"""Log probabilities of text, in nats.

The logits of a long text are never in memory all at once: they are made and used for `POSITIONS`
positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import logprobs
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import PromptError
from openelm_mlx.evaluate.plan import Pass, Request, plan
from openelm_mlx.fields import check_count

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


def perplexity(log_probabilities: Iterable[float]) -> float:
    """Return the exponential of the mean negative log probability."""
    scores = list(log_probabilities)
    return exponential(-math.fsum(scores) / len(scores))


def exponential(mean: float) -> float:
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
    for batch in batches([len(tokens) - 1 for tokens in checked], batch_tokens):
        for number, row in zip(
            batch, score_batch(engine, [checked[n] for n in batch]), strict=True
        ):
            scores[number] = row
    return scores


class Scorer:
    """Answers requests with the model of an engine, pass by pass."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @device_work
    def run(self, requests: Sequence[Request], work: Pass) -> list[Answer]:
        """Return the answers to `work.requests`, in their order."""
        engine, asked = self.engine, [requests[number] for number in work.requests]
        length = max(len(request.fed) for request in asked)
        fed = mx.array([[*one.fed, *[0] * (length - len(one.fed))] for one in asked])
        hidden = engine.model.hidden(fed)
        found = []
        for row, one in zip(hidden, asked, strict=True):
            states = row[len(one.context) - 1 : len(one.fed)]
            logits = engine.model.logits(states)[:, : engine.vocab]
            targets = mx.array(one.continuation)
            chosen = mx.take_along_axis(log_probs(logits), targets[:, None], axis=-1)
            greedy = (logits.argmax(axis=-1) == targets).all()
            found.append(Answer(math.fsum(chosen[:, 0].tolist()), bool(greedy.item())))  # type: ignore[arg-type]
        return found


def loglikelihoods(
    engine: Engine, requests: Sequence[Request], *, batch_tokens: int = 4096
) -> list[Answer]:
    """Return the log-likelihood of each request's continuation after its context, in nats."""
    answers: dict[int, Answer] = {}
    scorer = Scorer(engine)
    for work in plan(requests, batch_tokens):
        answers.update(zip(work.requests, scorer.run(requests, work), strict=True))
    return [answers[number] for number in range(len(requests))]


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


def batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences that share a pass, the longest first, without empty ones."""
    order = sorted((n for n, length in enumerate(lengths) if length), key=lambda n: -lengths[n])
    while order:
        count = max(1, tokens // lengths[order[0]])
        yield order[:count]
        del order[:count]


@device_work
def score_batch(engine: Engine, rows: list[list[int]]) -> list[list[float]]:
    """Score sequences of two tokens or more in one pass; no token sees the padding at the end."""
    lengths = [len(row) - 1 for row in rows]
    longest = max(lengths)
    fed = mx.array([row[:-1] + [0] * (longest + 1 - len(row)) for row in rows])
    hidden = engine.model.hidden(fed).reshape(len(rows) * longest, -1)
    places = mx.array([n * longest + i for n, length in enumerate(lengths) for i in range(length)])
    targets = mx.array([token for row in rows for token in row[1:]])
    found: list[float] = []
    for start in range(0, targets.size, POSITIONS):
        part = slice(start, start + POSITIONS)
        logp = log_probs(engine.model.logits(hidden[places[part]])[:, : engine.vocab])
        known = mx.minimum(targets[part], engine.vocab - 1)[:, None]
        chosen = mx.take_along_axis(logp, known, axis=-1)[:, 0]
        found += mx.where(targets[part] < engine.vocab, chosen, -mx.inf).tolist()  # type: ignore[arg-type]
    rest = iter(found)
    return [[next(rest) for _ in range(length)] for length in lengths]
