"""Reports of a fine-tuning to TensorBoard and Weights & Biases, which are imported if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check(names: Sequence[str]) -> None:
    """Raise `OptionError` if one of the logs is not installed."""


@contextmanager
def opened(
    names: Sequence[str], folder: Path, about: dict[str, Any]
) -> Iterator[Callable[..., None]]:
    """Yield what takes each row of the metrics, and passes it to the logs of these names.

    `about` are the options of the run.
    """
    yield lambda row: None
