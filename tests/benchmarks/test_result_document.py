"""The result document: what follows from trials, what is refused, merged processes, old files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from bench_document import CASE, RATE, rich_document, small_document

from openelm_mlx.benchmarks.results import document as results
from openelm_mlx.benchmarks.results.compare import merge
from openelm_mlx.benchmarks.results.document import (
    DECODE,
    Document,
    Machine,
    Metric,
    Ratio,
    Row,
    completed,
)
from openelm_mlx.benchmarks.results.statistics import interval, paired_ratio
from openelm_mlx.errors import BenchmarkError

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


def test_median_and_quartiles():
    metric = Metric.of([5, 1, 4, 2, 3], "s")
    assert (metric.median, metric.q1, metric.q3) == (3, 2, 4)
    assert metric.spread == 2 / 3
    one = Metric.of([2.5], "tokens/s")
    assert (one.median, one.q1, one.q3) == (2.5, 2.5, 2.5)
    with pytest.raises(BenchmarkError, match="at least one trial"):
        Metric.of([], "s")


def test_the_median_is_that_of_the_process_medians():
    metric = Metric.of_processes([[1, 2, 3], [10, 10, 10, 10, 10], [], [4, 5, 6]], "s")
    assert metric.median == 5 and metric.values == (1, 2, 3, 10, 10, 10, 10, 10, 4, 5, 6)
    assert (metric.q1, metric.q3) == (3.5, 10)


def test_a_document_survives_its_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    results.save(small_document(), file)
    assert results.load(file) == small_document()
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(BenchmarkError, match="cannot write .*; give a file in a folder that exist"):
        results.save(small_document(), tmp_path / "none" / "x.json")


def put(value, *path):
    """Return a change that puts `value` at `path`."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def rate(value, name):
    """Return a change to the second row's only metric."""
    return put(value, "rows", 1, "metrics", DECODE, name)


def case(value, name):
    return put(value, "rows", 0, "case", name)


TRIALS = ("rows", 0, "metrics", DECODE, "processes")


def broken(change):
    data = json.loads(results.to_json(small_document()))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "schema is None; this version reads 'openelm-mlx benchmark 2'"),
        (broken(put("x 9", "schema")), "schema is 'x 9'"),
        (broken(lambda d: d.pop("created")), "created is missing"),
        (broken(put(1, "extra")), "extra is not a key of this schema"),
        (broken(case(1, "seed")), r"rows\[0\].case.seed is not a key of this schema"),
        (broken(put({}, "rows")), r"rows is \{\}; expected a list"),
        (broken(put(1, "partial")), "partial is 1; expected true or false"),
        (broken(put([], "machine")), r"machine is \[\]; expected an object"),
        (broken(put("8", "machine", "cores")), "machine.cores is '8'; expected a whole number"),
        (broken(put(math.inf, "machine", "load_average")), "average is inf; expected a finite"),
        (broken(put(5, "rows", 1)), r"rows\[1\] is 5; expected an object"),
        (broken(put(5, "rows", 1, "metrics")), r"rows\[1\].metrics is 5; expected an object"),
        (broken(case("64", "prompt_tokens")), "case.prompt_tokens is '64'; expected a whole"),
        (broken(case(6.5, "prompt_tokens")), "case.prompt_tokens is 6.5; expected a whole"),
        (broken(case(0, "batch_size")), "batch_size is 0; expected a number from 1 up"),
        (broken(case(None, "model")), "case.model is None; expected a text"),
        (broken(case(["x"] * 99, "model")), r"model is \['x', .*\.\.\.; expected a text"),
        (
            broken(
                lambda d: d["rows"][2].update(metrics={"speed": d["rows"][1]["metrics"][DECODE]})
            ),
            r"rows\[2\].metrics.speed is not a metric of this schema; known: prefill",
        ),
        (broken(rate("s", "unit")), r"unit is 's', but 'tokens/s' follows from the trials"),
        (broken(rate([], "processes")), "has 0 trials in 0 lists; expected at least one trial, in"),
        (broken(rate([[]], "processes")), "has 0 trials in 1 lists"),
        (broken(rate([[5.0], [6.0]], "processes")), "trials in 1 lists; .* in 2 lists"),
        (broken(rate([[1, True]], "processes")), r"es\[0\]\[1\] is True; expected a finite number"),
        (broken(rate(math.nan, "q3")), "q3 is nan; expected a finite"),
        (broken(rate(60, "median")), "median is 60.0, but 50.0 follows from the trials"),
        (broken(rate(60, "q1")), "q1 is 60.0, but 49.5 follows"),
        (
            broken(put(99, "rows", 0, "percent_of_bound")),
            r"rows\[0\].percent_of_bound is 99.0, but 50",
        ),
        (
            broken(put(9, "rows", 1, "percent_of_bound")),
            r"rows\[1\].percent_of_bound is 9.0, but None",
        ),
        (
            broken(put(9, "rows", 0, "bound_tokens_per_second")),
            r"\[0\].bound_\S+ is 9.0, but 200.0",
        ),
        (
            broken(put(1.55e6, "machine", "copy_bytes_per_second")),
            r"rows\[0\].bound_.* is 200.0, but",
        ),
        (broken(put(9.99, "ratios", 0, "ratio")), r"ratios\[0\].ratio is 9.99, but 2.0"),
        (broken(put(1.0, "ratios", 0, "low")), r"ratios\[0\].low is 1.0, but 1.9"),
        (broken(put(3, "ratios", 0, "high")), r"ratios\[0\].high is 3.0, but 2.0"),
        (
            broken(put(9, "ratios", 0, "against")),
            r"ratios\[0\] is of .* in rows 0 and 9; expected the rows",
        ),
        (broken(put(-1, "ratios", 0, "row")), r"ratios\[0\] is of .* in rows -1 and 1; expected"),
        (
            broken(put(2, "ratios", 0, "against")),
            r"in rows 0 and 2; .* that have measured it in the same case",
        ),
        (
            broken(put(0, "ratios", 0, "against")),
            "in rows 0 and 0; expected the rows of two engines",
        ),
        (
            broken(case(9, "prompt_tokens")),
            r"ratios\[0\] is of decode_.* in rows 0 and 1; expected",
        ),
        (broken(rate([[50]], "processes")), r"ratios\[0\] needs two pairs of trials above 0"),
        (broken(rate([[1e308, 1.7e308]], "processes")), "figures are too far apart to be comp"),
        (broken(put([[1e-300, 1e300, 1e-300, 1e300, 1]], *TRIALS)), "figures are too far apart"),
        (broken(put(10**400, "machine", "load_average")), "load_average is .*; expected a finite"),
        (broken(put("\ud800", "command")), "the document is .*; expected"),
        ("[" * 100000, "it is not JSON"),
        ('{"schema": "openelm-mlx benchmark 1", "rows": ' + 480 * "[" + 480 * "]" + "}", ": "),
        (broken(rate([[5, 0]], "processes")), r"ratios\[0\] needs two pairs of trials above 0"),
        (
            broken(rate([[5, -5]], "processes")),
            r"processes\[0\]\[1\] is -5; expected a number",
        ),
        (broken(put(-2, "machine", "cores")), "machine.cores is -2; expected a number from 1 up"),
    ],
)
def test_a_damaged_document_is_refused_by_file_and_place(tmp_path, text, message):
    file = tmp_path / "damaged.json"
    file.write_text(text)
    with pytest.raises(BenchmarkError, match=message) as error:
        results.load(file)
    assert str(error.value).startswith(f"{file}: ") or text[0] in "{["
    assert "\n" not in str(error.value)
    with pytest.raises(BenchmarkError, match="cannot read .*No such file.*openelm benchmark --out"):
        results.load(tmp_path / "none.json")


def leaves(value, path=()):
    """Yield the paths of all numbers but what was measured and what is a fact."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if key not in ("processes", "bytes_per_token", "machine", "bits_per_weight"):
                yield from leaves(item, (*path, key))
    elif isinstance(value, float):
        yield path


def test_no_figure_that_follows_from_trials_can_be_changed():
    text = results.to_json(rich_document())
    paths = list(leaves(json.loads(text)))
    assert len(paths) > 200
    for path in paths[:: len(paths) // 50]:
        data = json.loads(text)
        put(77.125, *path)(data)
        with pytest.raises(BenchmarkError, match=f"{path[-1]} is 77.125, but .* follows from the"):
            results.from_json(data)


# --- processes


def process(factor: float, **changes) -> Document:
    """Return what one process measured whose every rate is off by `factor`."""
    plain = small_document()
    rows = [
        replace(
            row,
            metrics={
                name: Metric.of([factor * value for value in metric.values], metric.unit)
                for name, metric in row.metrics.items()
            },
        )
        for row in plain.rows
    ]
    return replace(completed(replace(plain, rows=tuple(rows))), **changes)


def test_processes_merge_into_one_document_and_pairs_stay_in_their_process():
    one = merge([process(1), process(1.2), process(0.9)])
    ours, theirs, untimed = one.rows
    assert one.processes == 3 and ours.metrics[DECODE].median == RATE.median
    assert [len(trials) for trials in ours.metrics[DECODE].processes] == [5, 5, 5]
    assert theirs.agrees and untimed.parts_at == 7 and one.notes == ("a note",)
    (ratio,) = one.ratios  # each process has the same ratio, so that three agree completely
    assert (ratio.row, ratio.against) == (0, 1)
    assert ratio.low == pytest.approx(ratio.ratio) == pytest.approx(ratio.high)
    assert ratio.ratio == pytest.approx(2)
    assert results.from_json(json.loads(results.to_json(one))) == one
    assert merge([one, process(1.1)]) == merge([process(f) for f in (1, 1.2, 0.9, 1.1)])
    assert merge([process(1)]) == process(1)


def test_what_differs_between_processes_is_kept_by_process():
    hot = replace(small_document().machine, load_average=9.0, copy_bytes_per_second=4100.0)
    first, short = process(1), process(1, machine=hot, notes=("a note", "hot"), partial=True)
    short = completed(replace(short, rows=short.rows[:1], ratios=()))
    one = merge([first, short])
    assert one.partial and one.notes == ("a note", "hot")
    assert one.machine == replace(first.machine, copy_bytes_per_second=3600.0)
    assert one.rows[0].bound_tokens_per_second == pytest.approx(3600 / 15.5)
    assert one.rows[1].metrics[DECODE].processes[1] == ()
    assert one.ratios == first.ratios
    assert results.from_json(json.loads(results.to_json(one))) == one


@pytest.mark.parametrize(
    "changes",
    [{"command": "other"}, {"suite": None}, {"commit": "abc"}, {"machine": Machine(chip="B")}],
    ids=lambda changes: next(iter(changes)),
)
def test_documents_of_different_runs_do_not_merge(changes):
    with pytest.raises(BenchmarkError, match="merge are of different commands, commits or machin"):
        merge([small_document(), small_document(**changes)])
    with pytest.raises(BenchmarkError, match="nothing to merge: give at least one result"):
        merge([])


def test_a_ratio_of_processes_is_that_of_their_medians():
    """A process is off as a whole in one of its engines: only several processes can tell."""
    ours = [[100.0, 101, 99], [110.0, 109, 111], [90.0, 91, 89]]
    theirs = [[50.0, 50, 50]] * 3
    found = paired_ratio(ours, theirs)
    logs = interval([math.log(2), math.log(2.2), math.log(1.8)])
    assert found == pytest.approx([math.exp(edge) for edge in logs])
    alone = paired_ratio(ours[:1], theirs[:1])
    assert alone.high - alone.low < (found.high - found.low) / 4


# --- files of the schema before


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_results_load_as_one_process(file):
    document, data = results.load(file), json.loads(file.read_text(encoding="utf-8"))
    assert document.processes == 1 and document.schema == results.SCHEMA
    assert document.machine.copy_bytes_per_second == data["machine"]["bandwidth_bytes_per_second"]
    for row, stored in zip(document.rows, data["rows"], strict=True):
        assert row.percent_of_bound == pytest.approx(stored["percent_of_bound"])
        for name, metric in row.metrics.items():
            assert metric.median == stored["metrics"][name]["median"]
    for ratio, stored in zip(document.ratios, data["ratios"], strict=True):
        assert ratio.low < ratio.ratio < ratio.high
        assert stored["low"] < ratio.ratio < stored["high"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("rows", 0, "percent_of_bound"), r"rows\[0\].percent_of_bound is 99.0, but 4.33"),
        (("rows", 0, "metrics", DECODE, "median"), "tokens_per_second.median is 99.0, but 157"),
        (("ratios", 0, "row"), "in rows 99 and 1; expected the rows"),
    ],
)
def test_a_tampered_file_of_the_schema_before_is_refused(path, message):
    file = next(file for file in COMMITTED if file.stem.endswith("quick"))
    data = json.loads(file.read_text(encoding="utf-8"))
    put(99, *path)(data)
    with pytest.raises(BenchmarkError, match=message):
        results.from_json(data)


def test_a_row_without_a_bandwidth_has_no_bound():
    row = Row(CASE, {DECODE: RATE}, {"ffn": 5.0})
    plain = completed(Document("", "", (row,)))
    assert plain.rows == (row,)
    fast = completed(replace(plain, machine=Machine(copy_bytes_per_second=1000.0)))
    assert fast.rows[0].bound_tokens_per_second == 200 and fast.rows[0].percent_of_bound == 50
    with pytest.raises(BenchmarkError, match="in rows 0 and 0; expected the rows of two"):
        completed(replace(plain, ratios=(Ratio(DECODE, 0, 0),)))
