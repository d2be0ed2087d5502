"""`openelm batch`: what it refuses, what it says, and how it stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from batch_lines import line, read, stable, write

from openelm_mlx.cli import batch, main
from openelm_mlx.cli.batch import Progress
from openelm_mlx.device import mx
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.run import Ranks
from openelm_mlx.server.batch_file import Output, part_of
from openelm_mlx.server.batch_run import Result

LINES = [line(f"{n}", temperature=0.8, max_tokens=2, model="openelm-tiny") for n in range(6)]


def run(*arguments: object) -> int:
    return main(["batch", *map(str, arguments), "--slots", "2"])


def test_ctrl_c_keeps_what_has_ended_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    source, target = write(tmp_path / "in.jsonl", [*LINES, line("wrong", n=0)]), tmp_path / "out"
    assert run(source, "-o", tmp_path / "whole") == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'whole'} is complete: 7 lines, 1 of them errors" in said
    assert "7 lines in " in said and "answers 12 tokens at" in said
    add = Output.add

    def press(self: Output, lines: list[str]) -> None:
        add(self, lines)
        if lines:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "add", press)
        assert run(source, "-o", target) == 130
    answered = len(part_of(target, 0).read_text().splitlines()) - 1
    assert 0 < answered < 7
    expected = f"stopped: {answered} of 7 lines are answered"
    said = capsys.readouterr().err
    assert expected in said and "; the same command goes on" in said
    assert run(source, "-o", target) == 1
    assert f"{7 - answered} lines in " in capsys.readouterr().err
    one, other = read(target), read(tmp_path / "whole")
    assert [stable(each) for each in one] == [stable(each) for each in other]
    part_of(target, 0).touch()  # as after a kill while parts are removed
    assert run(source, "-o", target) == 1
    assert not part_of(target, 0).exists()
    assert capsys.readouterr().err == f"{target} is complete: 7 lines, 1 of them errors\n"


def test_answers_to_other_requests_or_of_other_options_are_not_the_batch(tmp_path, capsys):
    """The custom_ids are the same, so only the answers' mark tells."""
    source, target = write(tmp_path / "in.jsonl", LINES[:1]), tmp_path / "out"
    assert run(source, "-o", target) == run(source, "-o", target) == 0
    answer = target.read_text()
    assert run(source, "-o", target, "--kv-bits", "8") == 2
    write(source, [line("0", max_tokens=1)])
    assert run(source, "-o", target) == 2
    refused = f"{target} exists, and is not what this model with these options answers to {source}"
    assert capsys.readouterr().err.count(f"{refused}; give another -o, or remove it") == 2
    assert target.read_text() == answer


def test_other_options_do_not_go_on(tmp_path, capsys, monkeypatch):
    source, target = write(tmp_path / "in.jsonl", LINES), tmp_path / "out"
    monkeypatch.setattr(batch, "finished", lambda output, report: 0)
    assert run(source, "-o", target) == 0
    assert run(source, "-o", target, "--kv-bits", "8") == 2
    assert "out.part-0 was begun with another options; give the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in.jsonl", "has the requests themselves; give another name"),
        ("notes", "exists, and is not what this model with these options answers to"),
        ("folder", "cannot be written: it is a folder"),
        ("none/out", "cannot be written: its folder does not exist"),
        ("/dev/null", "-o /dev/null is not a regular file; give another name"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, output, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(batch, "load_model")
    write(tmp_path / "in.jsonl", LINES)
    (tmp_path / "notes").write_text("notes")
    (tmp_path / "folder").mkdir()
    assert run("in.jsonl", "-o", output) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("names", [("-", "out"), ("in.jsonl", "-")])
def test_a_batch_needs_files(capsys, names):
    assert run(names[0], "-o", names[1]) == 2
    said = capsys.readouterr().err
    assert said.startswith("openelm: - stands for no file here: ") and said.count("\n") == 1
    assert said.endswith("; give two files\n")


def test_progress_is_said_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(batch, "NOTICE_SECONDS", 0.0)
    report = Progress(1000, 900, 1, "process 2 of 2: ")
    with report.shown() as show:
        report.begun -= 60
        show([Result("", True), Result("", False, 9, 4, 5)])
    said = "process 2 of 2: 102 of 1,000 lines are answered, 2 errors; about 7 hours left\n"
    assert capsys.readouterr().err == said


def test_processes_meet(tmp_path, monkeypatch):
    """Of two processes the second looks for what the first has made."""
    monkeypatch.setattr(mx.distributed, "all_gather", lambda array, stream: mx.tile(array, 2))
    with pytest.raises(OptionError, match="process 2 does not see .*part-0; -o must be in a fold"):
        batch.meet(Ranks(1, 2), tmp_path / "out")
    part_of(tmp_path / "out", 0).touch()
    batch.meet(Ranks(1, 2), tmp_path / "out")


def test_a_batch_needs_nothing_of_a_server():
    names = {"fastapi", "starlette", "uvicorn", "prometheus_client", "asyncio", "llguidance"}
    code = f"import openelm_mlx.server.batch_run, sys; print({names} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
