"""From logits to the next token, on the device, for rows that each have their own options.

A step is traced for a set of filters (`Filters`), whose values are arrays with one entry a row
(`Controls`). A row that does not use a filter has a value there that changes nothing, bit for bit,
so it gets the token that it would get alone. `filter_logits` states the order of the filters.

Randomness is a pure function of seed, stream and position in the text, counted from BOS. The noise
for a token does not depend on chunking, batching, caching, drafts or how many tokens were drawn
before, so a seed always gives the same text. Seed and stream are hashed, so that adjacent ones have
nothing in common.
"""

from __future__ import annotations

import math
import secrets
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.model.draws import COLD, Limits, keyed, noisy, numbers, remaining
from openelm_mlx.model.kernels.sample import draw_token

NEVER = -math.inf
CERTAIN = 1e30  # for a processor's infinite logits, whose differences are no numbers
SHORTLISTS = (64, 1024)  # few, as each is a trace of its own
EXCLUDING = 0x9E3779B9  # the purpose of randomness that decides for XTC; that of a draw is 0
NOWHERE = -(2**31)  # marks an empty place of a penalty window: neither prompt nor answer


@dataclass(frozen=True)
class Filters:
    """Which sampling options any row uses. Without any, a token is the argmax of the logits."""

    sampled: bool = False
    top_k: bool = False
    shortlist: int = 0  # top-k leaves each sampling row at most this many tokens; 0: no such limit
    top_p: bool = False
    min_p: bool = False
    xtc: bool = False
    repetition: bool = False
    counts: bool = False  # presence or frequency penalties
    bias: bool = False
    window: int = 0  # of the penalties, in tokens, a power of two; 0 if all see the entire text
    masked: bool = False  # a grammar forbids tokens
    processors: tuple[Callable[..., mx.array], ...] = ()

    @classmethod
    def of(cls, rows: Iterable[SamplingOptions], masked: bool = False) -> Filters:
        """Return the filters that these rows need together; `masked` says if one has a grammar."""
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

    def beside(self, others: Filters) -> Filters:
        """Return these filters and `others`: fewer sets occur so, and fewer steps are traced."""
        own = ("shortlist", "masked", "processors")
        names = [item.name for item in fields(self) if item.name not in own]
        every = any(one.sampled and not one.shortlist for one in (self, others))
        shortlist = 0 if every else max(self.shortlist, others.shortlist)
        both = {name: max(getattr(self, name), getattr(others, name)) for name in names}
        return replace(self, shortlist=shortlist, **both)

    @property
    def penalised(self) -> bool:
        return self.repetition or self.counts


class Controls(NamedTuple):
    """The values of the options for each row [B]; None if no row uses an option."""

    temperature: mx.array | None = None  # COLD if greedy
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
        """Return the values for these rows; None is an unused row."""
        given = [SamplingOptions() if o is None else o for o in rows]
        places: dict[Any, int] = {one: index for index, one in enumerate(filters.processors)}

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
            mx.stack([dense("f", vocab, o.logit_bias) for o in given]) if filters.bias else None,
            column(bool(places), lambda o: places.get(o.processor, -1)),
        )

    def limits(self, temperature: mx.array, shortlist: int) -> Limits:
        """Return those that follow the penalties, but XTC's."""
        return Limits(temperature, self.top_k, self.top_p, self.min_p, shortlist)

    def repeated(self, times: int) -> Controls:
        """Return each row `times` times in a row, for several tokens of each row in a pass."""
        return Controls(*(None if a is None else mx.repeat(a, times, axis=0) for a in self))


class History(NamedTuple):
    """How often each token occurs in the text and in the answer of each row, for the penalties.

    A row with a penalty window counts its latest tokens only; `latest` knows which leaves next.
    """

    text: mx.array | None  # [B, vocab] int32, prompt and answer
    answer: mx.array | None  # [B, vocab] int32
    # [B, window] int32, newest last: t of the answer, -1 - t of the prompt, or NOWHERE
    latest: mx.array | None
    window: mx.array | None  # [B] int32, 0 if the entire text counts

    @classmethod
    def of(
        cls, prompt: list[int], answer: list[int], size: int, filters: Filters, vocab: int
    ) -> History | None:
        """Return the history of one row after these tokens; None if no row has a penalty.

        `size` is the row's penalty window in tokens, 0 for the entire text.
        """
        if not filters.penalised:
            return None
        signed = [-1 - token for token in prompt] + answer
        counted = signed[-size:]  # all of them if size is 0
        of_answer = ((token, 1) for token in counted)
        of_text = ((token if token >= 0 else -1 - token, 1) for token in counted)
        empty = [NOWHERE] * filters.window
        return cls(
            dense("i", vocab, of_text)[None] if filters.repetition else None,
            dense("i", vocab, of_answer)[None] if filters.counts else None,
            mx.array([(empty + signed)[-filters.window :]], mx.int32) if filters.window else None,
            mx.array([size], mx.int32) if filters.window else None,
        )

    def plus(self, tokens: mx.array) -> History:
        """Return the history after one more token a row, tokens [B]."""
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


def dense(code: str, vocab: int, pairs: Iterable[tuple[int, float]]) -> mx.array:
    """Return [vocab] numbers of an `array` type: 0, and what pairs (token, number) add to it."""
    row: Any = array(code, bytes(4 * vocab))
    for token, number in pairs:
        if 0 <= token < vocab:
            row[token] += number
    return mx.array(row)


class Context(NamedTuple):
    """The inputs of a draw besides the logits, for each row."""

    controls: Controls
    keys: mx.array  # [B, 2] uint32, as of `seed_key`
    positions: mx.array  # [B], of the tokens drawn
    newest: mx.array  # [B], the tokens before them; processors see them and the positions
    history: History | None = None
    mask: mx.array | None = None  # [B, ceil(vocab / 32)] uint32, a bit a token, 1 if allowed


def draw(logits: mx.array, filters: Filters, context: Context) -> mx.array:
    """Draw one token a row, [B] uint32, from logits [B, vocab].

    Sampling is argmax(filtered logits + Gumbel noise), which draws exactly from their softmax. A
    greedy choice is the argmax of the penalised logits, without noise; of equal ones the lowest id.
    """
    temperature, noise = context.controls.temperature, (context.keys, context.positions)
    if filters.penalised or filters.bias or filters.processors or filters.xtc:
        logits = logits.astype(mx.float32)  # which is the largest does not change by it
    if temperature is None:
        return mx.argmax(scores(logits, filters, context), axis=-1)
    if filters.xtc:  # a filter that the kernel does not have
        return mx.argmax(noisy(filter_logits(logits, filters, context), temperature, *noise), -1)
    limits = context.controls.limits(temperature, filters.shortlist)
    return draw_token(scores(logits, filters, context), limits, *noise)


def filter_logits(logits: mx.array, filters: Filters, context: Context) -> mx.array:
    """Return logits [B, vocab] after every option but the draw itself, in this order.

    1. The row's processor, its bias, then the mask of a grammar: nothing allows what it forbids.
    2. Penalties: repetition on prompt and answer, then presence and frequency on the answer.
    3. Temperature.
    4. Top-k: the k likeliest tokens stay; of equal ones those of lower id.
    5. Top-p: of these, renormalised, the smallest set of likeliest tokens with this mass stays.
    6. Min-p: tokens below this share of the likeliest token's probability go.
    7. XTC (exclude top choices; text-generation-webui pull 6335): with the row's probability, all
       tokens that have at least the threshold, renormalised, go but the least likely of them.

    softmax of the result is exactly the distribution that tokens are drawn from. Where a row is
    greedy the highest logits alone stay. Raises `OptionError` for a processor that returns anything
    but logits of this shape.
    """
    controls = context.controls
    x = scores(logits, filters, context)
    if controls.temperature is None:  # every row is greedy
        return mx.where(x == x.max(axis=-1, keepdims=True), x, NEVER)
    gaps = remaining(x, controls.limits(controls.temperature, filters.shortlist))
    if controls.xtc_probability is not None and controls.xtc_threshold is not None:
        likely = mx.softmax(-gaps, axis=-1) >= controls.xtc_threshold[:, None]
        least = mx.where(likely, gaps, -1).max(axis=-1, keepdims=True)
        excluding = (coin(context.keys, context.positions) < controls.xtc_probability)[:, None]
        gaps = mx.where(excluding & (gaps < least), math.inf, gaps)
    return -gaps


def scores(logits: mx.array, filters: Filters, context: Context) -> mx.array:
    """Return logits after processors, bias, mask and penalties; a greedy choice is their argmax.

    The repetition penalty is that of arXiv:1909.05858.
    """
    controls, _, positions, newest, history, mask = context
    for index, processor in enumerate(filters.processors):
        which: Any = controls.processor
        made = processor(logits, newest, positions)
        if not isinstance(made, mx.array) or made.shape != logits.shape:
            what = f"{type(made).__name__} {getattr(made, 'shape', '')}".strip()
            raise OptionError(f"processor returned {what}; it must return logits {logits.shape}")
        logits = mx.minimum(mx.where((which == index)[:, None], made, logits), CERTAIN)
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


def new_seed() -> int:
    """Return a random seed of 62 bits."""
    return secrets.randbits(62)


def seed_key(seed: int, stream: int = 0, offset: int = 0) -> mx.array:
    """Return the key of one sequence, [1, 2] uint32: a hash of seed and stream.

    With `offset`, position p gets the noise of position p + offset: so many tokens of the text are
    no longer in the prompt.
    """
    digest = blake2b(struct.pack("<2Q", seed, stream), digest_size=8).digest()
    high, low = struct.unpack("<2I", digest)
    return mx.array([[high, low + offset & 0xFFFFFFFF]], dtype=mx.uint32)


def coin(keys: mx.array, positions: mx.array) -> mx.array:
    """Return a uniform number in [0, 1) for each row, [B], likewise a function of these alone."""
    return mx.vmap(lambda key: mx.random.uniform(key=key))(keyed(keys, positions, EXCLUDING))
