"""Two models question by question: changes whose number is known, from lm-eval's own results."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
from known_scores import Known, evaluate, write_tasks

from openelm_mlx.errors import EvaluationError
from openelm_mlx.evaluate.differences import ALL, Difference, Differences, mcnemar
from openelm_mlx.evaluate.report import Report, Subject, report


def asked(folder, name: str, **right: tuple[float, ...]) -> Report:
    """Return the report of a model with these shares of acc and acc_norm in tasks of 40."""
    folder.mkdir()
    names = ("acc", "acc_norm")
    tasks = {task: Known(0, dict(zip(names, of, strict=False)), 40) for task, of in right.items()}
    write_tasks(folder, tasks)
    results = evaluate(folder, list(tasks))
    for sample in (one for samples in results["samples"].values() for one in samples):
        sample["doc_hash"] = sample["doc"]["question"]  # without what is to be answered
    return report(results, Subject(name))


@pytest.mark.needs("lm-eval")
def test_changes_are_counted_question_by_question(tmp_path):
    first = asked(tmp_path / "a", "one", quiz=(0.5, 0.25), test=(0.75, 0.75), last=(0.5,))
    second = asked(tmp_path / "b", "two", quiz=(0.25, 0.5), test=(0.75, 0.5), last=(0.25,))
    found = Differences.of(first, second)
    rows = {(row.task, row.metric): row for row in found.rows}
    both = list(product(("quiz", "test", ALL), ("acc", "acc_norm")))
    assert list(rows) == [*both[:4], ("last", "acc"), *both[4:]]
    # those right are the first ones, so that ten questions of forty change, all to one side
    error = 100 * math.sqrt(10 - 10**2 / 40) / math.sqrt(40 * 39)
    expected = Difference(
        "quiz", "quiz", "acc", 40, 50.0, 25.0, 25.0, pytest.approx(error), 10, 0, 2 / 2**10
    )
    assert rows["quiz", "acc"] == expected
    same = rows["test", "acc"]
    assert (same.difference, same.stderr, same.better, same.worse, same.p) == (0, 0, 0, 0, 1)
    whole = rows[ALL, "acc_norm"]  # of the last task it has acc
    assert (whole.questions, whole.better, whole.worse) == (120, 20, 10)
    assert whole.difference == pytest.approx(100 * 10 / 120)
    assert whole.stderr == pytest.approx(100 * math.sqrt((30 - 10**2 / 120) / (120 * 119)))
    line = next(line for line in found.grid() if line[:2] == ["quiz", "acc"])
    assert line[2:] == ["50.00", "25.00", f"+25.00 ±{error:.2f}", "10", "0", "0.002"]
    alone = replace(first, cells=first.cells[:1])
    assert {row.task for row in Differences.of(alone, second).rows} == {first.cells[0].task}
    first.results["samples"]["test"][3]["doc_hash"] = "another"
    with pytest.raises(
        EvaluationError, match="question 3 of test is not the same for one and two; "
    ):
        Differences.of(first, second)


def test_an_uneven_split_is_as_probable_as_it_is_among_all_tosses():
    for better, worse in ((0, 0), (3, 3), (7, 2), (0, 5), (1, 9)):
        heads = [sum(toss) for toss in product((0, 1), repeat=better + worse)]
        uneven = abs(better - worse)
        least = sum(abs(2 * head - better - worse) >= uneven for head in heads) / len(heads)
        assert mcnemar(better, worse) == pytest.approx(least)
    assert mcnemar(2600, 2400) == pytest.approx(0.0049, abs=1e-4)  # beyond what a float can hold
