"""Statistics of a generation, by a clock that tells the engine's time from its reader's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import fmean
from threading import Lock
from weakref import WeakSet

from openelm_mlx.device import mx


@dataclass(frozen=True)
class GenerationStats:
    """The cost of one generation.

    Rates are tokens per second of the engine's own time: a slow reader of the events lowers none,
    and one that nothing was measured for is 0. The first token belongs to the prompt's time, so the
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
        """Tokens that a pass of the model gave; 1 without speculation, 0 where there was no
        pass.
        """
        return (self.generation_tokens - 1) / self.target_passes if self.target_passes else 0.0


class Reader:
    """Measures how long the reader of events was away, and how long the device stood idle then.

    While the reader is away the device computes the next token, and for how long shows only when
    somebody waits for it. So after the 1st, 2nd, 4th, 8th ... slow return the engine waits for that
    token before it hands over an event.
    """

    SLOW = 1e-3  # seconds; a reader that prints needs less

    def __init__(self) -> None:
        self.away = 0.0  # seconds of slow returns
        self.absences = 0  # how many of them began with a token under way
        self._waits: list[float] = []  # seconds that such a token took from the reader's leaving on
        self._slow, self._wait, self._left = 0, False, 0.0

    def leave(self) -> None:
        """Called when an event is handed over."""
        self._left = time.perf_counter()
        if self._wait:
            mx.synchronize()
            start, self._left = self._left, time.perf_counter()
            self._waits.append(self._left - start)

    def back(self) -> None:
        """Called when the reader asks for more."""
        away = time.perf_counter() - self._left if self._left else 0.0
        waited, self._wait, self._left = self._wait, False, 0.0
        if away > self.SLOW:
            self._slow += 1
            self._wait = self._slow & self._slow - 1 == 0  # a power of two
            self.away += away
            self.absences += not waited

    def idle(self, away: float, absences: int) -> float:
        """Idle seconds of the device since `away` and `absences` were these; 0 if unknown."""
        if not self._waits:
            return 0.0
        return max(self.away - away - (self.absences - absences) * fmean(self._waits), 0.0)


class Clock:
    """The time of one request: waiting until `start`, to the first token, from it to the last."""

    _running: WeakSet[Clock] = WeakSet()
    _lock = Lock()

    def __init__(self, reader: Reader | None = None) -> None:
        self.reader = Reader() if reader is None else reader
        self.made = self.started = self.first = self.last = time.perf_counter()
        self.tokens = self.peak = 0
        self.passes = self.drafted = self.accepted = 0  # of the model; tokens drafted, and kept
        self._before = (0.0, 0)

    def start(self) -> Clock:
        """The request runs from now on.

        MLX has one peak of memory for all: what it was until now is noted for those that run.
        """
        with self._lock:
            peak = mx.get_peak_memory()
            for other in self._running:
                other.peak = max(other.peak, peak)
            mx.reset_peak_memory()
            self._running.add(self)
        self.started = self.first = self.last = time.perf_counter()
        return self

    def token(self) -> None:
        self.last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first, self._before = self.last, (self.reader.away, self.reader.absences)

    def stats(self, prompt: int, reused: int, seed: int) -> GenerationStats:
        """The statistics of a request that has ended."""
        with self._lock:
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
