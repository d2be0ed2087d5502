"""An evaluation from end to end: Python calls `evaluate`, and so does the command line."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.ranks import launched
from openelm_mlx.evaluate.harness import OpenELMLM, evaluate_tasks
from openelm_mlx.evaluate.options import EvaluateOptions
from openelm_mlx.evaluate.report import Report, Subject, report
from openelm_mlx.evaluate.store import Store
from openelm_mlx.evaluate.suites import SUITES
from openelm_mlx.evaluate.tasks import find_tasks, quiet
from openelm_mlx.model.config import OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.evaluate.run import Progress

FAIRY_TALES = ("fairy_tales_two", "fairy_tales_four")  # whose chances differ, so each has a score


def evaluate(
    engine: Engine,
    options: EvaluateOptions | None = None,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    index: Any = None,
) -> Report:
    """Ask a model the questions of a suite or of tasks, and return its scores.

    >>> print(evaluate(load("openelm-tiny"), EvaluateOptions(limit=10)))

    Answers are kept in the cache folder as they come, and a call that was interrupted goes on from
    them; they go once all are there, or stay for as long as a `store` of your own. `progress` is
    called after every pass of the model, as by `evaluate.run.answers`; `index` is what
    `named_tasks` has returned for these options. Processes that `mlx.launch` has started share the
    work, and each returns all of it. Raises `EvaluationError` for tasks that cannot be had, before
    the model is asked anything.
    """
    check_loaded("engine", engine)
    options = options or EvaluateOptions()
    suite, tasks = chosen(engine.config, options)
    own = store is None
    with Store(engine, options.batch_tokens) if store is None else nullcontext(store) as kept:
        how: Any = {"store": kept, "ranks": launched(), "progress": progress}
        lm = OpenELMLM(engine, batch_tokens=options.batch_tokens, **how)
        results = evaluate_tasks(
            lm,
            tasks,
            limit=options.limit,
            include=() if options.include is None else (options.include,),
            chat_template=options.chat_template,
            system=options.system,
            index=index,
        )
        found = report(results, Subject.of(engine), suite)
        if own:
            kept.finish()
    return found


def named_tasks(options: EvaluateOptions) -> Any:
    """Return lm-eval's index of tasks, with those of these options; None if they name none.

    Raises `EvaluationError` for a name that is not known: no model has to be loaded to find out.
    """
    names = options.tasks or (SUITES[options.suite].shots if options.suite else ())
    if not names:
        return None
    with quiet():
        return find_tasks(names, () if options.include is None else (options.include,))


def chosen(
    config: OpenELMConfig, options: EvaluateOptions
) -> tuple[str | None, Mapping[str, int | None]]:
    """Return the name of the suite, None for tasks, and each task with its number of shots."""
    suite = options.suite
    if suite is None and not options.tasks:
        if config.size is None:
            return None, dict.fromkeys(FAIRY_TALES)
        suite = "zero-shot"
    return suite, SUITES[suite].shots if suite else dict.fromkeys(options.tasks, options.shots)
