"""lm-eval's tasks: found by name, loaded from YAML and datasets, asked of a model, and saved.

    tasks and shots -> lm-eval's tasks        load_tasks
    tasks -> requests -> answers -> metrics   simple_evaluate of lm-eval, language_model.py
    results -> files                          save

Results are a dict in lm-eval's own form, and so are the files: its tools read both.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.errors import EvaluationError
from openelm_mlx.evaluate.language_model import OpenELMLM
from openelm_mlx.fields import nearest

__all__ = ["OpenELMLM", "evaluate_tasks"]


def evaluate_tasks(
    lm: OpenELMLM,
    tasks: Mapping[str, int | None],
    *,
    limit: int | None = None,
    include: Iterable[str | Path] = (),
    chat_template: bool = False,
    system: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks, groups or tags of lm-eval, and return its results document.

    >>> results = evaluate_tasks(OpenELMLM("270m"), {"arc_easy": None, "hellaswag": 10})
    >>> results["results"]["arc_easy"]["acc,none"]

    A name has the number of solved examples before each question, or None for the task's own; a
    task that fixes them at 0 keeps that, as in lm-eval. Only the first `limit` questions of each
    task are asked. `include` are folders with tasks of your own; their data files are found beside
    the YAML. `chat_template` puts each question as a message of a chat, examples as its exchanges,
    after the message `system`.

    The document has lm-eval's keys, and under "truncated" how many questions of a task were longer
    than the model's context and have lost their beginning. Raises `EvaluationError`.
    """
    from lm_eval.evaluator import simple_evaluate

    manager = find_tasks(tasks, [Path(folder) for folder in include])
    results: dict[str, Any] = simple_evaluate(
        lm,
        tasks=load_tasks(manager, tasks),
        task_manager=manager,
        limit=limit,
        apply_chat_template=chat_template,
        system_instruction=system,
        fewshot_as_multiturn=chat_template,
    )
    results["truncated"] = {name: len(found) for name, found in sorted(lm.truncated.items())}
    return results


def load_tasks(manager: Any, tasks: Mapping[str, int | None]) -> list[Any]:
    """Return lm-eval's tasks and groups of these names, each with its number of shots.

    Raises `EvaluationError` for a task that cannot be loaded.
    """
    found: list[Any] = []
    for name, shots in tasks.items():
        loaded = manager.load(name)
        for task in loaded["tasks"].values():
            if shots is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=shots)
        group = loaded.get("groups", {}).get(name)
        found += loaded["tasks"].values() if group is None else [group]
    return found


def find_tasks(names: Iterable[str], folders: list[Path]) -> Any:
    """Return lm-eval's index of its tasks and of those in `folders`, all of `names` among them.

    The 14,000 tasks of lm-eval, which take seconds to read, are left out if nobody asks for one.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False)
    index = manager.task_index
    members = [name for name in names if name in index and closed(index, name)]
    if len(members) < len(list(names)):
        manager = TaskManager(include_path=folders)
        index = manager.task_index
    for name in names:
        if name not in index:
            near = nearest(name, index)
            hint = f"did you mean {near!r}?" if near else "lm-eval ls tasks lists them"
            raise EvaluationError(f"there is no task {name!r}; {hint}")
    for name, entry in index.items():
        if entry.yaml_path is not None and any(one in entry.yaml_path.parents for one in folders):
            index[name] = anchored(entry)
    return manager


def closed(index: Mapping[str, Any], name: str) -> bool:
    """Return whether a task of the index needs no other than those of the index."""
    members = (index[name].cfg or {}).get("task")
    if not isinstance(members, list):
        return True
    return all(isinstance(one, str) and one in index and closed(index, one) for one in members)


def anchored(entry: Any) -> Any:
    """Return a task of a YAML file with its data files found beside that, not where we run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    given = (entry.cfg.get("dataset_kwargs") or {}).get("data_files")
    found = beside(given, entry.yaml_path.parent)
    if found == given:
        return entry
    config = load_yaml(entry.yaml_path)
    config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": found}
    return replace(entry, yaml_path=None, cfg=config)


def beside(files: Any, folder: Path) -> Any:
    """Return the data files of a dataset, names or patterns in lists or dicts, as paths."""
    if isinstance(files, Mapping):
        return {split: beside(one, folder) for split, one in files.items()}
    if isinstance(files, list):
        return [beside(one, folder) for one in files]
    if not isinstance(files, str) or "://" in files:
        return files
    there = os.path.join(folder.absolute(), files)
    return there if glob.glob(there) or not glob.glob(files) else files
