"""One request on the host's side: its options, its progress and its cost.

The tokens that the device draws for a request become its events here. The clock separates the
engine's own time from that of the reader of the events.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import Logprobs, State, StepSpec, each
from openelm_mlx.engine.grammar import constraint
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.prompts import decoder_after
from openelm_mlx.engine.sampling import Controls, Filters, History, new_seed, seed_key
from openelm_mlx.engine.tokenizer import StreamingDecoder, TextFilter

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.speculation import Proposal
    from openelm_mlx.model.cache_kinds import CacheKind

# The log probability of a token, and those of the likeliest ones with their ids.
TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]


@dataclass(frozen=True)
class GenerationStats:
    """The cost of one generation.

    Rates are tokens per second of the engine's own time, which a slow reader of the events does not
    lower; a rate without a measurement is 0. The first token belongs to the prompt's time, so the
    generation rate counts the tokens after it.
    """

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache
    generation_tokens: int
    prompt_tokens_per_second: float  # of those prefilled
    generation_tokens_per_second: float
    time_to_first_token_seconds: float  # from when the request started to run
    total_seconds: float  # from then to the last token, the reader's time included
    peak_memory_bytes: int  # of the process, while this request ran
    seed: int
    waiting_seconds: float = 0.0  # in a batch's queue, before the request started to run
    drafted_tokens: int = 0  # proposed by a draft model or prompt lookup
    accepted_tokens: int = 0  # of those, kept
    target_passes: int = 0  # of the model itself, the prompt's excluded

    @property
    def tokens_per_pass(self) -> float:
        """The tokens per pass of the model: 1 without speculation, 0 if there was no pass."""
        return (self.generation_tokens - 1) / self.target_passes if self.target_passes else 0.0


@dataclass(frozen=True)
class Event:
    """One token, and the text that became safe to print with it.

    Only the last event has `finish_reason` and `stats`. The reason is "stop" at the end of text, a
    stop string or a stop token, and "length" when max_tokens, a full context or a grammar that
    became too complex cut the text. `logprob` is the natural logarithm of the token's probability;
    `top_logprobs` are pairs (token, log probability), the likeliest first.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    stats: GenerationStats | None = None


@dataclass(eq=False)
class Request:
    """One sequence on the host's side, alone or in a batch.

    Raises `OptionError` for a grammar that the model's tokens cannot follow.
    """

    number: int
    engine: Engine = field(repr=False)
    prompt: list[int]
    sampling: SamplingOptions
    options: GenerationOptions
    reader: Reader = field(repr=False)
    owner: str = ""
    position_offset: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        engine, options, sampling = self.engine, self.options, self.sampling
        self.known = list(self.prompt)  # prompt and answer so far
        self._follow()
        self.seed = new_seed() if sampling.seed is None else sampling.seed
        self.key = seed_key(self.seed, sampling.stream, self.position_offset)  # [1, 2]
        space = engine.config.max_context_length - len(self.prompt) + 1
        self.max_new_tokens = min(options.max_tokens, space)
        ends = () if options.ignore_eos else engine.config.eos_token_ids
        self.ends = frozenset((*ends, *options.stop_tokens))
        self.reused = 0  # tokens of the prompt found in a cache
        self.weights: object = None  # the prompt was prefilled with these
        self.clock = Clock(self.reader)
        self.done = False

    @property
    def left(self) -> int:
        """The number of tokens that may still be drawn."""
        return self.max_new_tokens - self.clock.tokens

    def _follow(self) -> None:
        """Make the constraint and the text anew, and lead them along the known tokens."""
        engine, options = self.engine, self.options
        self.constraint = constraint(engine, options)
        if options.constrained:  # such a text does not continue the prompt's
            decoder = StreamingDecoder(engine.tokenizer)
        else:
            decoder = decoder_after(engine.tokenizer, self.prompt)
        self.text = TextFilter(decoder, options.stop)
        for token in self.known[len(self.prompt) :]:
            if self.constraint is not None:
                self.constraint.accept(token)
            self.text.push(token)

    def take(self, token: int, detail: TokenLogprobs | None) -> Event:
        """Return the event of the next token; the last one carries reason and statistics.

        At an interrupt the request goes back to where it was, so the token will be drawn again.
        """
        count = len(self.known)
        try:
            return self._event(token, detail)
        except BaseException:
            del self.known[count:]
            self.done, self.clock.tokens = False, count - len(self.prompt)
            self._follow()
            raise

    def _event(self, token: int, detail: TokenLogprobs | None) -> Event:
        """Add a token to what is known, and make its event."""
        self.clock.token()
        self.known.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        wanted = self.options.logprobs
        logprob, top = (None, ()) if wanted is None or detail is None else detail
        top = top[:wanted]
        ended = token in self.ends
        shown = self.text.flush() if ended else self.text.push(token)
        stopped = ended or self.text.stopped
        if not stopped and self.left > 0:
            return Event(shown, token, logprob, top)
        self.done = True
        shown += "" if stopped else self.text.flush()
        broken = self.constraint is not None and self.constraint.broken  # cut off in the middle
        reason = "length" if broken or not (stopped or self.text.stopped) else "stop"
        stats = self.clock.stats(len(self.prompt), self.reused, self.seed)
        return Event(shown, token, logprob, top, reason, stats)


def on_host(detail: Logprobs | None, count: int) -> list[TokenLogprobs | None]:
    """Wait for the log probabilities of `count` tokens."""
    if detail is None:
        return [None] * count
    columns: Any = [part.tolist() for part in detail]
    return [
        (chosen, tuple(zip(ids, top, strict=True)))
        for chosen, ids, top in zip(*columns, strict=True)
    ]


def spec_for(
    requests: Sequence[Request], vocab: int, kind: CacheKind, compiled: bool, others: Filters
) -> StepSpec:
    """Return what a step must be traced for, to serve all of these requests.

    `others` are filters that stay, though none of these requests needs them.
    """
    wanted = [one.options.logprobs for one in requests if one.options.logprobs is not None]
    masked = any(one.constraint is not None for one in requests)
    filters = Filters.of([one.sampling for one in requests], masked).beside(others)
    return StepSpec(filters, vocab, max(wanted, default=None), compiled, kind)


def state_of(rows: Sequence[Request | None], spec: StepSpec) -> State:
    """Return the state of these rows as the host knows it; None is an unused row.

    Every known token has been drawn, and the newest has not been fed.
    """
    unused, filters, vocab = mx.zeros((1, 2), mx.uint32), spec.filters, spec.vocab
    known = [[0] if one is None else one.known for one in rows]
    samplings = [None if one is None else one.sampling for one in rows]
    prompts = [[] if one is None else one.prompt for one in rows]
    windows = [0 if sampling is None else sampling.penalty_window for sampling in samplings]
    parts = zip(prompts, known, windows, strict=True)
    histories = [History.of(p, k[len(p) :], window, filters, vocab) for p, k, window in parts]
    some = [history for history in histories if history is not None]
    return State(
        token=mx.array([tokens[-1] for tokens in known], dtype=mx.uint32),
        position=mx.array([len(tokens) - 1 for tokens in known], dtype=mx.int32),
        alive=mx.array([one is not None for one in rows], dtype=mx.int32),
        key=mx.concatenate([unused if one is None else one.key for one in rows]),
        controls=Controls.of(samplings, filters, vocab),
        history=each(lambda *parts: mx.concatenate(list(parts)), *some) if some else None,
        buffers=[],
    )


def mask_of(
    rows: Sequence[Request | None], spec: StepSpec, drafted: Proposal | None = None
) -> mx.array | None:
    """Return the tokens that the rows' grammars allow next, and after each token of their drafts.

    [B * (k + 1), vocab / 32] uint32, a bit for each token; all of them in rows without a grammar.
    Drafts are shortened to what a grammar allows. None if no row has a grammar.
    """
    if not spec.filters.masked:
        return None
    import numpy as np

    drafts: Any = [[]] * len(rows) if drafted is None else drafted.tokens.tolist()
    lengths = [0] * len(rows) if drafted is None else drafted.lengths
    shape = (len(rows), len(drafts[0]) + 1, -(-spec.vocab // 32))
    masks = np.full(shape, 0xFFFFFFFF, dtype=np.uint32)
    for row, one in enumerate(rows):
        if one is not None and one.constraint is not None:
            found, lengths[row] = one.constraint.along(drafts[row][: lengths[row]])
            masks[row, : len(found)] = found
    return mx.array(masks.reshape(-1, shape[-1]))


class Reader:
    """Measures how long the reader of events was away, and how long the device was idle then.

    While the reader is away the device computes the next token, and how long that takes is known
    only if somebody waits for it. So after the 1st, 2nd, 4th, 8th ... slow return the engine waits
    for that token before it hands over an event.
    """

    SLOW = 1e-3  # seconds; a reader that prints needs less

    def __init__(self) -> None:
        self.away = 0.0  # seconds of slow returns
        self.absences = 0  # how many of them began with a token under way
        self._waits: list[float] = []  # seconds that such a token took from the reader's leaving on
        self._slow, self._wait, self._left = 0, False, 0.0

    def leave(self) -> None:
        """Note that an event is handed over."""
        self._left = time.perf_counter()
        if self._wait:
            mx.synchronize()
            start, self._left = self._left, time.perf_counter()
            self._waits.append(self._left - start)

    def back(self) -> None:
        """Note that the reader asks for more."""
        away = time.perf_counter() - self._left if self._left else 0.0
        waited, self._wait, self._left = self._wait, False, 0.0
        if away > self.SLOW:
            self._slow += 1
            self._wait = self._slow & self._slow - 1 == 0  # a power of two
            self.away += away
            self.absences += not waited

    def idle(self, away: float, absences: int) -> float:
        """Return the device's idle seconds since `away` and `absences` were these; 0 if unknown."""
        if not self._waits:
            return 0.0
        return max(self.away - away - (self.absences - absences) * fmean(self._waits), 0.0)


class Clock:
    """The time of one request: waiting until `start`, to the first token, from it to the last."""

    _running: WeakSet[Clock] = WeakSet()  # changed by the thread alone that drives the device

    def __init__(self, reader: Reader | None = None) -> None:
        self.reader = Reader() if reader is None else reader
        self.made = self.started = self.first = self.last = time.perf_counter()
        self.tokens = self.peak = 0
        self.passes = self.drafted = self.accepted = 0  # of the model; tokens drafted, and kept
        self._before = (0.0, 0)

    def start(self) -> Clock:
        """Note that the request runs from now on.

        MLX has one memory peak for all, so the peak until now is noted for the requests that run.
        """
        peak = mx.get_peak_memory()
        for other in self._running:
            other.peak = max(other.peak, peak)
        mx.reset_peak_memory()
        self._running.add(self)
        self.started = self.first = self.last = time.perf_counter()
        return self

    def token(self) -> None:
        """Note that the host knows one more token."""
        self.last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first, self._before = self.last, (self.reader.away, self.reader.absences)

    def stats(self, prompt: int, reused: int, seed: int) -> GenerationStats:
        """Return the statistics of a request that has ended; `prompt` and `reused` are tokens."""
        self._running.discard(self)
        to_first = self.first - self.started
        after = self.last - self.first - self.reader.idle(*self._before)
        return GenerationStats(
            prompt_tokens=prompt,
            reused_tokens=reused,
            generation_tokens=self.tokens,
            prompt_tokens_per_second=(prompt - reused) / to_first if to_first > 0 else 0.0,
            generation_tokens_per_second=(self.tokens - 1) / after if after > 0 else 0.0,
            time_to_first_token_seconds=to_first,
            total_seconds=self.last - self.started,
            peak_memory_bytes=max(self.peak, mx.get_peak_memory()),
            seed=seed,
            waiting_seconds=self.started - self.made,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            target_passes=self.passes,
        )
