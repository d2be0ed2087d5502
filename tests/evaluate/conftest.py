"""A small model, the bundled one as lm-eval has it, tasks for it, and an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_tasks import task_folder
from small import random_engine

from openelm_mlx.engine.loading import Engine


@pytest.fixture(scope="module")
def small(tiny: Engine) -> Engine:
    """A model of random weights."""
    return random_engine(tiny, 3)


@pytest.fixture(scope="module")
def lm(tiny: Engine) -> Any:
    """The bundled model as lm-eval has it."""
    from openelm_mlx.evaluate.harness import OpenELMLM

    return OpenELMLM(tiny)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tasks for lm-eval, into which a test may write more."""
    yield from task_folder(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder."""
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
