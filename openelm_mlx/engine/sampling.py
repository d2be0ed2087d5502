"""From logits to the next token, on the device, for rows that each have their own options.

Which filters are on (`Filters`) is part of what a step is traced for; their values (`Controls`) are
arrays, one a row. A row for which a filter is off has a value there that changes nothing, bit for
bit, so that it gets the token it would get alone. `filter_logits` states the order of the filters.

Randomness is a pure function of seed, stream and position in the text, counted from BOS: the noise
for a token does not depend on chunking, batching, caching, drafts or how many tokens were drawn
before, so a seed always gives the same text. Seed and stream are hashed: those of adjacent ones
have nothing in common.
"""

from __future__ import annotations

import math
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import OptionError

NEVER = -float("inf")
SHORTLISTS = (64, 1024)  # few, as each is a trace of its own
COLD = 1e-30  # the temperature of a greedy choice: whatever is below the highest is out of reach
EXCLUDING = 0x9E3779B9  # what randomness is for, where it is not the draw
NOWHERE = -(2**31)  # an empty place of a penalty window: no token, of neither prompt nor answer


@dataclass(frozen=True)
class Filters:
    """Which options of sampling any row uses. Without any, a token is the argmax of the logits."""

    sampled: bool = False
    top_k: bool = False
    shortlist: int = 0  # top-k leaves every row that samples at most so many; 0 where not
    top_p: bool = False
    min_p: bool = False
    xtc: bool = False
    repetition: bool = False
    counts: bool = False  # presence or frequency penalties
    bias: bool = False
    window: int = 0  # of the penalties, in tokens, a power of two; 0 where all see the whole text
    masked: bool = False  # a grammar forbids tokens
    processors: tuple[Callable[..., mx.array], ...] = ()

    @classmethod
    def of(cls, rows: Iterable[SamplingOptions], masked: bool = False) -> Filters:
        """What these rows need, together."""
        rows = list(rows)
        warm = [o for o in rows if not o.greedy]  # the others ignore what is drawn from
        fewest, most = (pick((o.top_k for o in warm), default=0) for pick in (min, max))
        window = max((o.penalty_window for o in rows), default=0)
        return cls(
            sampled=bool(warm),
            top_k=any(o.top_k for o in warm),
            shortlist=next((n for n in SHORTLISTS if fewest > 0 and most <= n), 0),
            top_p=any(o.top_p < 1.0 for o in warm),
            min_p=any(o.min_p for o in warm),
            xtc=any(o.xtc_probability for o in warm),
            repetition=any(o.repetition_penalty != 1.0 for o in rows),
            counts=any(o.presence_penalty or o.frequency_penalty for o in rows),
            bias=any(o.logit_bias for o in rows),
            window=1 << (window - 1).bit_length() if window else 0,
            masked=masked,
            processors=tuple(dict.fromkeys(o.processor for o in rows if o.processor is not None)),
        )

    def beside(self, held: Filters) -> Filters:
        """Return these with those held for other rows: fewer sets occur, so fewer steps are
        traced.
        """
        own = ("shortlist", "masked", "processors")
        names = [item.name for item in fields(self) if item.name not in own]
        every = any(one.sampled and not one.shortlist for one in (self, held))
        shortlist = 0 if every else max(self.shortlist, held.shortlist)
        both = {name: max(getattr(self, name), getattr(held, name)) for name in names}
        return replace(self, shortlist=shortlist, **both)

    @property
    def penalised(self) -> bool:
        return self.repetition or self.counts


class Controls(NamedTuple):
    """The values of the options, one a row [B]; None where no row uses them."""

    temperature: mx.array | None = None  # COLD where greedy
    top_k: mx.array | None = None  # int32
    top_p: mx.array | None = None
    min_p: mx.array | None = None  # as the gap that it allows, -log(min_p)
    xtc_probability: mx.array | None = None
    xtc_threshold: mx.array | None = None
    repetition: mx.array | None = None
    presence: mx.array | None = None
    frequency: mx.array | None = None
    bias: mx.array | None = None  # [B, vocab]
    processor: mx.array | None = None  # int32, index into the filters' processors, -1 for none

    @classmethod
    def of(cls, rows: Sequence[SamplingOptions | None], filters: Filters, vocab: int) -> Controls:
        """The values for these rows; None is a row that is not in use."""
        given = [SamplingOptions() if o is None else o for o in rows]
        places: dict[Any, int] = {each: index for index, each in enumerate(filters.processors)}

        def column(on: bool, value: Callable[[SamplingOptions], float]) -> mx.array | None:
            return mx.array([value(o) for o in given]) if on else None

        return cls(
            column(filters.sampled, lambda o: COLD if o.greedy else o.temperature),
            column(filters.top_k, lambda o: 1 if o.greedy else min(o.top_k, vocab) or vocab),
            column(filters.top_p, lambda o: o.top_p if o.top_p < 1.0 else math.inf),
            column(filters.min_p, lambda o: -math.log(o.min_p) if o.min_p else math.inf),
            column(filters.xtc, lambda o: o.xtc_probability),
            column(filters.xtc, lambda o: o.xtc_threshold),
            column(filters.repetition, lambda o: o.repetition_penalty),
            column(filters.counts, lambda o: o.presence_penalty),
            column(filters.counts, lambda o: o.frequency_penalty),
            mx.stack([biases(o, vocab) for o in given]) if filters.bias else None,
            column(bool(places), lambda o: places.get(o.processor, -1)),
        )

    def repeated(self, times: int) -> Controls:
        """Row 0 so many times, then row 1, and so on: for several tokens of each row in a pass."""
        return Controls(*(None if a is None else mx.repeat(a, times, axis=0) for a in self))


def biases(options: SamplingOptions, vocab: int) -> mx.array:
    row: Any = array("f", bytes(4 * vocab))
    for token, bias in options.logit_bias:
        row[token] = bias
    return mx.array(row)


class History(NamedTuple):
    """What the penalties look at, per row: how often each token stands in text and answer.

    A row with a penalty window counts its latest tokens only; `latest` knows which leaves next.
    """

    text: mx.array | None  # [B, vocab] int32, prompt and answer
    answer: mx.array | None  # [B, vocab] int32
    # [B, window] int32, newest last: t of the answer, -1 - t of the prompt, or NOWHERE
    latest: mx.array | None
    window: mx.array | None  # [B] int32, 0 where the whole text counts

    @classmethod
    def of(
        cls,
        prompt: list[int],
        answer: list[int],
        o: SamplingOptions | None,
        filters: Filters,
        vocab: int,
    ) -> History | None:
        """The history of one row after these tokens; None where no penalty is in use."""
        if not filters.penalised:
            return None
        size = o.penalty_window if o else 0
        signed = [-1 - token for token in prompt] + answer
        counted = signed[-size:]  # all of them where size is 0
        of_answer = [token for token in counted if token >= 0]
        of_text = [token if token >= 0 else -1 - token for token in counted]
        empty = [NOWHERE] * filters.window
        return cls(
            counts(of_text, vocab) if filters.repetition else None,
            counts(of_answer, vocab) if filters.counts else None,
            mx.array([(empty + signed)[-filters.window :]], mx.int32) if filters.window else None,
            mx.array([size], mx.int32) if filters.window else None,
        )

    def plus(self, tokens: mx.array) -> History:
        """After one more token a row, tokens [B]."""
        text, answer, latest, window = self
        entering = tokens[:, None].astype(mx.int32)
        if text is not None:
            text = text + (numbers(text.shape[1]) == entering)
        if answer is not None:
            answer = answer + (numbers(answer.shape[1]) == entering)
        if latest is None or window is None:
            return History(text, answer, latest, window)
        places = ((latest.shape[1] - window) % latest.shape[1])[:, None]
        oldest = mx.take_along_axis(latest, places, axis=1)
        leaving = mx.where(window[:, None] > 0, oldest, NOWHERE)
        if text is not None:
            of_text = mx.where(leaving < 0, -1 - leaving, leaving)
            text = text - (numbers(text.shape[1]) == of_text)
        if answer is not None:
            answer = answer - (numbers(answer.shape[1]) == leaving)
        return History(text, answer, mx.concatenate([latest[:, 1:], entering], axis=1), window)


def counts(tokens: list[int], vocab: int) -> mx.array:
    """How often each token of the vocabulary is among these, [1, vocab] int32."""
    found: Any = array("i", bytes(4 * vocab))
    for token in tokens:
        if token < vocab:
            found[token] += 1
    return mx.array(found)[None]


def filter_logits(
    logits: mx.array,
    filters: Filters,
    controls: Controls,
    keys: mx.array,
    positions: mx.array,
    history: History | None,
    newest: mx.array,
    mask: mx.array | None = None,
) -> mx.array:
    """Logits [B, vocab] after every option but the draw itself, in this order.

    1. The row's processor, its bias, then the mask of a grammar: nothing allows what it forbids.
    2. Penalties: repetition on prompt and answer, then presence and frequency on the answer.
    3. Temperature.
    4. Top-k: the k likeliest tokens stay; of equal ones those of lower id.
    5. Top-p: of these, renormalised, the smallest set of likeliest tokens with this mass stays.
    6. Min-p: tokens below this share of the likeliest token's probability go.
    7. XTC (exclude top choices; text-generation-webui pull 6335): with the row's probability, all
       tokens that have at least the threshold, renormalised, go but the least likely of them.

    softmax of the result is exactly the distribution that tokens are drawn from. Where a row is
    greedy the highest logits alone stay, and `draw` takes the lowest id of equal ones. The
    arguments are those of `draw`.
    """
    x = scores(logits, filters, controls, positions, history, newest, mask)
    best = x.max(axis=-1, keepdims=True)
    if controls.temperature is None:  # every row is greedy
        return mx.where(x == best, x, NEVER)
    gaps = (best - x) / controls.temperature[:, None]  # never negative: no temperature overflows
    if filters.top_k or filters.top_p:
        gaps = keep_likeliest(gaps, filters, controls)
    if controls.min_p is not None:
        gaps = mx.where(gaps > controls.min_p[:, None], math.inf, gaps)
    if controls.xtc_probability is not None and controls.xtc_threshold is not None:
        likely = mx.softmax(-gaps, axis=-1) >= controls.xtc_threshold[:, None]
        least = mx.where(likely, gaps, -1).max(axis=-1, keepdims=True)
        excluding = (coin(keys, positions) < controls.xtc_probability)[:, None]
        gaps = mx.where(excluding & (gaps < least), math.inf, gaps)
    return -gaps


def scores(
    logits: mx.array,
    filters: Filters,
    controls: Controls,
    positions: mx.array,
    history: History | None,
    newest: mx.array,
    mask: mx.array | None,
) -> mx.array:
    """Logits after processors, bias, mask and penalties; a greedy choice is their argmax.

    Repetition (arXiv:1909.05858) looks at prompt and answer, the other two at the answer.
    """
    for index, processor in enumerate(filters.processors):
        which: Any = controls.processor
        made = processor(logits, newest, positions)
        if not isinstance(made, mx.array) or made.shape != logits.shape:
            what = f"{type(made).__name__} {getattr(made, 'shape', '')}".strip()
            raise OptionError(f"processor returned {what}; it must return logits {logits.shape}")
        logits = mx.where((which == index)[:, None], made, logits)
    if controls.bias is not None:
        logits = logits + controls.bias
    if mask is not None:
        bits = mask[:, :, None] >> numbers(32).astype(mx.uint32) & 1  # [B, words, 32]
        logits = mx.where(bits.reshape(mask.shape[0], -1)[:, : logits.shape[1]] == 1, logits, NEVER)
    text, answer = (None, None) if history is None else history[:2]
    if controls.repetition is not None and text is not None:
        penalty = controls.repetition[:, None]
        penalised = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(text > 0, penalised, logits)
    if controls.presence is not None and controls.frequency is not None and answer is not None:
        logits = logits - controls.presence[:, None] * (answer > 0)
        logits = logits - controls.frequency[:, None] * answer
    return logits


def keep_likeliest(gaps: mx.array, filters: Filters, controls: Controls) -> mx.array:
    """Top-k, then top-p, by one sort: each keeps so many of all tokens, by gap and then by id.

    `gaps` [B, vocab] say how far the score of a token is below the highest; inf is never drawn.
    """
    vocab, ranked = gaps.shape[1], gaps
    if 0 < filters.shortlist < vocab:
        ranked = mx.partition(gaps, filters.shortlist - 1, axis=-1)[:, : filters.shortlist]
    ranked = mx.sort(ranked, axis=-1)
    kept = mx.array([[vocab]]) if controls.top_k is None else controls.top_k[:, None]
    if controls.top_p is not None:
        weights = mx.exp(-ranked)
        if controls.top_k is not None:
            weights = mx.where(numbers(ranked.shape[1]) < kept, weights, 0)
        mass = mx.cumsum(weights, axis=-1)
        short = mass < controls.top_p[:, None] * mass[:, -1:]  # up to here it is not enough
        kept = mx.minimum(kept, 1 + short.sum(axis=-1, keepdims=True))
    widest = mx.take_along_axis(ranked, kept - 1, axis=-1)
    room = kept - (ranked < widest).sum(axis=-1, keepdims=True)  # for tokens of the widest gap
    equal = gaps == widest
    among = mx.cumsum(equal.astype(mx.int32), axis=-1)
    return mx.where((gaps < widest) | (equal & (among <= room)), gaps, math.inf)


@lru_cache
def numbers(count: int) -> mx.array:
    """0, 1, 2, ... as int32: a constant of what is compiled; mx.arange would run at every step."""
    values: Any = array("i", range(count))
    return mx.array(values)


def new_seed() -> int:
    return secrets.randbits(62)


def seed_key(seed: int, stream: int = 0, offset: int = 0) -> mx.array:
    """The key of one sequence, [1, 2] uint32: a hash of seed and stream.

    `offset` tokens of the text are no longer in the prompt: noise at position p is that at
    p + offset without it.
    """
    digest = blake2b(struct.pack("<2Q", seed, stream), digest_size=8).digest()
    high, low = struct.unpack("<2I", digest)
    return mx.array([[high, low + offset & 0xFFFFFFFF]], dtype=mx.uint32)


def keyed(keys: mx.array, positions: mx.array, purpose: int = 0) -> mx.array:
    """Random keys [B, 2] of draws: from keys of rows [B, 2], positions [B] and a purpose."""
    second = mx.array([0, 1], mx.uint32)  # in one expression, so that it is one kernel
    return keys + positions[:, None].astype(mx.uint32) * second + mx.array([purpose, 0], mx.uint32)


def gumbel(keys: mx.array, positions: mx.array, vocab: int) -> mx.array:
    """Gumbel noise [B, vocab], a function of keys [B, 2] and positions [B] of the draws alone."""
    mixed = keyed(keys, positions)
    if keys.shape[0] == 1:
        return mx.random.gumbel((vocab,), key=mixed.reshape(2))[None]
    noise = mx.vmap(lambda key: mx.random.gumbel((vocab,), key=key))  # one kernel for all rows
    return noise(mixed)


def coin(keys: mx.array, positions: mx.array) -> mx.array:
    """A uniform number from 0 up to 1 for each row, [B]: likewise a function of these alone."""
    return mx.vmap(lambda key: mx.random.uniform(key=key))(keyed(keys, positions, EXCLUDING))


def draw(
    logits: mx.array,
    filters: Filters,
    controls: Controls,
    keys: mx.array,
    positions: mx.array,
    history: History | None,
    newest: mx.array,
    mask: mx.array | None = None,
) -> mx.array:
    """One token a row, [B] uint32, from logits [B, vocab].

    `positions` [B] are those of the tokens drawn, `keys` [B, 2] those of the rows, `newest` [B]
    the tokens before them (processors see both), and `mask` [B, ceil(vocab / 32)] uint32 has a bit
    for each token, 1 where allowed.

    Sampling is argmax(filtered logits + Gumbel noise), which draws exactly from their softmax. A
    greedy choice is the argmax of the penalised logits, without noise.
    """
    if filters.penalised or filters.bias or filters.processors or filters.sampled:
        logits = logits.astype(mx.float32)  # which is the largest does not change by it
    if controls.temperature is None:
        x = scores(logits, filters, controls, positions, history, newest, mask)
        return mx.argmax(x, axis=-1)
    filtered = filter_logits(logits, filters, controls, keys, positions, history, newest, mask)
    noise = gumbel(keys, positions, logits.shape[-1])
    return mx.argmax(filtered + mx.where(controls.temperature[:, None] > COLD, noise, 0), axis=-1)


class Logprobs(NamedTuple):
    """Natural-log probabilities under the model itself, before any sampling option."""

    chosen: mx.array  # [B]
    top_tokens: mx.array  # [B, n]
    top: mx.array  # [B, n]


def logprobs(logits: mx.array, tokens: mx.array, n: int) -> Logprobs:
    """Return the log probabilities of `tokens` [B] and of the n likeliest tokens.

    At least one is taken, as MLX 0.32 divides by zero on arrays without elements.
    """
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    order = mx.argsort(-logp, axis=-1)[:, : max(n, 1)]
    chosen = mx.take_along_axis(logp, tokens[:, None], axis=-1)[:, 0]
    return Logprobs(chosen, order, mx.take_along_axis(logp, order, axis=-1))
