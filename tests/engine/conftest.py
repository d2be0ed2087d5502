"""A model and a smaller one that drafts for it."""

from __future__ import annotations

import pytest
from small import random_engine

from openelm_mlx.engine.loading import Engine


@pytest.fixture(scope="module")
def target(tiny: Engine) -> Engine:
    """A model of random weights."""
    return random_engine(tiny, seed=1)


@pytest.fixture(scope="module")
def draft(tiny: Engine) -> Engine:
    """A model of one layer that drafts for it."""
    return random_engine(tiny, seed=2, layers=1)
