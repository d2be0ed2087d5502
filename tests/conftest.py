"""Models that many tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_set import NANO

from openelm_mlx import load
from openelm_mlx.loading import Engine


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The bundled model."""
    return load("openelm-tiny")


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden nano model as a folder of this project."""
    from formats import again  # not above: it imports MLX, and openelm_mlx loads a faster BLAS before that

    return again(NANO / "checkpoint.pt", tmp_path_factory.mktemp("nano") / "nano")
