"""What every test of benchmarks has: a bandwidth that is measured in no time."""

from __future__ import annotations

import pytest

from openelm_mlx.benchmarks.measure import machine, run

BYTES = 2**22


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    """Copy few bytes, here and in the processes that a run starts."""
    monkeypatch.setattr(machine, "COPIED", BYTES)
    first, line, last = run.CHILD.rpartition("\n")
    smaller = f"from openelm_mlx.benchmarks.measure import machine; machine.COPIED = {BYTES}"
    monkeypatch.setattr(run, "CHILD", "".join([first, line, smaller, line, last]))
