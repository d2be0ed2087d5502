"""Processes that end by SIGKILL; tests/tools/evaluate_kills.py kills many more, anywhere."""

from __future__ import annotations

import signal
import sys

import evaluate_kills
from evaluate_kills import Runs, answer, results, stored

REQUESTS = 40


def test_a_killed_run_goes_on_in_two_processes_with_equal_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "own"))
    answer(REQUESTS, tmp_path / "whole")
    words = [sys.executable, evaluate_kills.__file__, str(tmp_path)]
    words += ["--answer", str(tmp_path / "killed"), "--requests", str(REQUESTS)]
    alone, shared = Runs(words, tmp_path / "killed"), Runs(words, tmp_path / "killed", 2)
    killed = alone.begin("--most", "2")
    assert killed.communicate()[1] == "" and killed.returncode == -signal.SIGKILL
    assert stored(alone.cache) == 2
    said = shared.begin("--most", "1").communicate()[1]
    assert "Node with rank 1 exited with code -9" in said and "Traceback" not in said
    assert stored(alone.cache) > 2 and not shared.target.exists()
    shared.whole()  # checks that nothing is left
    assert results(shared.target) == results(tmp_path / "whole")
