"""Tasks and a model of lm-eval whose scores are known: each question says what it will be answered.

write_tasks(folder, {"race": Known(shots=0, right={"acc": 0.31}, questions=100)})
results = evaluate(folder, ["race"])         # lm-eval, from YAML and JSON Lines to its results
stated({"race": ...})                        # results of the same form without lm-eval
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHORT, LONG = "a", "a longer answer"
# read by every task below; a question with two true answers of known probability is TruthfulQA's
FUNCTIONS = """
import json, math
from pathlib import Path

def load(task, **metadata):
    from datasets import Dataset
    lines = (Path(__file__).parent / f"{task}.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}

def stereotype(doc, results):
    (more, _), (less, _) = results
    return {"pct_stereotype": more > less}

def probability(doc, results):
    return {"acc": math.exp(results[doc["answer"]][0])}
"""
RESULTS_OF = {"crows_pairs_english": "stereotype", "truthfulqa_mc2": "probability"}


@dataclass(frozen=True)
class Known:
    """A task: the share of its questions that is right by each metric."""

    shots: int
    right: Mapping[str, float]
    questions: int
    parts: int = 1  # tasks of a group

    def count(self, metric: str) -> int:
        return round(self.right[metric] * self.questions)


def questions(task: str, known: Known) -> list[dict[str, Any]]:
    """Return the questions, the first of which are right by each metric."""
    docs = []
    for number in range(known.questions):
        right = {metric: number < known.count(metric) for metric in known.right}
        acc = next(iter(right.values()))
        norm = right.get("acc_norm", acc)
        doc: dict[str, Any] = {"question": f"Question {number}?", "choices": [SHORT, LONG]}
        doc["answer"] = 0 if acc == norm else int(norm)  # where they differ, acc says the short one
        doc["says"] = doc["answer"] if acc else 1 - doc["answer"]
        doc["says_by_length"] = doc["answer"] if norm else 1 - doc["answer"]
        if task == "truthfulqa_mc2":  # a mean, so that any figure can be met
            by = 0 if number == known.questions - 1 and number % 2 == 0 else 0.1
            doc["probability"] = known.right["acc"] + (by if number % 2 else -by)
        docs.append(doc)
    return docs


def write_tasks(folder: Path, tasks: Mapping[str, Known]) -> None:
    (folder / "functions.py").write_text(FUNCTIONS)
    for task, known in tasks.items():
        docs = questions(task, known)
        names = [task] if known.parts == 1 else [f"{task}_{part}" for part in range(known.parts)]
        for part, name in enumerate(names):
            lines = [json.dumps(doc) for doc in docs[part :: known.parts]]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
            (folder / f"{name}.yaml").write_text(task_yaml(name, known))
        if known.parts > 1:
            metric = "aggregate_metric_list:\n- {metric: acc, weight_by_size: true}\n"
            (folder / f"{task}.yaml").write_text(f"group: {task}\ntask: {names}\n{metric}")


def task_yaml(task: str, known: Known) -> str:
    metrics = [
        f"- {{metric: {name}, aggregation: mean, higher_is_better: true}}\n" for name in known.right
    ]
    function = RESULTS_OF.get(task)
    own = f"process_results: !function functions.{function}\n" if function else ""
    return (
        f"task: {task}\ncustom_dataset: !function functions.load\n"
        f"dataset_kwargs: {{task: {task}}}\n"
        f"output_type: multiple_choice\ntest_split: test\nnum_fewshot: {known.shots}\n"
        "doc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: choices\n"
        f"{own}metric_list:\n{''.join(metrics)}"
    )


def evaluate(folder: Path, tasks: list[str], **more: Any) -> dict[str, Any]:
    """Return lm-eval's results of a model that answers each question as the question says."""
    from lm_eval import evaluator
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Obedient(LM):
        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return [(answer(one.doc, one.args[1].strip()), False) for one in requests]

        loglikelihood_rolling = generate_until = loglikelihood

    manager = TaskManager(include_path=folder, include_defaults=False)
    found: Any = evaluator.evaluate(Obedient(), manager.load(tasks), **more)
    return dict(found)


def answer(doc: Mapping[str, Any], choice: str) -> float:
    """Return the log probability of a choice: that of `says` is the largest, and that of
    `says_by_length` the largest for each character.
    """
    number = doc["choices"].index(choice)
    if "probability" in doc:
        return math.log(doc["probability"] if number == doc["answer"] else 1 - doc["probability"])
    if doc["says"] == doc["says_by_length"]:
        return -1.0 if number == doc["says"] else -1000.0
    return -1.0 if number == doc["says"] else -2.0  # which only the longer one can afford


def stated(tasks: Mapping[str, Known]) -> dict[str, Any]:
    """Return results of lm-eval's form with these scores and their standard errors."""
    found: dict[str, Any] = {"results": {}, "n-samples": {}, "n-shot": {}}
    for task, known in tasks.items():
        line: dict[str, Any] = {}
        for metric in known.right:
            share = (
                known.right["acc"]
                if task == "truthfulqa_mc2"
                else known.count(metric) / known.questions
            )
            line[f"{metric},none"] = share
            line[f"{metric}_stderr,none"] = math.sqrt(share * (1 - share) / (known.questions - 1))
        found["results"][task] = line
        found["n-samples"][task] = {"original": known.questions, "effective": known.questions}
        found["n-shot"][task] = known.shots
    return found
