"""An evaluation by lm-eval: its tasks, asked of a model, become a document of results.

    tasks and shots -> lm-eval's tasks        tasks.py
    tasks -> requests -> answers -> metrics   `evaluate` of lm-eval, language_model.py
    document -> files                         `save`

The document is a dict in lm-eval's own form, and so are the files: its tools read both.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from openelm_mlx.errors import EvaluationError, OpenELMError, reason
from openelm_mlx.evaluate.language_model import OpenELMLM
from openelm_mlx.evaluate.tasks import (
    OWN_COMMAND,
    compiled_once,
    find_tasks,
    load_tasks,
    quiet,
)

__all__ = ["OpenELMLM", "evaluate_tasks", "save"]

BOOTSTRAPS = 100_000  # lm-eval's default, for metrics whose standard error has no formula


def evaluate_tasks(
    lm: OpenELMLM,
    tasks: Mapping[str, int | None],
    *,
    limit: int | None = None,
    include: Iterable[str | Path] = (),
    chat_template: bool = False,
    system: str | None = None,
    index: Any = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks, groups or tags of lm-eval, and return its results document.

    >>> results = evaluate_tasks(OpenELMLM("270m"), {"arc_easy": None, "hellaswag": 10})
    >>> results["results"]["arc_easy"]["acc,none"]

    A name has the number of solved examples before each question, or None for the task's own; a
    task that fixes them at 0 keeps that, as in lm-eval. Only the first `limit` questions of each
    task are asked. `include` are folders with tasks of your own; their data files are found beside
    the YAML. `chat_template` puts each question as a message of a chat, the examples as exchanges
    before it, and first of all the message `system`. `index` is what `find_tasks` has returned for
    these names, if it was called before.

    The document has lm-eval's keys, and two by task: under "truncated" how many questions were
    longer than the model's context and have lost their beginning, under "without_answer" how many
    have a right answer that is none of their choices. Raises `EvaluationError`.
    """
    with quiet(), compiled_once():
        import numpy as np
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
        from lm_eval.evaluator import evaluate
        from lm_eval.loggers import EvaluationTracker

        general, date = EvaluationTracker().general_config_tracker, time.time()
        random.seed(DEFAULT_RANDOM_SEED)  # lm-eval's own, also before tasks are loaded
        np.random.seed(DEFAULT_OTHER_SEED)
        loaded = load_tasks(index or find_tasks(tasks, include), tasks, DEFAULT_OTHER_SEED)
        general.log_experiment_args(
            model_source="openelm",
            model_args=lm.arguments,
            system_instruction=system,
            chat_template=lm.chat_template(chat_template),
            fewshot_as_multiturn=chat_template,
        )
        lm.truncated.clear()
        try:
            results: dict[str, Any] = evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                system_instruction=system,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
        except OpenELMError:
            raise
        except (Exception, SystemExit) as error:  # of a task's data, templates and functions
            raise task_error(error) from None
        general.log_end_time()
    results["config"] = {
        "model": "openelm",
        "model_args": lm.arguments,
        **lm.get_model_info(),
        "batch_size": None,  # the tokens of a pass decide it
        "batch_sizes": [],
        "device": None,
        "use_cache": None,
        "limit": limit,
        "bootstrap_iters": BOOTSTRAPS,
        "gen_kwargs": None,
        "random_seed": DEFAULT_RANDOM_SEED,
        "numpy_seed": DEFAULT_OTHER_SEED,
        "torch_seed": None,
        "fewshot_seed": DEFAULT_OTHER_SEED,
    }
    results["truncated"] = {
        name: len(lm.truncated.get(name, ())) for name in sorted(loaded["tasks"])
    }
    results["without_answer"] = {
        name: sum(map(lacks_answer, results["samples"][name]))
        for name, task in sorted(loaded["tasks"].items())
        if task.OUTPUT_TYPE == "multiple_choice"
        and not (task.multiple_input or task.get_config("process_results"))
    }
    return results | {"date": date, "lm_eval_version": version("lm_eval")} | asdict(general)


def lacks_answer(sample: Mapping[str, Any]) -> bool:
    """Return whether a question's right answer, a number or a text, is none of its choices.

    lm-eval takes every answer of the model for wrong then, and only logs it.
    """
    choices = [continuation for _, continuation in sample["arguments"]]
    right = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
    return not any(
        any(choice.endswith(one) for choice in choices)
        if isinstance(one, str)
        else one in range(len(choices))
        for one in right
    )


def task_error(error: BaseException) -> BaseException:
    """Return an error that names the task which lm-eval was at, or a bug of ours as it is."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = str(Path(__file__).parents[1])
    if any(frame.f_code.co_filename.startswith(ours) for frame in frames[1:]):
        return error
    names = [frame.f_locals.get("task_name") for frame in frames]
    name = next((name for name in names if isinstance(name, str)), None)
    where = "lm-eval" if name is None else f"task {name}"
    said = f"{where} fails: {type(error).__name__}: {reason(error)}"
    if "Tasks not found" in said:
        said += f"; {OWN_COMMAND} ls tasks lists lm-eval's, and --include_path FOLDER adds others"
    return EvaluationError(said)


def save(results: Mapping[str, Any], folder: str | Path, samples: bool = True) -> Path:
    """Write the document of results, and each question asked if `samples`, as lm-eval does.

        FOLDER/apple__OpenELM-270M/results_2026-11-26T19-29-26.123456.json
                                   samples_arc_easy_2026-11-26T19-29-26.123456.jsonl

    Returns the path of the results, which are written last. Files appear whole or not at all.
    Raises `EvaluationError` if they cannot be written.
    """
    from lm_eval.loggers import EvaluationTracker

    document = {key: value for key, value in results.items() if key != "samples"}
    asked = {task: [dict(one) for one in rows] for task, rows in results["samples"].items()}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".evaluation.", dir=folder) as place:
            tracker = EvaluationTracker(output_path=place)
            general = tracker.general_config_tracker
            for item in fields(general):
                setattr(general, item.name, results[item.name])
            general.start_time = time.perf_counter() - float(
                results["total_evaluation_time_seconds"]
            )
            with failures(folder):
                tracker.save_results_aggregated(document, asked)
                for task in asked if samples else ():
                    tracker.save_results_samples(task, asked[task])
            (made,) = Path(place).iterdir()
            there = Path(folder) / made.name
            there.mkdir(exist_ok=True)
            for path in sorted(made.iterdir(), key=lambda path: path.suffix == ".json"):
                os.replace(path, there / path.name)
        return there / path.name
    except OSError as error:
        what = f"results cannot be written to {folder}: {error.strerror or error}"
        raise EvaluationError(what) from None


@contextlib.contextmanager
def failures(folder: str | Path) -> Iterator[None]:
    """Raise `EvaluationError` for a file that lm-eval could not write: it only logs that."""
    handler = BufferingHandler(1 << 30)
    logger = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
    said = handler.buffer
    if any(record.levelno >= logging.WARNING for record in said):
        what = f"results cannot be written to {folder}"
        raise EvaluationError(f"{what}: {said[-1].getMessage()}")
