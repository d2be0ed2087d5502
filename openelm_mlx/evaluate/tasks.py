"""lm-eval's tasks: found by name among its own and those in folders, and loaded with their data."""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partialmethod
from pathlib import Path
from typing import Any

from openelm_mlx.errors import EvaluationError, reason
from openelm_mlx.fields import nearest

BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of datasets from files
ALSO = ("super_glue", "siqa")  # folders that are not named for their tasks: BoolQ, Social IQa
PROBE_SECONDS = 5.0
OWN_COMMAND = "python -m openelm_mlx.evaluate"
ASSETS = Path(__file__).parents[1] / "assets"
# lines of a YAML file that give a name to a task or to several
NAMED = re.compile(r"""^[ \t]*["']?(?:task|group|tag)["']?: *["']?([^\s"'#\[\]{},]+)""", re.M)
BUNDLED = (ASSETS / "fairy-tale-questions", ASSETS / "commonsense")


def load_tasks(manager: Any, tasks: Mapping[str, int | None], seed: int) -> dict[str, Any]:
    """Return lm-eval's tasks and groups of these names, each with its number of shots.

    Raises `EvaluationError` for a task that cannot be loaded, or cannot be asked here.
    """
    found: list[Any] = []
    with offline_if_unreachable(manager.task_index, tasks):
        for name, shots in tasks.items():
            try:
                loaded = manager.load(name)
            except (Exception, SystemExit) as error:  # tasks are code and data of many authors
                raise EvaluationError(why_not_loaded(manager.task_index, name, error)) from error
            if not loaded["tasks"]:
                raise EvaluationError(f"{name} has no tasks; list them under its key task")
            for task in loaded["tasks"].values():
                check_kind(task)
                own = task.get_config("num_fewshot")
                if own is None or (shots is not None and own != 0):
                    task.set_config(key="num_fewshot", value=shots or 0)
                task.set_fewshot_seed(seed)
            group = loaded.get("groups", {}).get(name)
            found += loaded["tasks"].values() if group is None else [group]
    try:
        whole: dict[str, Any] = manager.load(found)
    except ValueError as error:
        raise EvaluationError(f"{reason(error)}; name it once") from None
    return whole


def check_kind(task: Any) -> None:
    """Raise `EvaluationError` for a task that asks for more than text, or runs what it gets."""
    name = task.task_name
    if getattr(task, "UNSAFE_CODE", False):
        what = f"task {name} runs code that the model writes, which is not done here"
        remedy = f"use {OWN_COMMAND} with --confirm_run_unsafe_code"
        raise EvaluationError(f"{what}; in a machine that may break, {remedy}")
    if getattr(task, "MULTIMODAL", False):
        raise EvaluationError(f"task {name} asks about images or sound; OpenELM reads text only")
    if not task.aggregation():
        raise EvaluationError(f"task {name} has no metric, so nothing of it could be shown")


def why_not_loaded(index: Mapping[str, Any], name: str, error: BaseException) -> str:
    """Return why a task or a group of tasks could not be loaded, and what to do."""
    absent = "its data are not on this disk, and"
    remedy = (
        "Check the network and any proxy; they are downloaded once. fairy_tales needs no network"
    )
    if isinstance(error, ConnectionError):
        said = reason(error).removesuffix(" (OfflineModeIsEnabled)")  # by us
        return f"task {name}: {absent} the hub cannot be reached ({said}). {remedy}"
    for leaf in leaves(index, name):
        if (entry := index.get(leaf)) is None:
            return f"{name} names {leaf!r}, which is no task"
        if why := wrong_in(entry, error):
            return f"task {name}: {why}"
        for path in paths_in(data_files(entry)):
            if "://" in path and isinstance(error, FileNotFoundError):
                return f"task {name}: {absent} {path} cannot be reached. {remedy}"
            if "://" not in path and not glob.glob(path):
                return f"task {name}: its data file {path} is missing"
    if isinstance(error, StopIteration):
        return f"task {name} has no questions: its data are empty"
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # that of datasets says only that there is one
    return f"task {name} cannot be loaded: {type(error).__name__}: {reason(error)}"


def wrong_in(entry: Any, error: BaseException) -> str | None:
    """Return what is wrong in a task's YAML where lm-eval's error does not say so."""
    from lm_eval.api.registry import metric_registry

    if entry.kind.name != "TASK":
        return None
    if isinstance(error, TypeError) and not entry.cfg.get("dataset_path"):
        return "it has no dataset_path; that of JSON Lines of your own is json"
    given = entry.cfg.get("metric_list")
    for one in given if isinstance(given, list) and isinstance(error, KeyError) else ():
        metric = one.get("metric") if isinstance(one, Mapping) else None
        if isinstance(metric, str) and metric not in metric_registry:
            return f"its metric {metric!r} is none of lm-eval's, and was not found on the hub"
    return None


def find_tasks(names: Iterable[str], include: Iterable[str | Path] = ()) -> Any:
    """Return lm-eval's index of its tasks, of the `BUNDLED` ones and of those in `include`.

    All 14,000 tasks of lm-eval, which take seconds to read, are read only if the folders that are
    named for the tasks do not do, and some file has the name. Raises `EvaluationError` for a name
    that is nowhere.
    """
    from lm_eval.tasks import TaskManager

    given = [os.path.expanduser(folder) for folder in include]
    for folder in given:
        if not os.path.isdir(folder):  # a name may be too long for Path.is_dir
            what = f"there is no folder {folder} of tasks to include"
            raise EvaluationError(f"{what}; give one with YAML files of lm-eval's form")
    folders = [*BUNDLED, *map(Path.resolve, map(Path, given))]
    names = list(names)
    near = [one for one in library().iterdir() if one.is_dir() and may_have(one.name, names)]
    index: dict[str, Any] = {}
    for places, whole in ((folders, False), ([*near, *folders], False), (folders, True)):
        if whole:
            named = [leaf for name in names for leaf in leaves(index, name, False)]
            check_mentioned([leaf for leaf in named if leaf not in index], index, folders)
        try:
            manager = TaskManager(include_path=places, include_defaults=whole)
        except TypeError as error:  # it sorts the names
            raise EvaluationError(unreadable(folders) or reason(error)) from None
        index = manager.task_index
        if all(entry for name in names for entry in below(index, name, whole)):
            break
    for name in names:
        if name not in index:
            raise EvaluationError(unknown(name, index, folders))
    for name, entry in list(index.items()):
        if entry.yaml_path is not None and any(one in entry.yaml_path.parents for one in folders):
            index[name] = anchored(entry)
    return manager


def library() -> Path:
    """Return the folder of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def may_have(folder: str, names: Iterable[str]) -> bool:
    """Return whether a folder of lm-eval's tasks may have these, by its name."""
    return folder in ALSO or any(f"{name}_".startswith(f"{folder}_") for name in names)


def check_mentioned(
    names: Iterable[str], index: Mapping[str, Any], folders: Iterable[Path]
) -> None:
    """Raise `EvaluationError` for a name that is in no file of lm-eval's tasks, nor in the index.

    A search of the files takes a tenth of the time that YAML does.
    """
    files = (path for path in library().rglob("*") if path.is_file())
    yaml = (path for path in files if path.suffix not in (".py", ".pyc"))  # some end otherwise
    texts = [path.read_text("utf-8", "replace") for path in yaml]
    for name in names:
        word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        if not any(map(word.search, texts)):
            known = {*index}.union(*map(NAMED.findall, texts))
            raise EvaluationError(unknown(name, known, folders))


def unknown(name: str, known: Iterable[str], folders: Iterable[Path]) -> str:
    """Return that there is no such task, and what was meant; or which file cannot be read."""
    if why := unreadable(folders):
        return f"there is no task {name!r}, and {why}"
    near = nearest(name, sorted(known))
    hint = f"did you mean {near!r}?" if near else f"{OWN_COMMAND} ls tasks lists those of lm-eval"
    return f"there is no task {name!r}; {hint}"


def unreadable(folders: Iterable[Path]) -> str | None:
    """Return which YAML file of these folders cannot be read, and why; None if all can."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in (path for folder in folders for path in sorted(folder.rglob("*.yaml"))):
        try:
            found = load_yaml(path, resolve_func=False)
        except Exception as error:  # yaml raises many, a missing file of its `include` others
            return f"{path} cannot be read: {' '.join(str(error).split())}"
        tags = found.get("tag") or ()
        names = [found.get("group", found.get("task", "")), *(tags if tags != str(tags) else ())]
        for name in names:
            if not isinstance(name, str | list):
                return f"{path} has the name {name!r}, which is no text; put it in quotes"
    return None


def below(index: Mapping[str, Any], name: str, whole: bool = True) -> Iterator[Any]:
    """Yield the index's entry of a task, or those of all tasks below a group or tag.

    None stands for a name that is not in the index. It stands for a tag as well, unless the index
    is the `whole` one, as tasks anywhere may have it; those that a group names are its neighbours'.
    """
    for leaf in leaves(index, name, whole):
        entry = index.get(leaf)
        yield None if entry is None or entry.cfg is None else entry


def leaves(
    index: Mapping[str, Any], name: str, whole: bool = True, above: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield the names below a group, or that of a task or tag, as `below` has it.

    A group that is in itself, with those `above` it, has none there.
    """
    entry: Any = index.get(name)
    tagged = entry is not None and entry.cfg is None
    members = sorted(entry.tags) if tagged else entry and entry.cfg.get("task")
    if not isinstance(members, list) or (tagged and not whole):
        yield name
        return
    for member in members if name not in above else ():
        named = isinstance(member, Mapping)
        given = str(member.get("task", member.get("group")) if named else member)
        yield from leaves(index, given, above=(*above, name))


def anchored(entry: Any) -> Any:
    """Return a task of a YAML file with its data files found beside that, not where we run.

    A task whose functions cannot be had is loaded from its file, which says why: it need not be
    the one that is asked.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    given, folder = data_files(entry), entry.yaml_path.parent
    found, own = mapped(given, lambda path: beside(path, folder)), None
    if found == given:
        return entry
    try:
        config = load_yaml(entry.yaml_path)
    except (Exception, SystemExit):
        config, own = entry.cfg, entry.yaml_path
    config = {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": found}}
    return replace(entry, yaml_path=own, cfg=config)


def data_files(entry: Any) -> Any:
    """Return what a task's YAML gives datasets as data files."""
    given = entry.cfg.get("dataset_kwargs")
    return given.get("data_files") if isinstance(given, Mapping) else None


def beside(path: str, folder: Path) -> str:
    """Return the path of a data file or pattern: beside the YAML, or else where we run."""
    there = os.path.join(folder, path)
    return path if "://" in path or (glob.glob(path) and not glob.glob(there)) else there


def mapped(files: Any, change: Callable[[str], str]) -> Any:
    """Return what datasets take as data files, a name or a list or dict of them, changed."""
    if isinstance(files, Mapping):
        return {split: mapped(one, change) for split, one in files.items()}
    if isinstance(files, list):
        return [mapped(one, change) for one in files]
    return change(files) if isinstance(files, str) else files


def paths_in(files: Any) -> list[str]:
    """Return the names of data files."""
    found: list[str] = []
    mapped(files, lambda path: found.append(path) or path)  # type: ignore[func-returns-value]
    return found


@contextlib.contextmanager
def offline_if_unreachable(index: Mapping[str, Any], names: Iterable[str]) -> Iterator[None]:
    """Take data from this disk if the hub cannot be reached: each of many tasks would try long."""
    entries = (entry for name in names for entry in below(index, name))
    if all(entry and entry.cfg.get("dataset_path") in BUILDERS for entry in entries) or reachable():
        yield
        return
    from huggingface_hub import constants
    from lm_eval.api.task import datasets  # as lm-eval reads them

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def reachable() -> bool:
    """Return whether the hub answers."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
    except Exception:  # its HTTP library is not ours to name, and has changed
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars, logs and prints of lm-eval and datasets, of tasks, too.

    What is an error is raised as well.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found"
    from lm_eval.api.task import tqdm  # the class that its modules and datasets draw with

    names = ("lm_eval", "datasets", "huggingface_hub", "evaluate")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    drawn = tqdm.__init__
    tqdm.__init__ = partialmethod(drawn, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = drawn
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Keep compiled templates: lm-eval compiles one again for each question and each example."""
    from lm_eval.utils import env

    env.from_string = lru_cache(256)(env.from_string)
    try:
        yield
    finally:
        del env.from_string  # it hid the method
