"""Log probabilities of text, and the divergence of one model from another, in nats.

The logits of a long text are never in memory all at once: they are made and used for `POSITIONS`
positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import logprobs
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import PromptError
from openelm_mlx.fields import check_count

if TYPE_CHECKING:
    import numpy as np

    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.request import TokenLogprobs
    from openelm_mlx.model.decoder import OpenELM

POSITIONS = 256  # whose logits exist at one time: 33 MB for 32,000 ids
BLOCK, FEWEST_BLOCKS, RESAMPLES = 128, 8, 1000  # of the intervals: see `intervals`
Model = Callable[[mx.array], mx.array]  # ids [rows, length] -> logits [rows, length, vocab]


def log_probs(logits: mx.array) -> mx.array:
    """Return the logarithms, in float32, of the softmax over the last axis."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def kl_divergence(reference: mx.array, other: mx.array) -> mx.array:
    """Return KL(reference || other) at each position, from finite logits [..., vocab] of both.

    It is the sum of p (d + expm1(-d)) with d = log p - log q. This equals the sum of p d, as p and
    q both sum to 1, but none of its terms is negative: nothing cancels, so that a divergence of
    1e-7 is right to a few digits in float32. Gradients flow to `other`; `reference` is a constant.
    """
    found: Any = divergence(reference.astype(mx.float32), other.astype(mx.float32))
    return found  # type: ignore[no-any-return]


@mx.custom_function
def divergence(reference: mx.array, other: mx.array) -> mx.array:
    flat = [logits.reshape(-1, logits.shape[-1]) for logits in (reference, other)]
    parts = []
    for start in range(0, len(flat[0]), POSITIONS):
        a, b = (logits[start : start + POSITIONS] for logits in flat)
        norm_a, norm_b = (mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (a, b))
        p, q = mx.exp(a - norm_a), mx.exp(b - norm_b)
        d = (a - b) - (norm_a - norm_b)  # like logits first: their difference is nearly exact
        terms = p * mx.maximum(d + mx.expm1(-d), 0)
        far = q + p * (d - 1)  # as good below -1, where expm1 may overflow
        parts.append(mx.where(d >= -1, terms, far).sum(axis=-1))
    return mx.concatenate(parts).reshape(reference.shape[:-1])


@divergence.vjp
def gradient(
    logits: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    p, q = (mx.softmax(x, axis=-1, precise=True) for x in logits)
    return mx.zeros_like(p), cotangent[..., None] * (q - p)


def top_1_agreement(reference: mx.array, other: mx.array) -> mx.array:
    """Return, for each position, whether the likeliest token of both [..., vocab] is the same."""
    return reference.argmax(axis=-1) == other.argmax(axis=-1)


def perplexity(log_probabilities: Iterable[float]) -> float:
    """Return the exponential of the mean negative log probability."""
    scores = list(log_probabilities)
    return exponential(-math.fsum(scores) / len(scores))


def exponential(mean: float) -> float:
    """Return the perplexity of a mean negative log probability: infinite beyond float64."""
    return math.inf if mean > 700 else math.exp(mean)


@dataclass(frozen=True)
class Comparison:
    """The distance of a model from a reference, over positions of text.

    The divergence is KL(reference || model) and the agreement that of the likeliest token, at every
    position; a perplexity is over the tokens that have another before them. `intervals_95` has the
    95 % confidence interval of a figure by its name, or nothing for a text too short for one.
    """

    tokens: int
    mean_kl_divergence: float
    p99_kl_divergence: float
    top_1_agreement: float
    perplexity: float
    reference_perplexity: float
    max_logit_difference: float
    intervals_95: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compare(
    reference: Model,
    other: Model,
    batches: Iterable[mx.array],
    *,
    vocab: int | None = None,
    first: int = 0,
) -> Comparison:
    """Compare two models on batches of token ids [rows, length].

    Ids from `vocab` on are left out of the distributions, and positions before `first` out of the
    figures.
    """
    parts = ((tokens, pieces(reference, tokens), pieces(other, tokens)) for tokens in batches)
    return compare_logits(parts, vocab=vocab, first=first)


def compare_logits(
    parts: Iterable[tuple[mx.array, Iterable[mx.array], Iterable[mx.array]]],
    *,
    vocab: int | None = None,
    first: int = 0,
) -> Comparison:
    """Compare two models, given batches of ids [rows, length], each with the float32 logits
    [positions, vocab] of both models in pieces, row after row.
    """
    import numpy as np

    found: list[np.ndarray] = []
    for tokens, *logits in parts:
        figures, start = [], 0
        targets = mx.pad(tokens[:, 1:], [(0, 0), (0, 1)]).reshape(-1)  # the last position has none
        for a, b in zip(*logits, strict=True):
            a, b, end = a[:, :vocab], b[:, :vocab], start + len(a)
            chosen = targets[start:end, None]
            scores = [-mx.take_along_axis(log_probs(x), chosen, axis=-1)[:, 0] for x in (a, b)]
            largest = mx.abs(a - b).max(axis=-1)
            row = kl_divergence(a, b), top_1_agreement(a, b), *scores, largest
            figures.append(np.array(mx.stack([figure.astype(mx.float32) for figure in row])))
            start = end
        rows = np.concatenate(figures, axis=1).reshape(5, *tokens.shape)
        found += list(rows[:, :, first:].swapaxes(0, 1).astype(np.float64))
    kl, same, ours, theirs, difference = np.concatenate(found, axis=1)
    last = np.cumsum([row.shape[1] for row in found]) - 1  # of each row, which predicts no token
    ours, theirs = np.delete(ours, last), np.delete(theirs, last)
    return Comparison(
        tokens=ours.size,
        mean_kl_divergence=float(kl.mean()),
        p99_kl_divergence=float(np.quantile(kl, 0.99)),
        top_1_agreement=float(same.mean()),
        perplexity=exponential(float(theirs.mean())),
        reference_perplexity=exponential(float(ours.mean())),
        max_logit_difference=float(difference.max()),
        intervals_95=intervals(found),
    )


def intervals(rows: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return 95 % confidence intervals of means over text, given rows of float64 [4, positions]:
    divergence, agreement, and the negative log probability of the next token under the reference
    and under the other model, which a row's last position lacks.

    Neighbouring positions are alike, so blocks of some `BLOCK` positions are drawn, not positions:
    the bootstrap of H. R. Kuensch, "The jackknife and the bootstrap for general stationary
    observations", Annals of Statistics 17 (1989), with blocks that neither overlap nor span two
    rows. An interval is between the 2.5th and the 97.5th percentile of the means of `RESAMPLES`
    draws, the same on every run. It speaks of the kind of text that was read, not of others. With
    fewer than `FEWEST_BLOCKS` blocks none is returned.
    """
    import numpy as np

    sums, sizes = [], []
    for row in rows:
        length = row.shape[1]
        starts = np.linspace(0, length, max(1, round(length / BLOCK)), endpoint=False).astype(int)
        counts = np.tile(np.diff(starts, append=length), (4, 1))
        values = row[:4].copy()
        values[2:, -1], counts[2:, -1] = 0, counts[2:, -1] - 1
        sums.append(np.add.reduceat(values, starts, axis=1))
        sizes.append(counts)
    total, count = np.concatenate(sums, axis=1), np.concatenate(sizes, axis=1)
    blocks = total.shape[1]
    if blocks < FEWEST_BLOCKS:
        return {}
    random = np.random.RandomState(0)  # NumPy keeps this generator's numbers for good
    draws = (random.randint(blocks, size=blocks) for _ in range(RESAMPLES))
    means = [total[:, drawn].sum(axis=1) / count[:, drawn].sum(axis=1) for drawn in draws]
    kl, same, ours, theirs = np.quantile(means, (0.025, 0.975), axis=0).T.tolist()
    return {
        "mean_kl_divergence": (kl[0], kl[1]),
        "top_1_agreement": (same[0], same[1]),
        "perplexity": (exponential(theirs[0]), exponential(theirs[1])),
        "reference_perplexity": (exponential(ours[0]), exponential(ours[1])),
    }


def pieces(model: Model, tokens: mx.array) -> Iterator[mx.array]:
    """Yield the logits of ids [rows, length] as float32 [positions, vocab], row after row.

    OpenELM's head is run for each piece by itself; any other model gives all logits first.
    """
    from openelm_mlx.model.decoder import OpenELM

    if isinstance(model, OpenELM):
        states = model.hidden(tokens)
    else:
        states = model(tokens)
    states = states.reshape(tokens.size, -1)
    for start in range(0, tokens.size, POSITIONS):
        piece = states[start : start + POSITIONS]
        yield (model.logits(piece) if isinstance(model, OpenELM) else piece).astype(mx.float32)


def own_text(
    model: OpenELM,
    prompts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    banned: mx.array | None = None,
) -> mx.array:
    """Return rows of ids [prompts, length] that the model writes after each prompt.

    Tokens are drawn at temperature 1 without any filter, and are the same on every run. `banned`,
    [vocab] or [prompts, vocab], is added to the logits: -inf for what is never drawn.
    """
    from openelm_mlx.model.cache import KVCache

    cache, key = KVCache(model.args), mx.random.key(seed)
    done = [mx.array([ids[:1] for ids in prompts], dtype=mx.int32)]
    for position in range(1, length):
        logits = model(done[-1], cache)[:, -1].astype(mx.float32)
        key, draw = mx.random.split(key)
        drawn = mx.random.categorical(logits if banned is None else logits + banned, key=draw)
        given = [ids[position] if position < len(ids) else -1 for ids in prompts]
        known = mx.array(given, dtype=mx.int32)
        done.append(mx.where(known < 0, drawn.astype(mx.int32), known)[:, None])
        mx.eval(done[-1])
    return mx.concatenate(done, axis=1)


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
