"""Reports of a model whose scores are known: cell by cell, and what is said of them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
from known_scores import Known, evaluate, stated, write_tasks

from openelm_mlx.evaluate.report import Report, Subject, report
from openelm_mlx.evaluate.suites import AVERAGE, SUITES, TASKS, figures, published
from openelm_mlx.evaluate.tables import ERROR
from openelm_mlx.model.config import OpenELMConfig

TABLES = [(suite, row) for suite, table in published()["tables"].items() for row in table["rows"]]


def fewest(figure: float, least: int) -> int:
    """Return how few questions can have a share of this figure, rounded to two decimals."""
    sizes = range(least, 20000)
    return next(n for n in sizes if round(100 * round(figure / 100 * n) / n, 2) == figure)


def known(suite: str, row: str, small: bool = False, by: float = 0) -> dict[str, Known]:
    """Return tasks with Apple's scores, `by` standard errors off, for acc in one task and acc_norm
    in the next; the other metric is far off.
    """
    tasks = {}
    for number, (task, shots) in enumerate(SUITES[suite].shots.items()):
        share = figures(suite, row)[task] / 100
        count = fewest(100 * share, shots + 2) if small else TASKS[task].questions
        share += by * math.sqrt(share * (1 - share) / (count - 1))
        names = TASKS[task].metrics
        names = names if number % 2 else names[::-1]
        far = (1 + share) / 2 if by > 0 else share / 2
        right = {name: share if name == names[0] else far for name in names}
        right = {name: right[name] for name in TASKS[task].metrics}
        tasks[task] = Known(shots, right, count, parts=2 if small and task == "mmlu" else 1)
    return tasks


def check_cells(found: Report, suite: str, row: str, verdict: str) -> None:
    table = figures(suite, row)
    assert [cell.task for cell in found.cells] == list(SUITES[suite].shots)
    for number, cell in enumerate(found.cells):
        assert cell.published == table[cell.task]
        assert cell.shots == SUITES[suite].shots[cell.task]
        names = TASKS[cell.task].metrics
        assert [score.metric for score in cell.scores] == list(names)
        assert cell.compared is not None
        assert cell.compared.metric == (names if number % 2 else names[::-1])[0]
        assert cell.verdict == verdict, cell
        if verdict == "within 2":
            assert round(cell.compared.value, 2) == table[cell.task]
    assert found.average is not None and found.average.published == table.get(AVERAGE)


@pytest.mark.parametrize(("suite", "row"), TABLES)
def test_a_model_with_apples_scores_reproduces_its_row(suite: str, row: str):
    found = report(stated(known(suite, row)), Subject("m", row), suite)
    check_cells(found, suite, row, "within 2")
    assert found.average is not None
    if AVERAGE in figures(suite, row):
        assert found.average.compared is not None and found.average.verdict == "within 2"
        printed = pytest.approx(figures(suite, row)[AVERAGE], abs=0.0125)
        assert found.average.compared.value == printed


@pytest.mark.parametrize(("suite", "row"), TABLES)
@pytest.mark.parametrize("by", [-3, 3])
def test_three_standard_errors_away_is_beyond(suite: str, row: str, by: int):
    results = stated(known(suite, row, by=by))
    found = report(results, Subject("m", row), suite)
    check_cells(found, suite, row, "beyond 2")
    for cell in found.cells:
        assert cell.compared is not None
        ours = results["results"][cell.task]
        off = ours[f"{cell.compared.metric},none"] - figures(suite, row)[cell.task] / 100
        errors = off / ours[f"{cell.compared.metric}_stderr,none"]
        assert cell.compared.errors == pytest.approx(errors)
        assert errors * by > 6


@pytest.mark.needs("lm-eval")
@pytest.mark.parametrize("by", [0, 3])
def test_lm_eval_itself_gives_the_row_of_a_table(tmp_path, by: int):
    suite, row = "openllm", "OpenELM-270M"
    write_tasks(tmp_path, known(suite, row, small=True, by=by))
    found = report(evaluate(tmp_path, list(SUITES[suite].shots)), Subject("m", row), suite)
    check_cells(found, suite, row, "beyond 2" if by else "within 2")
    versions = {cell.task: cell.version for cell in found.cells}
    assert versions["arc_challenge"] == "Yaml" and versions["mmlu"] == "N/A"
    (note,) = [note for note in found.notes if note.startswith("Not as many questions as Apple")]
    assert "HellaSwag 123 (Apple's 10,042)" in note and note.count("Apple's") == 8


ARC = known("llm360", "OpenELM-270M")["arc_challenge"]
SUBJECT = Subject("m", "OpenELM-270M")


def test_a_part_of_the_questions_has_no_verdict():
    results = stated({"arc_challenge": ARC})
    results["n-samples"]["arc_challenge"]["effective"] = 20
    found = report(results, SUBJECT)
    (cell,) = found.cells
    assert cell.published == 27.65 and cell.verdict is None and found.average is None
    assert found.grid()[1][:3] == ["ARC-c", "25", "20 of 1,172"]
    part = "Only a part of the questions was asked, the first ones"
    assert f"{part}, so that there is no verdict." in found.notes
    assert report(results, Subject("m")).notes == (f"{part}.", ERROR)


def test_both_metrics_are_shown_whichever_is_compared():
    found = report(
        stated({"arc_challenge": replace(ARC, right={"acc": 0.2, "acc_norm": 0.3})}), SUBJECT
    )
    lines = found.grid()
    assert lines[1][3:] == ["acc", "19.97 ±1.17", "27.65", "-6.6", ""]
    assert lines[2][3:] == ["acc_norm", "30.03 ±1.34", "", "+1.8", "within 2"]
    text = json.dumps(found.as_dict(), allow_nan=False)
    (task,) = json.loads(text)["tasks"]
    assert [score["metric"] for score in task["scores"]] == ["acc", "acc_norm"]
    assert (task["compared"], task["verdict"]) == ("acc_norm", "within 2")
    assert json.loads(text)["source"]["url"] == "https://huggingface.co/apple/OpenELM"
    assert "| ARC-c | 25 | 1,172 | acc | 19.97 ±1.17 | 27.65 | -6.6 |  |" in str(found)


def test_other_shots_another_model_and_a_chat_template_are_not_compared():
    results = stated({"arc_challenge": replace(ARC, shots=3)})
    of_other_shots = report(results, SUBJECT)
    assert of_other_shots.cells[0].published is None and of_other_shots.title == "m"
    assert of_other_shots.as_dict()["source"] is None
    results = stated({"arc_challenge": ARC})
    other = report(results, Subject("m"))
    assert other.cells[0].published is None and other.grid()[0][-1] == "score ±s.e."
    chat = report(results | {"chat_template": "{{ messages }}"}, SUBJECT)
    assert chat.row is None and chat.cells == other.cells
    put = "Each question was put as a message of a chat."
    none = "Apple used no chat template, so that no figure of Apple's is shown."
    assert chat.notes == (put, none, ERROR)
    of_others = report(results | {"chat_template": "{{ messages }}"}, Subject("m"))
    assert of_others.notes == (put, ERROR)


def test_a_score_without_a_standard_error_has_no_verdict():
    results = stated({"arc_challenge": ARC})
    results["results"]["arc_challenge"] |= {"acc_stderr,none": "N/A", "acc_norm_stderr,none": 0.0}
    (cell,) = report(results, SUBJECT).cells
    assert [score.errors for score in cell.scores] == [None, None] and cell.verdict is None


def test_questions_that_lost_their_beginning_are_counted_in_groups_too():
    tasks = {name: Known(5, {"acc": 0.25}, 100) for name in ("mmlu", "mmlu_a", "mmlu_b")}
    results = stated(tasks) | {"truncated": {"mmlu_a": 2, "mmlu_b": 1}}
    del results["n-samples"]["mmlu"], results["n-shot"]["mmlu"]  # as lm-eval's are
    results["group_subtasks"] = {"mmlu": ["inner", "mmlu_b"], "inner": ["mmlu_a"]}
    found = report(results, Subject("m"))
    assert [(cell.task, cell.shots, cell.asked, cell.truncated) for cell in found.cells] == [
        ("mmlu", 5, 200, 3)
    ]
    assert found.notes == (
        "MMLU: 3 of 200 questions were longer than the context and lost their beginning.",
        ERROR,
    )


def test_a_model_without_figures_has_averages_of_either_metric():
    tasks = known("zero-shot", "OpenELM-270M")
    task = Known(0, {"acc": 0.5, "acc_norm": 0.25}, 100)
    found = report(stated(dict.fromkeys(tasks, task)), Subject("m"), "zero-shot")
    assert found.average is not None and found.average.published is None
    assert [score.value for score in found.average.scores] == [50, pytest.approx(50 - 25 * 5 / 7)]
    assert found.average.scores[0].stderr == pytest.approx(100 * (0.25 / 99 / 7) ** 0.5)
    del tasks["sciq"]
    assert report(stated(tasks), Subject("m"), "zero-shot").average is None


def test_a_terminal_of_80_columns_shows_every_figure():
    from rich.console import Console

    tasks = known("openllm", "OpenELM-270M-Instruct")
    console = Console(width=80, file=io.StringIO())
    console.print(report(stated(tasks), Subject("m", "OpenELM-450M-Instruct"), "openllm"))
    text = console.file.getvalue()
    assert " pct_stereotype 66.01 ±1.16 67.44" in text
    assert [line.split()[0] for line in text.splitlines() if "0,042" in line] == ["HellaSwag"]
    assert "\n\n- CrowS-Pairs is" in text and "\n  one: not an accuracy" in text
    few = known("openllm", "OpenELM-270M-Instruct") | {"mmlu": Known(5, {"acc": 0.25}, 14042)}
    results = stated(few)
    for counts in results["n-samples"].values():
        counts["effective"] = 100
    console.print(report(results, Subject("m", "OpenELM-450M-Instruct"), "openllm"))
    part = console.file.getvalue().removeprefix(text)
    assert "MMLU               5 100 of 14,042 acc" in part and " off\n" in part
    assert "pct_stereotype 66.01 ±1.16 67.44" in part


def test_the_row_of_a_model_is_that_of_its_name_or_of_what_was_converted(tiny, tmp_path):
    def row(name: str, **record: object) -> Subject:
        (tmp_path / "conversion.json").write_text(json.dumps(record))
        config = OpenELMConfig.from_name("450m")
        return Subject.of(replace(tiny, name=name, config=config, path=tmp_path, **changes))

    changes: dict = {"quantization": None}
    assert row("450m-instruct") == Subject("450m-instruct", "OpenELM-450M-Instruct")
    assert row("mine", source="apple/OpenELM-450M") == Subject("mine", "OpenELM-450M")
    assert row("450m", source="a story") == Subject("450m")
    assert row("270m") == Subject("270m")  # but these weights are of another size
    note = "It has an adapter, so that it is not compared with Apple's figures."
    assert row("450m", adapter="merged") == Subject("450m", None, (note,))
    changes["quantization"] = {"bits": 4, "group_size": 64}
    note = "It is quantized; Apple's OpenELM-450M was not."
    assert row("450m") == Subject("450m", "OpenELM-450M", (note,))
    assert Subject.of(tiny) == Subject(tiny.name)
