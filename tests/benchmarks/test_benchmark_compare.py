"""A comparison calls a change worse or better only where processes bear it out.

The simulation below decides the default number of processes. Run this file by itself for the fuller
one, on whole documents:
`PYTHONPATH=tests/helpers python tests/benchmarks/test_benchmark_compare.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_sessions import CASE

from openelm_mlx.benchmarks.results import PROCESSES
from openelm_mlx.benchmarks.results.compare import CHANCE, compare, lines, merge
from openelm_mlx.benchmarks.results.document import (
    DECODE,
    Document,
    Machine,
    Metric,
    Row,
    completed,
    load,
    save,
)
from openelm_mlx.benchmarks.results.statistics import holm, welch
from openelm_mlx.cli import main
from openelm_mlx.errors import BenchmarkError

FIRST, PREFILL = "time_to_first_token_seconds", "prefill_tokens_per_second"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
QUICK = RESULTS / "linux-epyc-2core-quick.json"
TRIALS = 5


# --- simulation: documents of the quick suite's shape, whose processes differ by 2 %, trials by 3 %


def family_size() -> int:
    """Return how many figures of the quick suite are in the family of tests."""
    document = replace(load(QUICK), ratios=())
    same = compare(*[merge([document] * PROCESSES)] * 2)
    return sum(one.chance is not None for one in same.differences)


def medians(generator, runs, figures, slower=1.0, processes=PROCESSES, shared=False, apart=0.02):
    """Return logarithms of process medians, [runs, figures, processes]: a process is off as a whole
    (`shared`), or in each of its figures by itself.
    """
    trials = np.log(1 + 0.03 * generator.standard_normal((runs, figures, processes, TRIALS)))
    off = generator.standard_normal((runs, 1 if shared else figures, processes))
    return np.median(trials, axis=-1) + apart * off + math.log(slower)


def found(before, after) -> tuple[float, float]:
    """Return the shares of runs in which any figure differs, and in which any is slower."""
    differs = slower = 0
    for old, new in zip(before, after, strict=True):
        chances = np.array(
            holm([welch(*pair) for pair in zip(old.tolist(), new.tolist(), strict=True)])
        )
        differs += bool((chances < CHANCE).any())
        slower += bool(((chances < CHANCE) & (new.mean(-1) > old.mean(-1))).any())
    return differs / len(before), slower / len(before)


@pytest.mark.parametrize("shared", [True, False], ids=["process", "figure"])
def test_false_alarms_are_three_to_seven_in_a_hundred_and_a_tenth_is_found(shared):
    generator, figures = np.random.default_rng(13), family_size()
    assert figures == 15  # 5 rates, 5 first tokens, 3 of reused prefixes, 2 loads
    same = [medians(generator, 1500, figures, shared=shared) for _ in range(2)]
    assert 0.03 <= found(*same)[0] <= 0.07
    slower = [medians(generator, 300, figures, factor, shared=shared) for factor in (1, 1.1)]
    assert found(*slower)[1] >= 0.95


def test_three_processes_would_miss_a_tenth():
    generator = np.random.default_rng(13)
    few = [medians(generator, 300, 15, factor, 3, shared=True) for factor in (1, 1.1)]
    assert found(*few)[1] < 0.9


def simulated(generator, slower=1.0, processes=PROCESSES, apart=0.02) -> Document:
    """Return the quick result as a machine would have given it whose every time is `slower`."""
    document = load(QUICK)
    rows = []
    for row in document.rows:
        metrics = dict(row.metrics)
        for name, metric in row.metrics.items():
            if metric.unit in ("s", "tokens/s"):
                count = 1 if name == "load_seconds" else TRIALS
                off = np.exp(apart * generator.standard_normal((processes, 1))) * slower
                noise = off * (1 + 0.03 * generator.standard_normal((processes, count)))
                trials = metric.median * (noise if metric.unit == "s" else 1 / noise)
                metrics[name] = Metric.of_processes(trials.tolist(), metric.unit)
            else:
                metrics[name] = Metric.of_processes([[metric.median]] * processes, metric.unit)
        work = row.case.batch_size * row.case.prompt_tokens
        rates = [[work / value for value in trials] for trials in metrics[FIRST].processes]
        metrics[PREFILL] = Metric.of_processes(rates, "tokens/s")
        rows.append(replace(row, metrics=metrics))
    return completed(replace(document, rows=tuple(rows), ratios=()))


def test_documents_are_judged_as_the_simulation_does():
    generator = np.random.default_rng(5)
    before, same, slower = (simulated(generator, factor) for factor in (1, 1, 1.1))
    comparison = compare(before, same)
    tested = [one for one in comparison.differences if one.chance is not None]
    logs = [
        [
            np.log([np.median(trials) for trials in rows[one.case].metrics[one.metric].processes])
            for rows in ({row.case: row for row in side.rows} for side in (before, same))
        ]
        for one in tested
    ]
    assert [one.chance for one in tested] == pytest.approx(holm([welch(*pair) for pair in logs]))
    assert len(tested) == 15 and not comparison.regressed and comparison.notes == ()
    assert PREFILL not in {one.metric for one in comparison.differences}
    assert 0.05 < comparison.sensitivity < 0.1
    worse = compare(before, slower)
    assert (
        worse.regressed
        and 0.05 < np.mean([one.change for one in worse.differences if one.metric == FIRST]) < 0.15
    )
    assert not compare(slower, before).regressed


# --- what is compared, and what is said


def result(*processes, metric=DECODE, unit="tokens/s", **case) -> Document:
    """Return a document of one figure, with a list of trials for each process."""
    return Document(
        "", "", (Row(replace(CASE, **case), {metric: Metric.of_processes(processes, unit)}),)
    )


STEADY = [[100.0, 101, 99], [101.0, 102, 100], [99.0, 100, 98]]
FASTER = [[1.1 * trial for trial in trials] for trials in STEADY]


def test_the_command_says_what_changed_and_ends_with_status_1_where_that_is_slower(
    tmp_path, capsys
):
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name, processes in zip(files, (STEADY, FASTER), strict=True):
        save(result(*processes), name)
    assert main(["benchmark", "--compare", *files[::-1]]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "worse: stub none float32 8+9, decode tokens per second: 110 -> 100 (-9.1%)"
    assert told[1] == (
        "0 of 1 figures show no significant difference; smallest change that would have shown: 2% "
        "(median over the times and rates)"
    )
    assert main(["benchmark", "--compare", files[0], files[0]]) == 0
    assert capsys.readouterr().out.startswith("1 of 1 figures show no significant difference; smal")
    assert main(["benchmark", "--compare", *files, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (one,) = told["differences"]
    assert told["regressed"] is False and told["notes"] == [] and one["verdict"] == "better"
    assert one["change"] == pytest.approx(0.1) and one["chance"] < 0.01
    assert one["case"]["model"] == CASE.model and one["before"] == pytest.approx(100)
    assert main(["benchmark", "--compare", *files, "--report", str(tmp_path / "r.html")]) == 2
    assert "--report does not go with --compare, which prints its result" in capsys.readouterr().err


def test_one_process_is_compared_by_its_trials_and_that_is_said():
    one, other = (result(trials) for trials in ([100.0, 101, 99, 100, 102], [90.0, 91, 89, 90, 92]))
    comparison = compare(one, other)
    assert comparison.regressed
    assert comparison.notes == (
        "a result of one process does not tell how processes differ, which by itself can look "
        "like a change; measure both with --processes 5",
    )
    assert compare(result(*STEADY), other).notes == comparison.notes
    assert compare(result(*STEADY), result(*FASTER)).notes == ()


def test_processes_that_differ_as_much_hide_a_change_that_trials_would_show():
    apart = [[100.0, 100.5, 99.5], [110.0, 110.5, 109.5], [90.0, 90.5, 89.5]]
    slower = [[0.95 * trial for trial in trials] for trials in apart]
    assert not compare(result(*apart), result(*slower)).regressed
    assert compare(result(apart[0]), result(slower[0])).regressed


def test_two_processes_that_have_nothing_in_common_show_nothing():
    comparison = compare(result([1.0], [1e9]), result([1e9], [1.0]))
    assert not comparison.regressed and "would have shown: over 1000% (" in lines(comparison)[0]


def test_the_more_figures_are_compared_the_surer_each_must_be():
    def run_of(processes, figures):
        metrics = {DECODE: Metric.of_processes(processes, "tokens/s")}
        cases = (replace(CASE, prompt_tokens=n) for n in range(1, figures + 1))
        return Document("", "", tuple(Row(case, metrics) for case in cases))

    slower = [[0.97 * trial for trial in trials] for trials in STEADY]
    one, many = (compare(run_of(STEADY, n), run_of(slower, n)) for n in (1, 40))
    assert one.differences[0].verdict == "worse" and not many.regressed
    assert many.differences[0].chance == pytest.approx(min(1, 40 * one.differences[0].chance))
    assert many.sensitivity > one.sensitivity


@pytest.mark.parametrize(
    ("metric", "unit", "before", "after", "verdict"),
    [
        ("peak_memory_bytes", "bytes", 1e7, 1.1e7, "same"),  # less than a MiB
        ("peak_memory_bytes", "bytes", 1e7, 1.2e7, "worse"),
        ("peak_memory_bytes", "bytes", 1e9, 1.009e9, "same"),  # less than a hundredth
        ("peak_memory_bytes", "bytes", 1e9, 0.98e9, "better"),
        ("kl_mean", "nats", 0.0500, 0.05005, "same"),
        ("kl_mean", "nats", 0.05, 0.06, "worse"),
        ("top_1_agreement", "share", 0.95, 0.94, "worse"),
        ("tokens_per_pass", "tokens", 1.5, 1.6, "better"),
    ],
)
def test_what_no_clock_measures_is_compared_by_its_resolution(metric, unit, before, after, verdict):
    sides = [result([value], metric=metric, unit=unit) for value in (before, after)]
    (one,) = compare(*sides).differences
    assert one.verdict == verdict and one.chance is None and one.smallest is None
    assert "smallest change" not in lines(compare(*sides))[-2]


def test_a_time_below_the_resolution_of_clocks_has_not_changed():
    fast, slow = ([[n + 1e-7 * i] * 3 for i in range(3)] for n in (2e-5, 9e-5))
    before, after = (result(*side, metric=FIRST, unit="s") for side in (fast, slow))
    (one,) = compare(before, after).differences
    assert one.chance < 0.05 and one.verdict == "same"


def test_a_figure_that_repeats_another_is_not_compared():
    def run_of(factor):
        rates = [[factor * trial for trial in trials] for trials in STEADY]
        times = [[8 / rate for rate in trials] for trials in rates]
        both = {
            PREFILL: Metric.of_processes(rates, "tokens/s"),
            FIRST: Metric.of_processes(times, "s"),
        }
        return Document("", "", (Row(CASE, both),))

    assert [one.metric for one in compare(run_of(1), run_of(0.8)).differences] == [FIRST]
    alone = replace(run_of(1), rows=(Row(CASE, {PREFILL: run_of(1).rows[0].metrics[PREFILL]}),))
    assert [one.metric for one in compare(alone, run_of(1)).differences] == [PREFILL]


def test_what_makes_two_results_hard_to_compare_is_said():
    (row,) = result(*STEADY).rows
    other = Row(replace(CASE, prompt_tokens=9), row.metrics)
    memory = 25276514304
    before = Document(
        "",
        "",
        (row,),
        machine=Machine(chip="a", memory_bytes=memory),
        versions={"mlx": "1"},
        commit="abc",
    )
    busy = Machine(chip="b", load_average=7.25, cores=8, memory_bytes=memory + 4096)
    after = Document(
        "", "", (row, other), machine=busy, versions={"mlx": "2"}, commit="def", partial=True
    )
    assert compare(before, after).notes == (
        "another machine: chip a before, b after",
        "another machine: cores unknown before, 8 after",
        "commit abc before, def after",
        "mlx 1 before, 2 after",
        "the second result is partial: it was interrupted",
        "the machine was busy before the second run: load 7.2 on 8 cores",
        "1 case is in one result only",
    )
    with pytest.raises(BenchmarkError, match="no measurement in common; run the same suite"):
        compare(before, replace(after, rows=(other,)))
    with pytest.raises(BenchmarkError, match="no measurement in common"):
        compare(result([1.0]), result([1.0]))


def test_group_sizes_tell_cases_apart_and_a_hair_does_not():
    results = [result(*STEADY, bits=4, bits_per_weight=bpw) for bpw in (4.5036, 4.53, 5.0)]
    assert len(compare(*results[:2]).differences) == 1
    with pytest.raises(BenchmarkError, match="no measurement in common"):
        compare(results[0], results[2])


if __name__ == "__main__":
    source = np.random.default_rng(1)
    for label, count, apart, slower, runs in (
        ("no change, 5 processes", 5, 0.02, 1.0, 1000),
        ("no change, processes alike", 5, 0.0, 1.0, 500),
        ("no change, 3 processes", 3, 0.02, 1.0, 500),
        ("a tenth slower, 5 processes", 5, 0.02, 1.1, 300),
        ("a twentieth slower, 5 processes", 5, 0.02, 1.05, 300),
        ("a tenth slower, 3 processes", 3, 0.02, 1.1, 300),
        ("no change, 1 process", 1, 0.02, 1.0, 300),
    ):
        runs_of = [
            compare(*(simulated(source, factor, count, apart) for factor in (1.0, slower)))
            for _ in range(runs)
        ]
        differs = sum(any(one.verdict != "same" for one in run.differences) for run in runs_of)
        print(
            f"{label}: any figure differs in {differs / runs:.1%} of runs, slower (status 1) in "
            f"{sum(run.regressed for run in runs_of) / runs:.1%}; it says it would have seen "
            f"{np.median([run.sensitivity for run in runs_of]):.1%}",
            flush=True,
        )
