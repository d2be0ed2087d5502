"""What the tests of timing share: a run in this process, and a session whose clock is its own, so
that every figure is known exactly.
"""

from __future__ import annotations

from openelm_mlx.benchmarks.measure import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.results.document import Case, Document

CASE = Case("stub", "none", "float32", None, None, prompt_tokens=8, generation_tokens=9)


def measured(**options) -> Document:
    """Measure in this process, where a test can change things."""
    return run.run(BenchmarkOptions(trials=5, processes=1, **options))


def nothing(label, work):
    pass


class Steady:
    """A session that takes `first` seconds to its first token and `step` seconds for each later."""

    version, load_seconds, notes = "1", 0.0, ()

    def __init__(self, step=0.25, first=0.5, engine="stub", tokens=None):
        self.step, self.first, self.engine, self.tokens = step, first, engine, tokens
        self.calls = 0

    def generate(self, prompt, tokens):
        self.calls += 1
        seconds = tuple(self.first + self.step * number for number in range(tokens))
        return Timed(tuple(self.tokens or range(tokens)), seconds, 1000)

    def close(self):
        pass
