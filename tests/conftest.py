"""Models that many tests use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_set import NANO

from openelm_mlx import load
from openelm_mlx.hub import resolve_model
from openelm_mlx.loading import Engine


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The bundled model."""
    return load("openelm-tiny")


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a folder whose context holds 64 tokens only."""
    bundled, folder = resolve_model("openelm-tiny").folder, tmp_path_factory.mktemp("short") / "short"
    folder.mkdir()
    for path in bundled.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_context_length": 64}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden nano model as a folder of this project."""
    from formats import again  # not above: it imports MLX, and openelm_mlx loads a faster BLAS before that

    return again(NANO / "checkpoint.pt", tmp_path_factory.mktemp("nano") / "nano")
