"""Intervals hold what they say; a comparison calls a change worse or better only where the trials
bear it out.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from bench_sessions import CASE, Sleeper, nothing

from openelm_mlx.benchmarks.measure.harness import Entry, measure, row_of
from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.benchmarks.results import bootstrap
from openelm_mlx.benchmarks.results.compare import compare, lines
from openelm_mlx.benchmarks.results.document import Document, Machine, Metric, Row, save
from openelm_mlx.cli.main import main
from openelm_mlx.errors import BenchmarkError


def document(*entries):
    return Document("2026-01-01T00:00:00Z", "", tuple(row_of(entry) for entry in entries))


class Clocked(Sleeper):
    """A session whose sleeps move a clock of its own, one step in a hundred off: what is injected
    is all that differs.
    """

    def __init__(self, step, seed):
        super().__init__(step)
        self.random = random.Random(seed)

    def generate(self, prompt, tokens):
        seconds, now = [], 0.0
        for i in range(tokens):
            now += (self.first if i == 0 else self.step) * self.random.gauss(1, 0.01)
            seconds.append(now)
        return Timed(tuple(range(tokens)), tuple(seconds), 1000)


def test_the_same_thing_twice_is_no_difference_and_a_tenth_of_a_step_is_one(tmp_path, capsys):
    entries = [
        Entry(CASE, Clocked(step, seed), [1] * 8)
        for seed, step in enumerate((0.005, 0.005, 0.005 + 0.0005))
    ]
    for entry in entries:
        measure([entry], 7, nothing)
    once, twice, slower = (document(entry) for entry in entries)
    same = compare(once, twice)
    assert not same.regressed and all(d.verdict == "same" for d in same.differences)
    worse = compare(once, slower)
    assert {d.metric for d in worse.differences if d.verdict == "worse"} == {
        "decode_tokens_per_second"
    } and worse.regressed
    assert lines(worse)[0].startswith("worse: stub none float32 8+9, decode tokens per second: 199")
    better = compare(slower, once)
    assert not better.regressed and {d.verdict for d in better.differences} == {"same", "better"}
    files = [str(tmp_path / name) for name in ("a.json", "b.json", "c.json")]
    for name, result in zip(files, (once, twice, slower), strict=True):
        save(result, name)
    assert main(["benchmark", "--compare", *files[:2]]) == 0
    assert capsys.readouterr().out.startswith(
        "4 of 4 figures show no significant difference; smallest change"
    )
    assert main(["benchmark", "--compare", files[0], files[2]]) == 1
    assert "worse: stub" in capsys.readouterr().out
    assert main(["benchmark", "--compare", files[2], files[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["regressed"] is False and told["notes"] == [] and len(told["differences"]) == 4
    verdicts = {one["metric"]: one for one in told["differences"]}
    assert (
        verdicts["decode_tokens_per_second"]["verdict"] == "better"
        and verdicts["decode_tokens_per_second"]["change"] > 0.05
    )
    for one in told["differences"]:
        assert (
            one["before"]["low"] <= one["before"]["middle"] <= one["before"]["high"]
            and one["case"]["model"] == CASE.model
        )
    assert main(["benchmark", "--compare", *files[:2], "--report", str(tmp_path / "r.html")]) == 2
    assert "--report does not go with --compare, which prints its result" in capsys.readouterr().err


def simulated(step, generator, trials=7, noise=0.01):
    """A document as a machine with 1 % of noise would have given it."""
    values = [1 / (step * generator.gauss(1, noise)) for _ in range(trials)]
    first = [0.1 * generator.gauss(1, noise) for _ in range(trials)]
    metrics = {
        "decode_tokens_per_second": Metric.of(values, "tokens/s"),
        "time_to_first_token_seconds": Metric.of(first, "s"),
    }
    return Document("", "", (Row(CASE, metrics),))


def test_false_alarms_are_rare_and_a_tenth_is_seen_nearly_always():
    generator = random.Random(1)
    alarms = sum(
        compare(simulated(0.01, generator), simulated(0.01, generator)).regressed for _ in range(60)
    )
    seen = sum(
        compare(simulated(0.01, generator), simulated(0.011, generator)).regressed
        for _ in range(30)
    )
    assert alarms <= 2 and seen >= 28


def test_what_makes_two_results_hard_to_compare_is_said():
    row = Row(CASE, {"decode_tokens_per_second": Metric.of([1, 2, 3], "tokens/s")})
    other = Row(replace(CASE, prompt_tokens=9), row.metrics)
    before = Document(
        "", "", (row,), machine=Machine(chip="a", memory_bytes=25276514304), versions={"mlx": "1"}
    )
    busy = {
        "chip": "b",
        "load_average": 7.25,
        "cores": 8,
        "memory_bytes": 25276518400,
    }  # a page more is the same machine
    after = Document(
        "", "", (row, other), machine=Machine(**busy), versions={"mlx": "2"}, partial=True
    )
    assert compare(before, after).notes == (
        "another machine: chip a before, b after",
        "another machine: cores unknown before, 8 after",
        "mlx 1 before, 2 after",
        "the second result is partial: it was interrupted",
        "the machine was busy before the second run: load 7.2 on 8 cores",
        "1 case is in one result only",
    )
    with pytest.raises(BenchmarkError, match="no measurement in common; run the same suite"):
        compare(before, Document("", "", (other,)))


def test_a_figure_whose_few_trials_happen_to_agree_is_no_surer_than_the_run():
    noisy, close = (
        Metric.of([80, 120, 95, 110, 70], "tokens/s"),
        Metric.of([99, 100, 101, 100, 99], "tokens/s"),
    )
    slower = Metric.of([89, 90, 91, 90, 89], "tokens/s")
    cases = [replace(CASE, prompt_tokens=n) for n in (1, 2, 3)]

    def run_of(*metrics):
        return Document(
            "",
            "",
            tuple(
                Row(c, {"decode_tokens_per_second": m})
                for c, m in zip(cases, metrics, strict=False)
            ),
        )

    assert compare(run_of(close), run_of(slower)).regressed
    assert not compare(run_of(close, noisy, noisy), run_of(slower, noisy, noisy)).regressed


def test_the_more_figures_are_compared_the_surer_each_must_be():
    before, after = (Metric.of([v, v + 1, v + 2, v + 3, v + 4], "tokens/s") for v in (100, 93))

    def run_of(metric, figures):
        cases = (replace(CASE, prompt_tokens=n) for n in range(1, figures + 1))
        return Document("", "", tuple(Row(c, {"decode_tokens_per_second": metric}) for c in cases))

    one, many = (compare(run_of(before, n), run_of(after, n)) for n in (1, 40))
    assert one.differences[0].verdict == "worse" and not many.regressed


def test_group_sizes_tell_cases_apart_and_a_hair_does_not():
    metrics = {"decode_tokens_per_second": Metric.of([1, 2, 3], "tokens/s")}
    results = [
        Document("", "", (Row(replace(CASE, bits=4, bits_per_weight=bpw), metrics),))
        for bpw in (4.5036, 4.5041, 5.0)
    ]
    assert len(compare(*results[:2]).differences) == 1
    with pytest.raises(BenchmarkError, match="no measurement in common"):
        compare(results[0], results[2])


@pytest.mark.parametrize(  # from the tables of any statistics book
    ("confidence", "freedom", "t"),
    [(0.95, 1, 12.706), (0.95, 4, 2.776), (0.99, 5, 4.032), (0.95, 6, 2.447), (0.995, 9, 3.690)],
)
def test_students_t(confidence, freedom, t):
    assert bootstrap.student_t(confidence, freedom) == pytest.approx(t, abs=6e-4)


def test_an_interval_covers_the_true_median_as_often_as_it_says():
    generator = random.Random(0)
    found = [
        bootstrap.interval([generator.gauss(0, 1) for _ in range(7)], seed=i) for i in range(100)
    ]
    assert 0.9 <= statistics.mean(i.low <= 0 <= i.high for i in found) <= 1.0
    with pytest.raises(ValueError, match="at least two trials"):
        bootstrap.interval([1.0])


def test_the_ratio_of_pairs_ignores_drift_that_hits_both():
    drift = [1.0, 1.2, 1.5, 1.9, 2.4]
    middle = bootstrap.paired_ratio([2 * d for d in drift], drift)
    assert middle == pytest.approx((2, 2, 2))
    there, back = (
        bootstrap.paired_ratio([1, 2, 3.1], [2, 4, 6]),
        bootstrap.paired_ratio([2, 4, 6], [1, 2, 3.1]),
    )
    assert math.isclose(there.low * back.high, 1) and math.isclose(there.middle * back.middle, 1)
