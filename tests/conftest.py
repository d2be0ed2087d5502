from __future__ import annotations

from pathlib import Path

import pytest

from openelm_mlx import load
from openelm_mlx.loading import Engine

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The bundled model."""
    return load("openelm-tiny")
