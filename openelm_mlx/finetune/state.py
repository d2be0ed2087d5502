"""The state of a run: with it and the same data, a run goes on as if it had never been stopped.

    state.safetensors   the trained weights, the optimizer, and in the metadata `Standing` and what
                        the numbers depend on; replaced as a whole
    best.safetensors    the weights of the best evaluation so far
    metrics.jsonl       a row for each step and evaluation, written as they happen

All randomness follows from the seed and the number of the step, so it is not stored. What happened
after the checkpoint happens once more, and gives the same: the rows of metrics.jsonl that are later
than it are dropped, and best.safetensors, if it is later, is found again before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from openelm_mlx.device import mx, utils
from openelm_mlx.errors import CheckpointError, FinetuneError, OptionError, reason
from openelm_mlx.fields import fit_path
from openelm_mlx.files import NO_LOCKS, name_for_mlx, replacing

STATE, BEST, METRICS, REPORT = (
    "state.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "finetune.json",
)
FORMAT = "openelm-mlx fine-tuning 1"
WEIGHTS, OPTIMIZER = "weights.", "optimizer."
ABOUT = {"standing", "identity", "fit"}
SHOWN = ("version", "processes")  # what errors quote beside options
OTHERS = ("README.md", "adapter_config.json", "config.json", "generation_config.json", "loss.png")
OF_WRITING = ("[write]", "[save_safetensors]")  # how MLX begins to say that it cannot
LEFT_BY_MACOS = ".DS_Store"


@dataclass
class Standing:
    """Where a run is: all that goes from step to step beside the weights and the optimizer."""

    step: int = 0  # the last one that is done
    evaluated: int = -1  # the last one after which the validation loss was computed
    best_step: int = 0
    best_loss: float | None = None
    worse: int = 0  # evaluations since the best one
    first_loss: float | None = None
    last_loss: float | None = None
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def check_folder(folder: Path, resume: bool, *sources: str | Path | None) -> bool:
    """Return whether a run in `folder` goes on; nothing is made yet.

    Raises `OptionError` for a folder that has a result, or anything that a new run would replace,
    for a run that could go on but was not asked to, and for a folder in one of the `sources`.
    """
    try:
        check_place(folder, sources)
        return goes_on(folder, resume)
    except OSError as error:
        what = f"{folder} cannot be written: {error.strerror}"
        raise OptionError(f"{what}; give another folder") from None


def check_place(folder: Path, sources: Iterable[str | Path | None]) -> None:
    """Raise `OptionError` for a folder that could not be made, or is read as data."""
    if not fit_path(place := os.path.realpath(folder)):
        what = f"{place!r} is not a name in UTF-8, and MLX writes no other"
        raise OptionError(f"{what}; give another folder")
    if folder.is_symlink() and not folder.exists():
        what = f"{folder} is a symbolic link to {os.readlink(folder)}, which does not exist"
        raise OptionError(f"{what}; make that folder, or give another")
    for source in sources:
        data = Path(source or "").expanduser()
        if source and data.is_dir() and data.resolve() in (Path(place), *Path(place).parents):
            what = f"{folder} lies in {data}, all of which is read as data"
            raise OptionError(f"{what}; give a folder outside it")


def goes_on(folder: Path, resume: bool) -> bool:
    """Return whether `folder` has a run that is to go on. Raises `OptionError`."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give the name of one")
    if (folder / REPORT).exists():
        if resume:  # a kill may have come just before
            remove_checkpoint(folder)
        why = "give another folder; to train its result further, give it as --adapter or as MODEL"
        raise OptionError(f"{folder} has a run that is finished; {why}")
    if (folder / STATE).exists():
        if not resume:
            what = f"{folder} has a run that is not finished"
            raise OptionError(f"{what}; continue it with --resume, or give another folder")
        return True
    others = [path.name for path in folder.iterdir()] if folder.exists() else []
    mine = [name for name in others if name == LEFT_BY_MACOS or is_leftover(name)]
    if found := sorted(set(others) - set(mine)):
        what = f"{folder} is not empty (it has {found[0]}), and nothing in it is replaced"
        raise OptionError(f"{what}; give another folder")
    return False


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from a run in the same folder. Raises `OptionError` if one has it."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        what = f"{folder} has a run that another process is at"
        raise OptionError(f"{what}; wait for its end, or give another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder if it cannot be written: it is full, or gone. Raises `FinetuneError`."""
    try:
        yield
    except OSError as error:
        why = error.strerror or reason(error)
    except RuntimeError as error:
        why = reason(error).rstrip(".")
        if not why.startswith(OF_WRITING):
            raise
    else:
        return
    remedy = "mend that, and --resume goes on from what it has"
    raise FinetuneError(f"{folder} cannot be written: {why}; {remedy}")


def is_leftover(name: str) -> bool:
    """Return whether a file is one that `replacing` began when the process was killed."""
    return name.startswith(tuple(f".{whole}." for whole in (STATE, BEST, METRICS, REPORT, *OTHERS)))


def remove_checkpoint(folder: Path) -> None:
    for name in (STATE, BEST):
        (folder / name).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if is_leftover(path.name):
            path.unlink()


def write_arrays(path: Path, arrays: Mapping[str, mx.array], about: Any) -> None:
    """Write a safetensors file with `about` in its metadata: all of it or nothing."""
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    with writing(path.parent), replacing(path, ".safetensors") as new:
        whole = {name: mx.contiguous(array) for name, array in arrays.items()}
        mx.save_safetensors(name_for_mlx(new), whole, metadata)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name with old blocks


def read_arrays(path: Path) -> tuple[dict[str, mx.array], Any]:
    """Return what `write_arrays` wrote, in memory. Raises `CheckpointError`."""
    try:
        loaded: Any = mx.load(name_for_mlx(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
        if metadata.get("format") != FORMAT:
            raise ValueError("it is not of this version of openelm-mlx")
        return arrays, json.loads(metadata["about"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise unreadable(path, reason(error)) from None


def unreadable(path: Path, why: str) -> CheckpointError:
    what = f"{path} cannot be read as a checkpoint ({why})"
    return CheckpointError(f"{what}; give another folder, and begin again")


def read_state(folder: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Return the arrays of a run, and what is said of it. Raises `CheckpointError`."""
    arrays, about = read_arrays(folder / STATE)
    parts = about.values() if isinstance(about, dict) and about.keys() == ABOUT else [None]
    if not all(isinstance(part, dict) for part in parts) or "options" not in about["identity"]:
        raise unreadable(folder / STATE, "what it says of the run is damaged")
    if about["standing"].get("best_loss") is not None and not (folder / BEST).exists():
        raise unreadable(folder / BEST, "it is missing")  # else this would be told at the end
    return arrays, about


def standing_of(folder: Path, about: Mapping[str, Any]) -> Standing:
    """Return where a run is that has been read. Raises `CheckpointError`."""
    try:
        standing = Standing(**about["standing"])
    except TypeError:
        raise unreadable(folder / STATE, "where the run was is damaged") from None
    return standing


def leaves(tree: Any, prefix: str) -> dict[str, mx.array]:
    """Return the arrays of a tree by their paths."""
    return {f"{prefix}{path}": array for path, array in utils.tree_flatten(tree)}  # type: ignore


def put_back(tree: Any, arrays: Mapping[str, mx.array], prefix: str) -> None:
    """Replace the arrays of a tree, whose dicts stay the same objects, by stored ones."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, mx.array):
            tree[key] = arrays[f"{prefix}{key}"]
        else:
            put_back(value, arrays, f"{prefix}{key}.")


def stored(model: Any, optimizer: Any) -> dict[str, mx.array]:
    """Return the arrays of a checkpoint."""
    return leaves(model.trainable_parameters(), WEIGHTS) | leaves(optimizer.state, OPTIMIZER)


def check_tensors(wanted: Mapping[str, mx.array], found: Mapping[str, mx.array]) -> None:
    """Raise `CheckpointError` unless a checkpoint has the tensors of this run."""
    shapes = [{name: array.shape for name, array in some.items()} for some in (wanted, found)]
    if shapes[0] != shapes[1]:
        what = "the checkpoint has other tensors than this run trains"
        raise CheckpointError(f"{what}; give another folder, and begin again")


def restore(model: Any, optimizer: Any, arrays: Mapping[str, mx.array]) -> None:
    """Give a model and its optimizer the arrays of a checkpoint."""
    put_back(optimizer.state, arrays, OPTIMIZER)
    set_weights(model, arrays)


def set_weights(model: Any, arrays: Mapping[str, mx.array]) -> None:
    """Give a model the trained weights among the arrays."""
    own = {n.removeprefix(WEIGHTS): a for n, a in arrays.items() if n.startswith(WEIGHTS)}
    model.update(utils.tree_unflatten(list(own.items())))


def check_same(folder: Path, identity: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `FinetuneError` if a checkpoint belongs to another run than the one that was asked.

    Both are what the numbers of a run depend on: single entries, and its options.
    """
    others = []
    theirs, ours = ({**every, **every["options"]} for every in (identity, now))
    for name in sorted((theirs.keys() | ours.keys()) - {"options"}):
        there, here = str(theirs.get(name)), str(ours.get(name))
        if there != here:
            shown = name in now["options"] or name in SHOWN
            others.append(f"{name} ({there} there, {here} here)" if shown else name)
    if others:
        what = f"{folder} has a run with other {', '.join(others)}"
        raise FinetuneError(f"{what}; give the same to go on, or another folder")


class Metrics:
    """metrics.jsonl: a row for each step and each evaluation, flushed as it is written."""

    def __init__(self, folder: Path, standing: Standing, resumed: bool) -> None:
        path = folder / METRICS
        if resumed:
            kept = list(rows_until(path, standing))
            with replacing(path) as new:
                new.write_text("".join(kept), encoding="utf-8")
        self.file: IO[str] = open(path, "a" if resumed else "w", encoding="utf-8")

    def add(self, row: Mapping[str, Any]) -> None:
        print(json.dumps(row), file=self.file, flush=True)

    def close(self) -> None:
        self.file.close()


def rows_until(path: Path, standing: Standing) -> Iterator[str]:
    """Yield the lines of metrics.jsonl that a checkpoint knows of."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                last = standing.evaluated if "validation_loss" in row else standing.step
                known = line.endswith("\n") and row["step"] <= last
            except (ValueError, KeyError, TypeError):
                continue  # a kill came in the middle of it
            if known:
                yield line
