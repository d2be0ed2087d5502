"""What every test of benchmarks has: a bandwidth that is measured in no time."""

from __future__ import annotations

import pytest

from openelm_mlx.benchmarks.measure import machine


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 2**22)
