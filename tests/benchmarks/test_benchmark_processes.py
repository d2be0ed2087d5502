"""A benchmark in several processes: what they share, and what an interrupt or a failure keeps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from bench_sessions import measured

from openelm_mlx.benchmarks.measure import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.results import document as results
from openelm_mlx.cli import main
from openelm_mlx.errors import BenchmarkError, HubError


def test_several_processes_share_the_trials_and_become_one_result(tmp_path, capsys):
    """The real command: what it counts, what it records, and that it compares with itself."""
    file = str(tmp_path / "x.json")
    options = ["--prompt-tokens", "8", "--generation-tokens", "3", "--trials", "5"]
    assert main(["benchmark", *options, "--processes", "2", "--output", file]) == 0
    document = results.load(file)
    (row,) = document.rows
    for name in ("decode_tokens_per_second", "time_to_first_token_seconds"):
        assert [len(trials) for trials in row.metrics[name].processes] == [3, 3]
    assert len(row.metrics["load_seconds"].processes) == 2 and document.processes == 2
    assert "medians of 2 processes with 3 trials each" in document.notes[0]
    assert document.machine.copy_bytes_per_second > 0 < document.machine.read_bytes_per_second
    root = Path(__file__).parents[2]
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    assert document.commit == (head.stdout.strip() or None)
    assert "| openelm-mlx |" in capsys.readouterr().out


def test_a_mistake_that_a_process_finds_is_told_as_if_it_were_found_here():
    with pytest.raises(HubError, match="unknown model '270n'"):
        run.run(BenchmarkOptions(models=("270n",), processes=2))


SCRIPT = """
from openelm_mlx.benchmarks.measure import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
run.CHILD = {!r}
options = dict(prompt_tokens=(4,), generation_tokens=(2,), trials=5)
print("rows", len(run.run(BenchmarkOptions(processes=2, **options)).rows))
"""


def test_a_script_without_a_main_guard_measures_in_several_processes(tmp_path):
    """Processes of multiprocessing would import the script, and not find one read from stdin.

    What lies in the working folder is not taken for a module of Python's.
    """
    (tmp_path / "pickle.py").write_text("raise ImportError('not mine')")
    command, settings = [sys.executable, "-P", "-"], {"capture_output": True, "text": True}
    script = SCRIPT.format(run.CHILD)
    done = subprocess.run(command, input=script, cwd=tmp_path, **settings)
    assert (done.stdout, done.stderr) == ("rows 1\n", "")


def test_a_process_that_is_killed_is_told_in_one_line():
    def tick(text, work):
        os.kill(int(Path("/proc/thread-self/children").read_text().split()[0]), signal.SIGKILL)

    if not Path("/proc/thread-self/children").exists():
        pytest.skip("needs Linux's list of child processes")
    with pytest.raises(BenchmarkError, match="^process 1 ended with status -9; its own"):
        run.run(BenchmarkOptions(prompt_tokens=(4,), generation_tokens=(2,), processes=2), tick)


@pytest.mark.parametrize(("after", "kept"), [(0, 1), (1, 1)])
def test_ctrl_c_keeps_finished_processes_or_what_the_first_has_finished(
    after, kept, tmp_path, monkeypatch
):
    """A real SIGINT while a process measures: in the first one, and in the second."""
    # MLX keeps compiled kernels below the temporary folder: they need not be compiled again
    (tmp_path / "mlx").symlink_to(Path(tempfile.gettempdir()) / "mlx")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ticks = []

    def tick(text, work):
        if text is not None and text.startswith(f"{after + 1}/"):
            ticks.append(text)
            if len(ticks) == 4:
                os.kill(os.getpid(), signal.SIGINT)

    options = BenchmarkOptions(
        prompt_tokens=(8,), generation_tokens=(2,), trials=24, processes=3, command="x"
    )
    document = run.run(options, tick)
    assert document.partial and document.processes == kept
    assert "medians of 8 trials; " in document.notes[0]
    assert list(tmp_path.glob("openelm-*")) == []
    counted = len(document.rows[0].metrics["decode_tokens_per_second"].values)
    assert counted == 8 if after else 0 < counted < 8
    note = "interrupted; 1 of 3 processes are here" if after else "interrupted: only the trials"
    assert any(text.startswith(note) for text in document.notes)


@pytest.mark.parametrize("changed", [False, True], ids=["fails", "differs"])
def test_a_later_process_that_fails_or_differs_costs_the_finished_ones_nothing(
    monkeypatch, changed
):
    finished = measured(prompt_tokens=(8,), generation_tokens=(2,))

    def one_process(options, number, tick):
        if number == 2 and not changed:
            raise BenchmarkError("out of memory")
        return replace(finished, commit="0123") if number == 2 else finished

    monkeypatch.setattr(run, "one_process", one_process)
    document = run.run(BenchmarkOptions(prompt_tokens=(8,), generation_tokens=(2,), processes=4))
    assert document.partial and document.processes == 2
    why = "commit" if changed else "out of memory"
    (note,) = (note for note in document.notes if why in note)
    assert note.startswith("the next one failed: ")
    assert note.endswith("; 2 of 4 processes are here")
