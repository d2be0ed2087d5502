"""A session for tests of timing: its steps sleep a known time."""

from __future__ import annotations

import time

from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.benchmarks.results.document import Case

CASE = Case("stub", "none", "float32", None, None, prompt_tokens=8, generation_tokens=9)


def nothing(label, work):
    pass


class Sleeper:
    """A session that sleeps `first` and then `step` a token, and lets an independent clock
    watch.
    """

    version, load_seconds = "1", 0.0

    def __init__(self, step, first=0.002, engine="stub", tokens=None):
        self.step, self.first, self.engine, self.tokens = step, first, engine, tokens
        self.truth = []  # nanoseconds of each run: start, then every token
        self.calls = 0

    def generate(self, prompt, tokens):
        self.calls += 1
        watch, start, seconds = [time.monotonic_ns()], time.perf_counter(), []
        for i in range(tokens):
            time.sleep(self.first if i == 0 else self.step)
            seconds.append(time.perf_counter() - start)
            watch.append(time.monotonic_ns())
        self.truth.append(watch)
        return Timed(tuple(self.tokens or range(tokens)), tuple(seconds), 1000)

    def close(self):
        pass
