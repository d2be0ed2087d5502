"""The distance of one model's predictions from another's: divergence, agreement, perplexities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.memory import check_memory
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import TokenizerError
from openelm_mlx.evaluate.options import TextOptions
from openelm_mlx.evaluate.perplexity import (
    block_starts,
    check_finite,
    encode,
    interval,
    resampled,
    text_batches,
    window,
)
from openelm_mlx.evaluate.plan import rows_of_a_pass
from openelm_mlx.evaluate.run import Progress
from openelm_mlx.evaluate.score import POSITIONS, log_probs, perplexity_of

if TYPE_CHECKING:
    import numpy as np

    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.model.decoder import OpenELM

Model = Callable[[mx.array], mx.array]  # ids [rows, length] -> logits [rows, length, vocab]


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


@dataclass(frozen=True)
class Comparison:
    """The distance of a model from a reference, over positions of text.

    The divergence is KL(reference || model) and the agreement that of the likeliest token, at every
    position; a perplexity is over the tokens that have another before them. `perplexity_ratio` is
    that of the model divided by the reference's: its interval is narrow, as both read each block.
    `intervals_95` has the 95 % confidence interval of a figure by its name, or nothing for a text
    too short for one.
    """

    tokens: int
    mean_kl_divergence: float
    p99_kl_divergence: float
    top_1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
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


@device_work
def compare_engines(
    reference: Engine,
    other: Engine,
    texts: Sequence[str],
    options: TextOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Comparison:
    """Compare a model, say a quantized one, with a reference, say its original, on texts.

    Both are in memory, and read the same windows, which do not overlap. `progress` is told how many
    windows are read, of how many, and how many tokens, of how many. Raises `TokenizerError` for
    models whose ids do not stand for the same texts, and the errors of `text_perplexity`.
    """
    options = TextOptions() if options is None else options
    check_loaded("reference", reference)
    check_loaded("other", other)
    check_same_pieces(reference, other)
    both = f"{reference.name} and {other.name}"
    check_memory(both, other.config, reference.nbytes + other.nbytes, quantized=True)
    length, _ = window(options, reference, other)
    most, bos = options.batch_tokens, reference.tokenizer.bos_id
    rows = rows_of_a_pass([length] * max(1, most // length), 0, most)
    known = [
        batch for ids in encode(reference, texts) for batch in text_batches(ids, length, rows, bos)
    ]

    def batches() -> Iterator[mx.array]:
        windows, tokens = 0, 0
        for batch in known:
            yield batch
            windows, tokens = windows + len(batch), tokens + batch.size
            if progress is not None:
                progress(windows, sum(map(len, known)), tokens, sum(each.size for each in known))

    models = reference.model, other.model
    found = compare(*models, batches(), vocab=min(reference.vocab, other.vocab))
    check_finite(reference.name, found.reference_perplexity)
    check_finite(other.name, found.perplexity)
    return found


def check_same_pieces(reference: Engine, other: Engine) -> None:
    """Raise `TokenizerError` for models whose predictions are of different things."""
    if not reference.tokenizer.same_pieces(other.tokenizer):
        sizes = [f"{one.tokenizer.vocab_size:,} pieces" for one in (reference, other)]
        raise TokenizerError(
            f"{reference.name} and {other.name} have different tokenizers, of {sizes[0]} and "
            f"{sizes[1]}, so that their predictions cannot be compared; give two forms of one model"
        )


LABELS = {
    "mean_kl_divergence": "mean KL divergence",
    "p99_kl_divergence": "99th percentile of KL divergence",
    "top_1_agreement": "agreement of the likeliest token",
    "reference_perplexity": "perplexity of the original",
    "perplexity_of_source": "perplexity of the source",
}


def label(name: str) -> str:
    """Return what a figure is called where it is shown."""
    return LABELS.get(name, name.replace("_", " "))


def rounded(value: float, digits: int) -> str:
    """Return a number with this many significant digits; a large one has commas, no exponent."""
    text = f"{value:.{digits}g}"
    return text if abs(value) < 1000 else f"{float(text):,.15g}"


def with_interval(figures: Mapping[str, Any], name: str) -> str:
    """Return a figure as text, with its 95 % confidence interval if any, whose ends differ."""
    value = figures[name]
    text = f"{value:,}" if isinstance(value, int) else rounded(value, 6)
    if name not in figures["intervals_95"]:
        return text
    low, high = figures["intervals_95"][name]
    digits = 3
    if low < high < math.inf:  # two of the width are shown
        digits = max(3, 2 + math.floor(math.log10(high)) - math.floor(math.log10(high - low)))
    return f"{text} (95 %: {rounded(low, digits)} to {rounded(high, digits)})"


def losses_shown(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the label of every figure of a comparison, and its value with its interval."""
    names = [name for name in figures if name != "intervals_95"]
    return [(label(name), with_interval(figures, name)) for name in names]


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
        perplexity=perplexity_of(float(theirs.mean())),
        reference_perplexity=perplexity_of(float(ours.mean())),
        perplexity_ratio=perplexity_of(float((theirs - ours).mean())),
        max_logit_difference=float(difference.max()),
        intervals_95=intervals(found),
    )


def intervals(rows: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return 95 % confidence intervals of means over text, given rows of float64 [4, positions]:
    divergence, agreement, and the negative log probability of the next token under the reference
    and under the other model, which a row's last position lacks.

    `resampled` says how. A text too short for it has none.
    """
    import numpy as np

    sums, sizes = [], []
    for row in rows:
        length = row.shape[1]
        starts = block_starts(length)
        counts = np.tile(np.diff(starts, append=length), (4, 1))
        values = row[:4].copy()
        values[2:, -1], counts[2:, -1] = 0, counts[2:, -1] - 1
        sums.append(np.add.reduceat(values, starts, axis=1))
        sizes.append(counts)
    draws = resampled(np.concatenate(sums, axis=1), np.concatenate(sizes, axis=1))
    if draws is None:
        return {}
    kl, same, ours, theirs = draws.T

    def perplexities(draws: np.ndarray) -> tuple[float, float]:
        low, high = interval(draws)
        return perplexity_of(low), perplexity_of(high)

    return {
        "mean_kl_divergence": interval(kl),
        "top_1_agreement": interval(same),
        "perplexity": perplexities(theirs),
        "reference_perplexity": perplexities(ours),
        "perplexity_ratio": perplexities(theirs - ours),
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
