"""Finding and loading lm-eval's tasks, and what is said of those that cannot be asked."""

from __future__ import annotations

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
    from lm_eval import tasks

    from openelm_mlx.evaluate.harness import evaluate_tasks

    real = tasks.TaskManager  # reading its 14,000 files takes seconds
    monkeypatch.setattr(
        tasks, "TaskManager", lambda include_path, **_: real(None, include_path, False)
    )
    with pytest.raises(EvaluationError, match="there is no task 'chocie'; did you mean 'choice'"):
        evaluate_tasks(lm, {"chocie": None}, include=[folder])
    with pytest.raises(EvaluationError, match="there is no task 'xyz'; python -m openelm_mlx.eva"):
        evaluate_tasks(lm, {"xyz": None}, include=[folder])
    (tmp_path / "broken.yaml").write_text("task: [a\n")
    with pytest.raises(EvaluationError, match=r"no task 'xyz', and .*broken.yaml cannot be read:"):
        evaluate_tasks(lm, {"xyz": None}, include=[tmp_path])
    with pytest.raises(EvaluationError, match="there is no folder .*none of tasks to include"):
        evaluate_tasks(lm, {"xyz": None}, include=[tmp_path / "none"])
    with pytest.raises(EvaluationError, match="Duplicate task 'choice': found in both 'both' and"):
        evaluate_tasks(lm, {"both": None, "choice": None}, include=[folder])


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

    from openelm_mlx.evaluate.tasks import below, find_tasks, library, may_have

    parts = {one: TaskIndex.build([one]) for one in library().iterdir() if one.is_dir()}
    whole = find_tasks(["ai2_arc"]).task_index
    found = 0
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
    from openelm_mlx.evaluate.tasks import below, find_tasks

    for name in ("one", "two"):
        write(folder, name, CHOICE | {"tag": "tagged"})
    (folder / "over.yaml").write_text('{"group": "over", "task": ["tagged", "choice"]}')
    index = find_tasks(["over"], [folder]).task_index
    assert [entry.name for entry in below(index, "over")] == ["one", "two", "choice"]
    assert list(below(index, "tagged", whole=False)) == [None]
    assert "arc_easy" not in index and "arc_easy" in find_tasks(["arc_easy"]).task_index
