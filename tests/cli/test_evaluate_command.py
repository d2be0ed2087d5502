"""`openelm evaluate`: what it prints and writes, how it stops and goes on, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import weakref
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from adapter_folders import mlx_lm_folder
from full_disk import files_of_at_most
from optional import hide

from openelm_mlx.cli import evaluate, main
from openelm_mlx.cli.evaluate import Progress
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.evaluate.options import EvaluateOptions
from openelm_mlx.evaluate.report import Report
from openelm_mlx.model.config import OpenELMConfig

ANIMALS = ("wolf", "fox", "hen", "goat", "cat", "mouse")
CHOICE = {
    "task": "choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "questions.jsonl"},
    "test_split": "train",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with a task of 12 questions of three choices."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for number, animal in enumerate(ANIMALS * 2):
        question = f"Once upon a time there was a {animal} who went into the"
        rows.append({"question": question, "choices": ["forest", "of a", animal]})
        rows[-1]["answer"] = number % 3
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "choice.yaml").write_text(json.dumps(CHOICE), encoding="utf-8")  # JSON is YAML
    return folder


@pytest.fixture
def run(tasks, tmp_path, monkeypatch):
    """Run the command on the task, with an empty cache."""
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))

    def call(*arguments: object) -> int:
        words = ["--include", str(tasks), "--tasks", "choice", *map(str, arguments)]
        return main(["evaluate", "openelm-tiny", *words])

    return call


def answers(folder: Path) -> list[Path]:
    return list((folder / "cache" / "answers").glob("*.sqlite"))


@pytest.mark.needs("lm-eval")
def test_a_report_is_printed_and_written_once(run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert run("--json", "-o", out) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    (task,) = found["tasks"]
    assert task["asked"] == task["of"] == 12
    assert json.loads((out / "report.json").read_text()) == found and not answers(tmp_path)
    assert run() == 0  # what is printed without --json is what was written
    assert (out / "report.md").read_text(encoding="utf-8") == capsys.readouterr().out
    (samples,) = out.glob("*/samples_choice_*.jsonl")
    right = [json.loads(line)["acc"] for line in samples.read_text().splitlines()]
    assert sum(right) / 12 * 100 == pytest.approx(task["scores"][0]["value"])
    assert run("-o", out) == 2
    refused = f"openelm: -o {out}/report.json exists already; give another name, or remove it\n"
    assert capsys.readouterr().err == refused


@pytest.mark.needs("lm-eval")
def test_files_are_written_though_nobody_reads_the_report(run, tmp_path, capsys, monkeypatch):
    def left(*_):  # as the reader of `| head` has
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "show", left)
    assert run("--limit", "2", "-o", tmp_path / "out") == 0
    files = {"report.json", "report.md", "openelm-tiny"}
    assert files <= {path.name for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("openelm_mlx.evaluate.harness.save", lambda *_: None)
    write = evaluate.write

    def on_a_full_disk(*words):
        with files_of_at_most(64):
            write(*words)

    monkeypatch.setattr(evaluate, "write", on_a_full_disk)
    capsys.readouterr()
    assert run("--limit", "2", "-o", tmp_path / "full") == 2
    said = f"openelm: -o {tmp_path}/full cannot be written: File too large\n"
    assert capsys.readouterr().err == said and [*(tmp_path / "full").iterdir()] == []


@pytest.mark.needs("lm-eval")
def test_a_model_with_an_adapter_is_compared_with_itself(run, tmp_path, capsys, monkeypatch):
    first, second, loaded = evaluate.load_model, evaluate.load_beside, []

    def load(name, args):
        engine = first(name, args)
        loaded.append(weakref.ref(engine.model))
        return engine

    def load_beside(name, args):
        assert loaded[-1]() is None  # its memory is free
        return second(name, args)

    monkeypatch.setattr(evaluate, "load_model", load)
    monkeypatch.setattr(evaluate, "load_beside", load_beside)
    mlx_lm_folder(tmp_path / "mine", OpenELMConfig.from_file(BUNDLED / "config.json"))
    assert run("--json", "--limit", "9", "--adapter", tmp_path / "mine") == 0
    alone = json.loads(capsys.readouterr().out)
    with_both = ("--limit", "9", "--adapter", tmp_path / "mine", "--against", "openelm-tiny")
    assert run("--json", *with_both) == 0
    found = json.loads(capsys.readouterr().out)
    (change,), second = found.pop("differences"), found.pop("against")
    assert found == alone and found["model"] == "openelm-tiny with mine"
    scores = [one["tasks"][0]["scores"][0]["value"] for one in (found, second)]
    assert second["model"] == "openelm-tiny" and change["questions"] == 9
    assert (change["first"], change["second"]) == pytest.approx(scores)
    assert (change["better"] - change["worse"]) / 9 * 100 == pytest.approx(change["difference"])
    assert run(*with_both, "--bits", "4") == 2  # MODEL alone has flags of its own
    assert "openelm-tiny is quantized already; --bits needs" in capsys.readouterr().err


@pytest.mark.needs("lm-eval")
def test_ctrl_c_keeps_what_was_answered_and_the_same_command_goes_on(
    run, tmp_path, capsys, monkeypatch
):
    from openelm_mlx.evaluate.score import Scorer

    command = ("--json", "--batch-tokens", "24")
    assert run(*command) == 0
    whole, passes = capsys.readouterr().out, []
    ask = Scorer.run

    def press(self, requests, work):
        passes.append(work)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return ask(self, requests, work)

    monkeypatch.setattr(Scorer, "run", press)
    before = signal.getsignal(signal.SIGINT)
    assert run(*command) == 130
    assert signal.getsignal(signal.SIGINT) is before and len(passes) == 2
    kept = sum(len(work.requests) for work in passes)
    said = f"stopped: openelm-tiny: {kept} of 36 answers; the same command goes on\n"
    assert capsys.readouterr() == ("", said) and answers(tmp_path)
    assert run(*command) == 0
    assert capsys.readouterr().out == whole and not answers(tmp_path)
    assert sum(len(work.requests) for work in passes) == 36  # none was asked twice


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "notes"], "-o notes is not a folder; give the name of one"),
        (["-o", "notes/out"], "notes is not a folder; give another place"),
        (["--suite", "glue"], "--suite is 'glue'; allowed: zero-shot, openllm, llm360, commonse"),
        (["--shots", "5"], "shots is 5, but no task is named; give tasks too"),
        (["--tasks", ","], "openelm: --tasks names no task; give one, or leave it out\n"),
        (["-o", ""], "openelm: -o is empty; give the name of a folder\n"),
        (["-o", "-"], "-o - is no folder, and the report is printed anyway; give the name of a"),
        (["-o", "x" * 300], "x cannot be written: File name too long; give another place\n"),
        (["-o", "link"], "-o link is not a folder; give the name of one"),
        (["-o", "."], "-o report.md cannot be written: it is a folder; give the name of a file"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("notes", encoding="utf-8")
    Path("link").symlink_to("nowhere")
    Path("report.md").mkdir()
    try:
        status = main(["evaluate", *words])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2 and message in said.err
    assert said.out == "" and said.err.count("\n") == 1


def test_without_lm_eval_the_extra_is_named_before_a_model_is_loaded(capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("language_model", "harness", "evaluation"):
        monkeypatch.delitem(sys.modules, f"openelm_mlx.evaluate.{name}", raising=False)
    hide(monkeypatch, "lm_eval")
    monkeypatch.delattr(evaluate, "load_model")
    assert main(["evaluate"]) == 2
    assert capsys.readouterr().err.endswith("pip install 'openelm-mlx[evaluate]'\n")


@pytest.mark.needs("lm-eval")
def test_both_models_are_found_before_one_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda name, args: pytest.fail(name))
    assert run("--against", "none-such") == 2
    said = capsys.readouterr().err
    assert said.startswith("openelm: unknown model 'none-such'; a model is")
    assert said.count("\n") == 1


@pytest.mark.needs("lm-eval")
def test_tasks_that_are_not_there_are_refused_before_a_model_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_model", lambda name, args: pytest.fail(name))
    for folder in ("none-such", "~none-such/tasks", "x" * 5000):
        assert run("--include", folder) == 2
        said = capsys.readouterr().err
        assert said.startswith("openelm: there is no folder ") and said.count("\n") == 1


def test_progress_is_a_bar_with_an_estimate_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    before, (ours, theirs) = sys.stdout, os.openpty()
    with open(theirs, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        # as while lm-eval runs
        with Progress("270m", quiet=False) as progress, redirect_stdout(io.StringIO()):
            progress(10, 1000, 5000, 95000)
            assert progress.bar is None  # an evaluation of less than two seconds has none
            progress.begun -= 60
            progress(20, 1000, 15000, 95000)
            progress(30, 1000, 25000, 95000)
        assert sys.stdout is before
        drawn, over = b"", b"\x1b[?25h"  # the cursor is shown again
        while over not in drawn and select.select([ours], [], [], 10)[0]:
            drawn += os.read(ours, 1 << 16)
    os.close(ours)
    assert b"270m: 30 of 1,000 answers" in drawn and b"0:0" in drawn


def test_progress_is_said_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "NOTICE_SECONDS", 0.0)
    with Progress("270m", quiet=False) as progress:
        assert str(progress) == "270m: no answers yet"
        progress(10, 1000, 5000, 95000)  # answered before
        progress.begun -= 60
        progress(20, 1000, 15000, 95000)
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "270m: 20 of 1,000 answers; about 8 minutes left"
    with Progress("270m", quiet=True) as progress:
        progress(20, 1000, 15000, 95000)
    assert capsys.readouterr().err == ""


@pytest.mark.needs("lm-eval")
@pytest.mark.parametrize("name", ["270m", "3b"])
def test_a_published_size_is_asked_the_zero_shot_suite(name):
    from openelm_mlx.evaluate.evaluation import chosen

    suite, tasks = chosen(OpenELMConfig.from_name(name), EvaluateOptions())
    assert suite == "zero-shot" and len(tasks) == 7 and set(tasks.values()) == {0}
    small = OpenELMConfig(model_dim=64, head_dim=32, num_transformer_layers=2, vocab_size=512)
    assert chosen(small, EvaluateOptions()) == (
        None,
        {"fairy_tales_two": None, "fairy_tales_four": None},
    )
    asked = EvaluateOptions(tasks=("mmlu", "piqa"), shots=5)
    assert chosen(small, asked) == (None, {"mmlu": 5, "piqa": 5})
    assert chosen(small, EvaluateOptions(suite="llm360"))[1]["arc_challenge"] == 25


def test_a_note_about_both_models_stands_once():
    notes = ("about both", "about the first"), ("about both", "about the second")
    both = [Report("m", None, None, (), None, some, None) for some in notes]
    assert [one.notes for one in evaluate.noted_once(both)] == [notes[0], notes[1][1:]]
