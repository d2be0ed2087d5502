"""The soak: what it sees, what it judges, and the row that it becomes."""

from __future__ import annotations

import random

from small import random_engine

from openelm_mlx.benchmarks.checks import Answer, Request
from openelm_mlx.benchmarks.checks import soak as soaking
from openelm_mlx.benchmarks.measure import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions


def test_a_soak_becomes_a_row_that_says_what_went_wrong(monkeypatch):
    def soak(engine, minutes, tick, seen):
        seen.probes += [Timed((1, 2), (0.5, 0.75))] * 3
        seen.failures.append("WRONG: a token")

    monkeypatch.setattr(soaking, "soak", soak)
    document = run.run(BenchmarkOptions(suite="soak", minutes=1))
    (row,) = document.rows
    assert row.metrics["decode_tokens_per_second"].values == (4.0,) * 3
    assert row.notes[0] == "failed: WRONG: a token" and run.failed(document)


def test_a_soak_of_a_few_requests_finds_nothing_wrong(tiny, monkeypatch):
    monkeypatch.setattr(soaking, "SAMPLE", 1.0)  # all are run again alone
    monkeypatch.setattr(soaking, "CANCELLED", 0.3)
    monkeypatch.setattr(soaking, "PROBE", (16, 8))
    small = random_engine(tiny, seed=3)
    seen = soaking.soak(
        small, seed=5, draft=random_engine(tiny, seed=3, noise=0.3), clients=4, requests=3
    )
    assert seen.failures == [] and sum(seen.generations.values()) == 12 and len(seen.probes) == 2
    assert seen.tokens > 0 and seen.checked == 12 and seen.cancelled > 0
    assert "repeated alone" in seen.summary()[0]


def test_the_suite_of_a_soak_gives_the_row_of_its_probe(short, monkeypatch):
    monkeypatch.setattr(soaking, "SHIFT", 1)
    monkeypatch.setattr(soaking, "PROBE", (16, 8))
    options = BenchmarkOptions(models=(str(short),), suite="soak", minutes=0.01)
    document = run.run(options)
    (row,) = document.rows
    assert (row.case.prompt_tokens, row.case.generation_tokens) == (16, 8)
    assert row.metrics["decode_tokens_per_second"].median > 0
    assert "generations (" in row.notes[0] and "repeated alone" in row.notes[0]
    assert not run.failed(document)


def test_a_soak_sees_a_wrong_token(tiny):
    seen = soaking.Soak()
    driver = soaking.Driver(tiny, random.Random(0), seen)
    request = Request([1, 5, 9], SamplingOptions(), GenerationOptions(max_tokens=3))
    driver.check(request, EngineOptions(), Answer([4095, 4095, 1], "", "length"))
    assert len(seen.failures) == 1 and seen.failures[0].startswith(
        "WRONG: a client's answer, token 0 is 4095, alone"
    )


def test_a_soak_judges_memory_and_speed():
    steady = [Timed((1, 2), (1.0, 1.0 + 0.01)) for _ in range(12)]
    slower = [Timed((1, 2), (1.0, 1.0 + 0.01 * (1 + i / 20))) for i in range(12)]
    still = [0.01] * 12
    good = soaking.Soak(
        probes=steady, references=still, arrays=[10**6, 10**6 + 20], process=[100, 10**8, 10**8]
    )
    bad = soaking.Soak(
        probes=slower,
        references=still,
        arrays=[10**8, 10**8 + 3 * 2**20],
        process=[10**7, 10**8, 3 * 10**8],
    )
    good.judge()
    bad.judge()
    assert good.failures == []
    assert bad.failures == [
        "memory did not return: arrays grew by 3.1 MB",
        "memory did not return: the process grew by 200 MB in the second half",
        "decode speed fell by 28% against a fixed work timed beside it",
    ]
    hot = soaking.Soak(probes=slower, references=[0.01 * (1 + i / 20) for i in range(12)])
    hot.judge()
    assert (
        hot.failures == []
        and "-27.6%; relative to a fixed work timed beside them -0.0%" in hot.summary()[-1]
    )
    assert soaking.trend([1.0] * 5) == (0.0, False)
