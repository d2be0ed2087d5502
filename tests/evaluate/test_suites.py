"""The suites and Apple's figures: what is published, what is asked, and that one fits the other."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import openelm_mlx
from openelm_mlx.engine.hub import SHORT_NAMES
from openelm_mlx.evaluate.suites import (
    AVERAGE,
    SUITES,
    TASKS,
    figures,
    published,
    row_of,
    source_of,
)

TABLES = published()["tables"]
CARD = ("zero-shot", "openllm", "llm360")  # the tables of the model card
COMMONSENSE = Path(openelm_mlx.__file__).parent / "assets" / "commonsense"
CELLS = [
    (suite, row, task, figure)
    for suite, table in TABLES.items()
    for row, line in table["rows"].items()
    for task, figure in line.items()
]
# of two rows the card prints another average than that of the figures beside it
PRINTED = {("llm360", "OpenELM-450M"): 0.006, ("openllm", "OpenELM-3B-Instruct"): -0.00625}


def test_all_published_models_have_a_row_in_each_table_with_its_source():
    rows = {hub_id.removeprefix("apple/") for hub_id in SHORT_NAMES.values()}
    assert len(rows) == 8 and set(TABLES) == set(SUITES)
    assert all(set(TABLES[suite]["rows"]) == rows for suite in CARD)
    assert {source_of(row)["url"] for row in rows} == {"https://huggingface.co/apple/OpenELM"}
    assert source_of("OpenELM-270M-LoRA")["url"].endswith("projects/openelm/README-peft.md")
    assert figures("zero-shot", "OpenELM-270M")["sciq"] == 84.70
    assert figures("zero-shot", None) == figures("commonsense", "OpenELM-270M") == {}


@pytest.mark.parametrize("suite", CARD)
def test_averages_are_those_of_the_figures_in_their_rows(suite: str):
    for row in TABLES[suite]["rows"]:
        line = figures(suite, row)
        printed = line.pop(AVERAGE)
        wrong = PRINTED.get((suite, row), 0)
        assert sum(line.values()) / len(line) == pytest.approx(printed - wrong, abs=0.00501), row


def test_a_table_has_a_column_for_each_task_of_its_suite_with_the_shots_of_apples_commands():
    commands = {
        (run["num_fewshot"], task)
        for run in published()["protocol"]["runs"]
        for task in run["tasks"]
    }
    asked = set()
    for suite in SUITES.values():
        columns = {*suite.shots, AVERAGE} if suite.name in CARD else set(suite.shots)
        assert all(set(line) == columns for line in TABLES[suite.name]["rows"].values())
        if suite.name in CARD:
            asked |= {(shots, task) for task, shots in suite.shots.items()}
    assert asked == commands
    assert set(TASKS) == {task for suite in SUITES.values() for task in suite.shots}


def test_a_task_of_the_same_shots_has_the_same_figure_in_all_tables():
    seen: dict[tuple[str, str, int], set[float]] = {}
    for suite, row, task, figure in CELLS:
        if task != AVERAGE:
            seen.setdefault((row, task, SUITES[suite].shots[task]), set()).add(figure)
    assert {len(found) for found in seen.values()} == {1}
    assert len(seen) == 8 * (7 + 7) + 8  # PIQA without shots is in two tables


def test_a_figure_is_a_whole_number_of_questions():
    """It tells that the sizes of the splits are right; the exception is a mean of probabilities."""
    for suite, row, task, figure in CELLS:
        if task in (AVERAGE, "truthfulqa_mc2"):
            continue
        asked = TASKS[task].questions
        right = round(figure / 100 * asked)
        assert round(100 * right / asked, 2) == figure, (suite, row, task)


@pytest.mark.parametrize("name", [*SHORT_NAMES, *SHORT_NAMES.values()])
def test_a_published_model_is_found_by_each_of_its_names(name: str):
    assert row_of(name) == SHORT_NAMES.get(name, name).removeprefix("apple/")


def test_names_of_conversions_and_of_corenets_files():
    assert row_of("mlx-community/OpenELM-1_1B-Instruct-4bit") == "OpenELM-1_1B-Instruct"
    assert row_of("corenet:3b") == row_of("corenet-mlx:3b-4bit") == "OpenELM-3B"
    assert row_of("corenet:270m-lora") == "OpenELM-270M-LoRA"
    others = (
        "270m-lora",
        "corenet:450m-lora",
        "openelm-tiny",
        "corenet:270m@100k",
        "OpenELM-270M-story",
        "7b",
        "",
    )
    assert [row_of(name) for name in others] == [None] * len(others)


VERSIONS = {  # of the tasks that docs/evaluating.md compares with those of Apple's run
    "arc_challenge": ("arc", 1.0),
    "arc_easy": ("arc", 1.0),
    "boolq": ("super_glue/boolq", 2.0),
    "crows_pairs_english": ("crows_pairs", 1.0),
    "hellaswag": ("hellaswag", 1.0),
    "mmlu": ("mmlu/default", 2),
    "piqa": ("piqa", 1.0),
    "race": ("race", 3.0),
    "sciq": ("sciq", 1.0),
    "truthfulqa_mc2": ("truthfulqa", 3.0),
    "winogrande": ("winogrande", 1.0),
}


@pytest.mark.needs("lm-eval")
@pytest.mark.parametrize("task", VERSIONS)
def test_lm_eval_has_the_task_with_these_metrics(task: str):
    folder, version = VERSIONS[task]
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    for path in (Path(spec.origin).parent / "tasks" / folder).glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^(task|group): {task}$", text, re.MULTILINE):
            break
    while found := re.search(r"^include: (.*)$", text, re.MULTILINE):
        more = path.with_name(found[1]).read_text(encoding="utf-8")
        text = text.replace(found[0], more if "metric_list" not in text else "")
    metrics = set(re.findall(r"metric: (\w+)", text))
    assert set(TASKS[task].metrics) <= metrics
    assert metrics & {"acc", "acc_norm", "pct_stereotype"} == set(TASKS[task].metrics)
    assert float(re.findall(r"version: ([\d.]+)", text)[0]) == version


def test_commonsense_is_asked_from_the_files_that_corenet_used():
    files = {path.stem: path.read_text(encoding="utf-8") for path in COMMONSENSE.glob("*.yaml")}
    assert set(files) == set(SUITES["commonsense"].shots) == set(TASKS) - set(VERSIONS)
    commit = TABLES["commonsense"]["protocol"]["datasets"].split()[-1]
    root = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters"
    for name, text in files.items():
        assert f"\ntask: {name}\n" in text and f" {root}/{commit}/dataset/" in text


# what CoreNet's get_loglikelihood_inputs makes of a question, trailing spaces and all
INSTRUCTION = "Who left?\n\nAnswer1: Ann Answer2: Bob Answer3: Eve\n\nAnswer format: "
CONTEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.  \n\n                ### Instruction:\n                {}\n"
    "                \n                ### Response:\n                "
)


@pytest.mark.needs("lm-eval")
@pytest.mark.parametrize(
    ("form", "answer", "place"),
    [("true/false", "false", 1), ("answer1/answer2/answer3", "answer1", 0)],
)
def test_commonsense_has_corenets_prompts(tmp_path, form: str, answer: str, place: int):
    from lm_eval.tasks import TaskManager

    doc = {"instruction": INSTRUCTION + form, "input": "", "output": "", "answer": answer}
    (tmp_path / "test.json").write_text(json.dumps([doc]))
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'test.json'}}}}}\n"
    include = f"include: {COMMONSENSE / '_commonsense_yaml'}\n"
    (tmp_path / "mine.yaml").write_text(f"{include}task: mine\n{data}")
    task = TaskManager(include_path=tmp_path, include_defaults=False).load("mine")["tasks"]["mine"]
    task.build_all_requests(rank=0, world_size=1)
    context = CONTEXT.format(INSTRUCTION + form)
    assert [one.args for one in task.instances] == [
        (context, f"the correct answer is {choice}") for choice in form.split("/")
    ]
    assert task.doc_to_target(doc) == place


@pytest.mark.needs("lm-eval")
def test_without_a_network_the_questions_are_missing_in_one_line():
    from openelm_mlx.evaluate.tasks import find_tasks, why_not_loaded

    task = "commonsense_siqa"
    error = FileNotFoundError("Unable to find it")
    assert re.fullmatch(
        "task commonsense_siqa: its data are not on this disk, and https://raw.*/social_i_qa/"
        "test.json cannot be reached. Check the network and any proxy; they are downloaded once. "
        "fairy_tales needs no network",
        why_not_loaded(find_tasks([task]).task_index, task, error),
    )
