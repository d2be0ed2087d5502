from __future__ import annotations

from pathlib import Path

import pytest
from formats import NANO, again

from openelm_mlx import load
from openelm_mlx.loading import Engine

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The bundled model."""
    return load("openelm-tiny")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden nano model as a folder of this project."""
    return again(NANO / "checkpoint.pt", tmp_path_factory.mktemp("nano") / "nano")
