"""`openelm finetune`: what it shows and writes, how it stops and goes on, and what it refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from formats import TINY, again, random_folder

from openelm_mlx.cli import finetune, main, training
from openelm_mlx.engine.adapter_files import read_adapter
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune import logs
from openelm_mlx.model.config import OpenELMConfig

TEXTS = ("a fox", "two birds flew", "a little girl", "who lived in a forest", "upon a time")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    shape = replace(TINY, max_context_length=64)
    return again(random_folder(folder / "random", shape), folder / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def run(base, data, monkeypatch):
    """Run the command with small batches, `steps` of them, and without a picture, which takes most
    of the time.
    """
    monkeypatch.setattr("openelm_mlx.finetune.result.write_picture", lambda folder: False)

    def call(*words: object, steps: int = 2) -> int:
        how = ("--steps", steps, "--length", 32, "--batch", 1, *words)
        return main(["finetune", str(base), str(data), *map(str, how)])

    return call


def test_help_shows_options_in_groups(capsys):
    assert main(["help", "finetune"]) == 0
    page = capsys.readouterr().out
    heads = [line for line in page.splitlines() if line.endswith(" options:")]
    named = [head.removesuffix(" options:") for head in heads]
    assert named == ["method", "data", "training", "optimizer", "run", "preference", "model"]
    assert "(default qkv_proj out_proj proj_1 proj_2)" in " ".join(page.split())


def test_a_run_says_what_it_trains_how_it_went_and_how_to_use_it(run, base, tmp_path, capsys):
    assert run("-o", tmp_path / "mine", "--method", "dora") == 0
    said = capsys.readouterr()
    first, second, third, memory, start, *lines = said.err.splitlines()
    assert first == "texts.jsonl: 4 examples to train on (text), 1 for validation"
    assert second.startswith("2 steps, ") and second.endswith(" padding")
    assert memory.startswith("memory: about ") and ", activations " in memory
    assert third.startswith("dora: ") and start.startswith("step 0 of 2: validation ")
    assert lines[1].startswith("step 2 of 2: loss ")
    result, loss, validation, speed, use = said.out.splitlines()
    report = json.loads((tmp_path / "mine" / "finetune.json").read_text())
    best = f"{tmp_path}/mine: the weights of step {report['best_step']}; all steps are done"
    assert result == best and speed.startswith("2 steps in a second, ")
    assert loss == "loss: {first_loss:.4f} in the first step, {last_loss:.4f} in the last".format(
        **report
    )
    assert f"{report['best_validation_loss']:.4f} at its best" in validation
    start = "try it: openelm generate 'Once upon a time' --model"
    assert use == f"{start} {base} --adapter {tmp_path}/mine"
    read_adapter(tmp_path / "mine", OpenELMConfig.from_file(base / "config.json"))
    assert (tmp_path / "mine" / "README.md").is_file()


def test_json_is_the_report_and_all_weights_need_no_base(run, tmp_path, capsys):
    words = ("-o", tmp_path / "mine", "--method", "full", "--validation-share", "0")
    assert run(*words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((tmp_path / "mine" / "finetune.json").read_text())
    assert run(*words) == 2
    assert "mine has a run that is finished; " in capsys.readouterr().err
    words = ("-o", tmp_path / "other", "--method", "full", "--validation-share", "0")
    assert run(*words) == 0
    _, loss, _, use = capsys.readouterr().out.splitlines()
    assert use == f"try it: openelm generate 'Once upon a time' --model {tmp_path}/other"


def test_a_run_that_made_nothing_better_says_so(run, tmp_path, capsys):
    assert run("-o", tmp_path / "mine", "--learning-rate", 0) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{tmp_path}/mine: the weights of step 0; ")
    note = "No evaluation was better than that before the first step: the result is the model as it"
    assert note in said.err and note in (tmp_path / "mine" / "README.md").read_text()


def test_what_was_trained_to_converse_is_tried_in_a_chat(base, tmp_path, capsys):
    turns = [{"role": role, "content": "a fox"} for role in ("user", "assistant")]
    data = tmp_path / "talk.jsonl"
    data.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    words = ["finetune", base, data, "-o", tmp_path / "mine", "--steps", 1, "--bits", 4]
    assert main([*map(str, words), "--group-size", "32"]) == 0
    *_, use = capsys.readouterr().out.splitlines()
    flags = f"--adapter {tmp_path}/mine --bits 4 --group-size 32"
    assert use == f"try it: openelm chat {base} {flags}"
    assert main(["chat", str(base), "-p", "a fox", *flags.split(), "--max-tokens", "2"]) == 0
    assert "template" not in capsys.readouterr().err
    assert main(["fuse", str(base), *flags.split()[:2], "-o", str(tmp_path / "fused")]) == 0
    assert (tmp_path / "fused" / "chat_template.jinja").is_file()
    assert main(["chat", str(base), "-p", "a fox", "--max-tokens", "2"]) == 0
    assert "has no chat template" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_command_that_goes_on_is_told(run, tmp_path, capsys, monkeypatch):
    shown = training.Progress.__call__

    def pressed(self, row, steps):
        shown(self, row, steps)
        if row.get("loss") and row["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Progress, "__call__", pressed)
    words = ["finetune", "base", "my data", "-o", "mine"]
    monkeypatch.setattr(sys, "argv", ["openelm", *words])
    assert run("-o", tmp_path / "mine", steps=4) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"stopped after 2 of 4 steps; {tmp_path}/mine has the checkpoint. To continue:",
        "  openelm finetune base 'my data' -o mine --resume",
    ]
    assert run("-o", tmp_path / "mine", steps=4) == 2
    assert "continue it with --resume, or give another folder" in capsys.readouterr().err
    monkeypatch.setattr(training.Progress, "__call__", shown)
    assert run("-o", tmp_path / "mine", "--resume", steps=4) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("step 4 of 4")]
    assert not [line for line in lines if line.startswith("step 1 of 4")]


def test_a_look_at_the_batch_or_the_plan_writes_nothing(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("--show-batch") == 0
    assert "«" in capsys.readouterr().out
    assert run("--dry-run", "--json", steps=7) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["examples"], plan["validation_examples"]) == (7, 4, 1)
    assert plan["memory"]["total"] > plan["memory"]["activations"] > 0
    assert run("--dry-run", steps=7) == 0
    assert (
        f"7 steps, {plan['epochs']:.3g} epochs, {plan['tokens']:,} tokens in rows of at most"
        in (capsys.readouterr().out)
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "openelm: -o is missing; give the name of a new folder for the result"),
        (["-o", "-"], "openelm: -o is '-'; give the name of a new folder"),
        (["-o", "full"], "openelm: full is not empty (it has file), and nothing in it is replaced"),
        (["-o", "new", "--method", "full", "--bits", "4"], "which --bits 4 would quantize"),
        (["-o", "new", "--log", "wandb"], "openelm: log wandb needs the package wandb: `pip ins"),
        (["--dry-run", "--show-batch"], "not allowed with argument --dry-run; see openelm finet"),
        (["-o", "new", "--patience", "0"], "openelm: patience is 0; allowed is a whole number"),
        (["-o", "new", "--recipe", "corenet"], "--recipe is 'corenet'; did you mean corenet-"),
        (["-o", "new", "--config", "no.yaml"], "openelm: no.yaml does not exist"),
        (["-o", "new", "--validation", "no.jsonl"], "openelm: no.jsonl does not exist; give"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    base, data, tmp_path, capsys, monkeypatch, words, text
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setattr(finetune, "load_model", None)
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    try:
        assert main(["finetune", str(base), str(data), *words]) == 2
    except SystemExit as stop:  # what the parser finds
        assert stop.code == 2
    said = capsys.readouterr().err
    assert text in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_all_weights_are_trained_in_float32_unless_told_otherwise(
    base, data, tmp_path, monkeypatch
):
    """Also where a model is loaded in a narrower type otherwise, as on a GPU."""
    seen = []

    def looked_at(name, args):
        seen.append(getattr(args, "dtype", None))
        raise OptionError("it was looked at")

    monkeypatch.setattr(finetune, "load_model", looked_at)
    words = ["finetune", str(base), str(data), "-o", str(tmp_path / "out")]
    for more in ([], ["--method", "full"], ["--method", "full", "--dtype", "bfloat16"]):
        assert main([*words, *more]) == 2
    assert seen == [None, "float32", "bfloat16"]


def test_data_that_is_not_there_is_told_before_a_model_is_loaded(base, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load_model", None)
    assert main(["finetune", str(base), "/nowhere/pairs.jsonl", "-o", "new"]) == 2
    assert capsys.readouterr().err.startswith("openelm: /nowhere/pairs.jsonl does not exist; give ")
