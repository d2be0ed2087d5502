"""What trainings in tests share; they have no picture, which takes longer than they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from training import small_engine, write_pairs

from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune import result


@pytest.fixture(scope="session", autouse=True)
def without_picture() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "write_picture", lambda folder: False)
        yield


@pytest.fixture
def engine(tiny: Engine) -> Engine:
    return small_engine(tiny)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "pairs.jsonl")
