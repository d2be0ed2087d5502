"""Tasks of lm-eval with a few questions, one of each kind, and a folder to write them into."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

QUESTIONS = [
    ("The king was", ["very old and had a son", "a", "the sea"], 0),
    ("Once upon a time there", ["lived a king", "dog the", "of"], 1),
    ("She went into the", ["forest", "forest and there she found a house", "x"], 2),
    ("He said:", ["I am coming", "coming I am"], 0),
    ("", ["Once upon a time", "Once time a upon"], 0),
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ONE = {"doc_to_text": "{{question}}", "doc_to_target": " {{choices[0]}}"}
TASKS = {
    "choice": CHOICE,
    "solved": CHOICE | {"fewshot_split": "train", "num_fewshot": 1},
    "likely": ONE | {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}]},
    "whole": ONE
    | {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "byte_perplexity"}]},
    "written": ONE
    | {
        "output_type": "generate_until",
        "generation_kwargs": {"until": [" a", "."], "max_gen_toks": 6, "top_p": 0.9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
BOTH = {
    "group": "both",
    "task": ["choice", "solved"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}


def write(folder, name, task, data="questions.jsonl"):
    """Write a task as a YAML file, which JSON is."""
    own = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}}
    text = json.dumps(own | {"test_split": "train"} | task)
    (folder / f"{name}.yaml").write_text(text)


def task_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder of these tasks with their questions, with datasets' cache in it."""
    import datasets

    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, task in TASKS.items():
        write(folder, name, task)
    (folder / "both.yaml").write_text(json.dumps(BOTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder
