"""Finding and loading lm-eval's tasks, and what is said of those that cannot be asked."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module

import pytest
from local_tasks import CHOICE, TASKS, write
from optional import hide

from openelm_mlx.errors import EvaluationError, OptionError

pytestmark = pytest.mark.needs("lm-eval")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("lost", "task lost: its data file {folder}/lost.jsonl is missing"),
        ("odd", "task odd cannot be loaded: ValueError: Got invalid output_type 'translate'"),
        ("blank", "task blank cannot be loaded: UndefinedError: 'queston' is undefined"),
        ("shots", "task shots fails: ValueError: Sample larger than population"),
        ("unsafe", "task unsafe runs code that the model writes, which is not done here; in a"),
        ("seen", "task seen asks about images or sound; OpenELM reads text only"),
        ("nothing", "task nothing, question 1: the continuation has no token of its own"),
        ("endless", "task endless, question 1: the continuation has 1500 tokens; the model's"),
        ("marked", "a text has the noncharacter U+FDD0, which marks turns of a chat here; remove"),
        (
            "sampled",
            "task sampled, question 1: it samples, with a temperature of 0.5; answ",
        ),
        ("beams", "task beams, question 1: num_beams is not known here; allowed are until and"),
        ("long_answers", "task long_answers, question 1: answers have up to 1024 tokens; the mode"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(lm, folder, task, said):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    written = TASKS["written"]
    odd = {
        "odd": CHOICE | {"output_type": "translate"},
        "blank": CHOICE | {"doc_to_text": "{{queston}}"},
        "shots": TASKS["solved"] | {"num_fewshot": 9},
        "seen": CHOICE | {"doc_to_image": "question"},
        "unsafe": CHOICE | {"unsafe_code": True},
        "nothing": CHOICE
        | {"doc_to_text": "Once upon a tim", "doc_to_choice": ["e", "x"], "target_delimiter": ""},
        "endless": CHOICE | {"doc_to_choice": ["king " * 1499 + "king", "a"]},
        "marked": CHOICE | {"doc_to_text": "a \ufdd0 b"},
        "sampled": written | {"generation_kwargs": {"do_sample": True, "temperature": 0.5}},
        "beams": written | {"generation_kwargs": {"num_beams": 2}},
        "long_answers": written | {"generation_kwargs": {"max_gen_toks": 1024}},
    }
    if task in odd:
        write(folder, task, odd[task])
    write(folder, "lost", CHOICE, "lost.jsonl")
    with pytest.raises(EvaluationError) as caught:
        evaluate_tasks(lm, {task: None}, include=[folder])
    text = str(caught.value)
    assert text.startswith(said.format(folder=folder)) and "\n" not in text


def test_a_name_that_is_not_known(lm, folder, tmp_path, monkeypatch):
    from openelm_mlx.evaluate import tasks
    from openelm_mlx.evaluate.harness import evaluate_tasks

    (tmp_path / "lm_eval" / "stories").mkdir(parents=True)
    monkeypatch.setattr(tasks, "library", lambda: tmp_path / "lm_eval")
    (tmp_path / "lm_eval" / "stories" / "_template").write_text("tag:\n- tales_of_kings\n")
    (tmp_path / "lm_eval" / "stories" / "one.yaml").write_text('task: "cat_tales"  # of cats')
    with pytest.raises(EvaluationError, match="there is no task 'chocie'; did you mean 'choice'"):
        evaluate_tasks(lm, {"chocie": None}, include=[folder])
    with pytest.raises(EvaluationError, match="there is no task 'xyz'; python -m openelm_mlx.eva"):
        evaluate_tasks(lm, {"xyz": None}, include=[folder])
    for name in ("tales_of_kings", "cat_tales"):  # those of lm-eval may be anywhere in its files
        assert tasks.check_mentioned([name], {}, []) is None
    for name in ("cat_tale", "cats_tales"):
        with pytest.raises(EvaluationError, match=f"no task '{name}'; did you mean 'cat_tales'"):
            evaluate_tasks(lm, {name: None})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "broken.yaml").write_text("task: [a\n")
    with pytest.raises(EvaluationError, match=r"no task 'xyz', and .*broken.yaml cannot be read:"):
        evaluate_tasks(lm, {"xyz": None}, include=[tmp_path / "own"])
    with pytest.raises(EvaluationError, match="there is no folder .*none of tasks to include"):
        evaluate_tasks(lm, {"xyz": None}, include=[tmp_path / "none"])
    with pytest.raises(EvaluationError, match="Duplicate task 'choice': found in both 'both' and"):
        evaluate_tasks(lm, {"both": None, "choice": None}, include=[folder])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (
            "raising",
            "task raising cannot be loaded: ModuleNotFoundError: No module named 'none_such'",
        ),
        ("ending", "task ending cannot be loaded: SystemExit: 3"),
        ("empty", "task empty has no questions: its data are empty"),
        ("cut", "task cut cannot be loaded: ArrowInvalid: JSON parse error:"),
        ("unplaced", "task unplaced: it has no dataset_path; that of JSON Lines of your own is j"),
        ("unscored", "task unscored has no metric, so nothing of it could be shown"),
        ("own_metric", "task own_metric: its metric 'glory' is none of lm-eval's, and was not f"),
        ("none_in_it", "none_in_it has no tasks; list them under its key task"),
        ("around", "task around cannot be loaded: RecursionError: maximum recursion depth exceed"),
        ("lacking", "there is no task 'chocie'; did you mean 'choice'?"),
        ("numbered", "there is no task 'None'; python -m"),
    ],
)
def test_a_broken_task_is_one_line(lm, folder, tmp_path, monkeypatch, task, said):
    from openelm_mlx.evaluate import tasks
    from openelm_mlx.evaluate.harness import evaluate_tasks

    (tmp_path / "lm_eval").mkdir()
    monkeypatch.setattr(tasks, "library", lambda: tmp_path / "lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if task == "own_metric":
        hide(monkeypatch, "evaluate")  # which would seek it on the hub
    own = tmp_path / "own"
    shutil.copytree(folder, own, ignore=shutil.ignore_patterns("cache"))
    for name, text in (("raising", "import none_such"), ("ending", "import sys\nsys.exit(3)")):
        (own / f"{name}_code.py").write_text(text)
        write(own, name, CHOICE | {"doc_to_text": "function"})
        path = own / f"{name}.yaml"
        path.write_text(path.read_text().replace('"function"', f"!function {name}_code.function"))
    for name, text in (("empty", ""), ("cut", '{"question": "Once upon')):
        (own / f"{name}.jsonl").write_text(text)
        write(own, name, CHOICE, f"{name}.jsonl")
    write(own, "unplaced", CHOICE | {"dataset_path": None})
    write(own, "unscored", CHOICE | {"metric_list": []})
    write(own, "own_metric", CHOICE | {"metric_list": [{"metric": "glory"}]})
    groups = {"none_in_it": [], "around": ["around"], "lacking": ["chocie"], "numbered": [None]}
    for name, members in groups.items():
        (own / f"{name}.yaml").write_text(json.dumps({"group": name, "task": members}))
    with pytest.raises(EvaluationError) as caught:
        evaluate_tasks(lm, {task: None}, include=[own])
    text = str(caught.value)
    assert text.startswith(said) and "\n" not in text


@pytest.mark.parametrize("name", ["5", "null"])
def test_a_name_that_is_no_text(lm, tmp_path, name):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    (tmp_path / "odd.yaml").write_text(f"task: {name}\n")
    with pytest.raises(EvaluationError, match="odd.yaml has the name .*, which is no text; put it"):
        evaluate_tasks(lm, {"choice": None}, include=[tmp_path])


def test_a_dataset_of_the_hub_without_a_connection(lm, folder, monkeypatch):
    from huggingface_hub import constants

    from openelm_mlx.evaluate.harness import evaluate_tasks

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    write(folder, "far", CHOICE | {"dataset_path": "allenai/ai2_arc", "dataset_kwargs": {}})
    said = "task far: its data are not on this disk, and the hub cannot be reached"
    with pytest.raises(EvaluationError, match=rf"{said} \(.*'allenai/ai2_arc'.*\). Check") as error:
        evaluate_tasks(lm, {"far": None}, include=[folder])
    assert "fairy_tales needs no network" in str(error.value)
    assert "Offline" not in str(error.value)  # which the user did not ask for
    assert not constants.HF_HUB_OFFLINE


def test_without_lm_eval(monkeypatch):
    for name in ("harness", "language_model"):
        monkeypatch.delitem(sys.modules, f"openelm_mlx.evaluate.{name}", raising=False)
    hide(monkeypatch, "lm_eval")
    with pytest.raises(
        EvaluationError, match=r"not installed; pip install 'openelm-mlx\[evaluate\]"
    ):
        import_module("openelm_mlx.evaluate.harness")


@pytest.mark.skipif("OPENELM_LOAD" not in os.environ, reason="reads 14,000 files")
def test_folders_named_for_tasks_have_all_of_them():
    from lm_eval.tasks._index import TaskIndex

    from openelm_mlx.evaluate.tasks import (
        below,
        check_mentioned,
        find_tasks,
        library,
        may_have,
    )

    parts = {one: TaskIndex.build([one]) for one in library().iterdir() if one.is_dir()}
    whole = find_tasks(["ai2_arc"]).task_index
    found = 0
    check_mentioned([*whole][::100], {}, [])  # each takes a tenth of a second
    for name, entry in whole.items():
        near: dict = {}
        for folder, index in parts.items():
            near |= index if may_have(folder.name, [name]) else {}
        members = list(below(near, name, whole=False))
        if all(members):
            found += 1
            assert [one.yaml_path for one in members] == [
                one.yaml_path for one in below(whole, name)
            ], entry
    assert found > 9000


def test_arguments_of_the_model(tiny):
    from openelm_mlx.evaluate.harness import OpenELMLM

    with pytest.raises(OptionError, match="unknown argument 'dtyp' of the model; did you mean 'd"):
        OpenELMLM(dtyp="float32")
    with pytest.raises(OptionError, match="the size of a batch is decided by the tokens in it"):
        OpenELMLM(tiny, batch_size=8)
    with pytest.raises(OptionError, match="bits is for loading a model, and this one is loaded"):
        OpenELMLM(tiny, bits=4)


def test_a_dataset_that_was_fetched_before_needs_no_connection(lm, folder, monkeypatch):
    from huggingface_hub import constants

    from openelm_mlx.evaluate.harness import evaluate_tasks

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    evaluate_tasks(lm, {"choice": None}, include=[folder], limit=1)
    (kept,) = folder.glob("cache/json/*/*/*/json-train.arrow")
    there = folder / "cache" / "some___tales" / "default" / "0.0.0" / "1"
    shutil.copytree(kept.parent, there)
    (there / kept.name).rename(there / "tales-train.arrow")
    write(folder, "near", CHOICE | {"dataset_path": "some/tales", "dataset_kwargs": {}})
    results = evaluate_tasks(lm, {"near": None}, include=[folder])
    assert results["n-samples"]["near"]["original"] == 5


def test_a_tag_is_all_that_have_it(lm, folder):
    from openelm_mlx.evaluate.tasks import below, find_tasks, why_not_loaded

    for name in ("one", "two"):
        write(folder, name, CHOICE | {"tag": "tagged"})
    (folder / "over.yaml").write_text('{"group": "over", "task": ["tagged", "choice"]}')
    index = find_tasks(["over"], [folder]).task_index
    less = {name: entry for name, entry in index.items() if name != "two"}
    assert why_not_loaded(less, "over", KeyError()) == "over names 'two', which is no task"
    assert [entry.name for entry in below(index, "over")] == ["one", "two", "choice"]
    assert list(below(index, "tagged", whole=False)) == [None]
    assert "arc_easy" not in index and "arc_easy" in find_tasks(["arc_easy"]).task_index
