"""Facts of the machine and the source, and the bandwidth that a result stands on."""

from __future__ import annotations

import itertools
import os
import subprocess

import pytest

from openelm_mlx import device
from openelm_mlx.benchmarks.measure import machine
from openelm_mlx.model.kernels.kernel import Choice


@pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")
def test_machine_facts():
    found = machine.machine()
    assert (
        found.cores == os.cpu_count()
        and found.memory_bytes == device.memory_bytes()
        and "user" not in str(found)
    )


def test_a_result_tells_which_kernels_of_ours_ran(monkeypatch):
    chosen = Choice(frozenset({"sample", "add_rms_norm"}), "attend: /home/me/x is no library")
    monkeypatch.setattr("openelm_mlx.model.kernels.kernel.choice", lambda: chosen)
    for kind, names in (("metal", "add_rms_norm, sample"), ("cpu", None)):
        monkeypatch.setattr(device, "facts", lambda kind=kind: {"backend": kind, "chip": None})
        assert machine.machine().kernels == names


def test_the_cores_of_a_gpu_are_read_where_macos_tells_them():
    shown = "+-o AGXAcceleratorG16X  <class AGXAcceleratorG16X>\n    | {\n"
    assert machine.read_cores(f'{shown}    |   "gpu-core-count" = 20\n    | }}') == 20
    assert machine.read_cores(shown) is None


def test_the_commit_is_told_and_whether_the_sources_were_changed(tmp_path):
    assert machine.commit(tmp_path) == (None, None)

    def git(*words):
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True)

    (tmp_path / "file").write_text("one")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    commit, dirty = machine.commit(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "file").write_text("two")
    assert machine.commit(tmp_path) == (commit, True)


def test_bandwidth_counts_what_a_copy_moves_and_what_a_read_reads():
    """By a clock that advances one second a look, so that only the counted bytes matter."""
    ticks = itertools.count()
    cores = os.cpu_count() if device.kind() == "cpu" else 1
    size = 2 * 2**20 * (cores or 1)
    found = machine.bandwidth(size, trials=3, clock=lambda: float(next(ticks)))
    assert found == (2 * size, size)
    assert next(ticks) == 2 * 2 * (machine.WARM_UP + 3)  # two looks a run
