"""lm-eval's tasks asked of a model: its answers, and what its metrics become."""

from __future__ import annotations

import json

import pytest

from openelm_mlx.chat import encode_messages

pytestmark = pytest.mark.needs("lm-eval")

QUESTIONS = [
    ("The king was", ["very old and had a son", "a", "the sea"], 0),
    ("Once upon a time there", ["lived a king", "dog the", "of"], 1),
    ("She went into the", ["forest", "forest and there she found a house", "x"], 2),
    ("He said:", ["I am coming", "coming I am"], 0),
]
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks, each a YAML file (JSON is YAML) with its data beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for task in (CHOICE,):
        own = {"dataset_path": "json", "dataset_kwargs": {"data_files": "questions.jsonl"}}
        text = json.dumps(task | own | {"test_split": "train"})
        (folder / f"{task['task']}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def lm(tiny):
    from openelm_mlx.evaluate.harness import OpenELMLM

    return OpenELMLM(tiny)


def test_accuracy(lm, folder):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    results = evaluate_tasks(lm, {"choice": None}, include=[folder])
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_is_encoded_as_the_instruct_format(lm, system):
    messages = [{"role": "system", "content": system}] if system else []
    for role, content in (("user", "Who? "), ("assistant", "A king </s>"), ("user", "<s>Where?")):
        messages.append({"role": role, "content": content})
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == encode_messages(lm.engine.tokenizer, messages)
    answered = encode_messages(
        lm.engine.tokenizer, [*messages, {"role": "assistant", "content": "There."}], False
    )
    before, after = lm._encode_pair(text, "There.")
    assert [*before, *after] == answered[:-1]
