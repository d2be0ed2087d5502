"""Logs of a fine-tuning for TensorBoard and Weights & Biases, which are imported if asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from openelm_mlx.errors import OptionError, reason

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
PROJECT = "openelm"  # of Weights & Biases, unless $WANDB_PROJECT names another one
Log = Callable[[Mapping[str, Any]], None]


def check(names: Sequence[str]) -> None:
    """Raise `OptionError` if the package of a log is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            remedy = f"`pip install 'openelm-mlx[{name}]'`, or leave {name} out of log"
            raise OptionError(f"log {name} needs the package {PACKAGES[name]}: {remedy}")


@contextmanager
def opened(
    names: Sequence[str], folder: Path, about: Mapping[str, Any], after: int = 0
) -> Iterator[Log]:
    """Yield what passes the numbers of each row of the metrics to the logs of these names.

    They lie in `folder`. `about` are the options of the run; one that is resumed goes on `after`
    so many steps. Raises `OptionError` if a log cannot be started.
    """
    start = {"tensorboard": tensorboard, "wandb": wandb}
    with ExitStack() as stack:
        logs = [stack.enter_context(start[name](folder, about, after)) for name in names]

        def log(row: Mapping[str, Any]) -> None:
            for one in logs:
                one(row)

        yield log


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by what the logs call them.

    >>> numbers({"step": 3, "validation_loss": 1.5, "best": True})
    {'validation/loss': 1.5}
    """
    kind = "validation" if "validation_loss" in row else "training"
    return {
        f"{kind}/{key.removeprefix('validation_')}": value
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


@contextmanager
def tensorboard(folder: Path, about: Mapping[str, Any], after: int) -> Iterator[Log]:
    """Write TensorBoard's files into the folder `tensorboard`."""
    from tensorboardX import SummaryWriter

    resumed = {"purge_step": after + 1} if after else {}  # what was logged after the checkpoint
    with SummaryWriter(str(folder / "tensorboard"), **resumed) as writer:
        text = "\n".join(f"    {key}: {value}" for key, value in about.items())
        writer.add_text("options", text, after)

        def log(row: Mapping[str, Any]) -> None:
            for name, value in numbers(row).items():
                writer.add_scalar(name, value, row["step"])

        yield log


@contextmanager
def wandb(folder: Path, about: Mapping[str, Any], after: int) -> Iterator[Log]:
    """Start a run of Weights & Biases, or go on with the one of this folder."""
    import os

    import wandb as service

    known = folder / "wandb" / "run-id"
    if not after or not known.is_file():
        known.parent.mkdir(exist_ok=True)
        known.write_text(secrets.token_hex(4), encoding="utf-8")
    how: dict[str, Any] = {"id": known.read_text(encoding="utf-8"), "resume": "allow"}
    how |= {"dir": str(folder), "name": folder.absolute().name, "config": dict(about)}
    try:
        run = service.init(project=os.environ.get("WANDB_PROJECT", PROJECT), **how)
    except service.Error as error:
        remedy = "run `wandb login`, or set WANDB_MODE=offline"
        raise OptionError(f"log wandb cannot be started ({reason(error)}); {remedy}") from None
    with run:
        yield lambda row: run.log(numbers(row), step=row["step"])
