"""Trainings without a picture, which takes longer than they do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openelm_mlx.finetune import result


@pytest.fixture(scope="session", autouse=True)
def without_picture() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "write_picture", lambda folder: False)
        yield
