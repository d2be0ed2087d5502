"""`openelm benchmark` from end to end on the bundled model, short."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from bench_document import sparse_document
from started import help_of

from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.results import document as results
from openelm_mlx.benchmarks.results import plots
from openelm_mlx.cli import benchmark, build_parser, main
from openelm_mlx.cli.options import from_args

SHORT = ["--prompt-tokens", "12", "--generation-tokens", "5", "--processes", "1"]


def test_help_teaches_by_example_and_loads_nothing_heavy():
    shown, modules = help_of("benchmark")
    assert not modules & {"mlx.core", "numpy", "rich", "openelm_mlx.benchmarks.results.document"}
    for example in (
        "openelm benchmark --suite quick --peers mlx-lm",
        "--compare before.json after.json",
    ):
        assert example in shown


def test_a_run_against_mlx_lm_ends_with_a_table_and_writes_all_files(tiny, tmp_path, capsys):
    files = {name: str(tmp_path / f"x.{name}") for name in ("json", "csv", "md")}
    written = ["--output", files["json"], "--csv", files["csv"], "--markdown", files["md"]]
    assert main(["benchmark", *SHORT, "--peers", "mlx-lm", *written]) == 0
    text = capsys.readouterr().out
    document = results.load(files["json"])
    ours, theirs = document.rows
    assert (ours.case.engine, theirs.case.engine, theirs.agrees) == ("openelm-mlx", "mlx-lm", True)
    assert (
        len(ours.metrics["decode_tokens_per_second"].values)
        == 10
        == len(theirs.metrics["prefill_tokens_per_second"].values)
    )
    assert {ratio.metric for ratio in document.ratios} == {
        name for name in ours.metrics if name in theirs.metrics
    } & {"prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds"}
    assert ours.percent_of_bound == pytest.approx(
        100
        * ours.metrics["decode_tokens_per_second"].median
        * sum(ours.bytes_per_token.values())
        / document.machine.copy_bytes_per_second
    )
    assert (
        0.99
        < (sum(ours.bytes_per_token.values()) - ours.bytes_per_token["kv"]) / tiny.nbytes
        < 1.01
    )
    assert (
        "| openelm-mlx |" in text
        and "| openelm-mlx / |" in text
        and "is not counted" in " ".join(text.split())
    )
    assert text == Path(files["md"]).read_text() and Path(files["csv"]).read_text().startswith(
        "engine,model"
    )
    assert {"mlx-lm", "mlx", "openelm-mlx"} <= document.versions.keys()
    assert document.machine.cores == os.cpu_count()
    assert main(["benchmark", "--show", files["json"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path(files["json"]).read_text())
    assert main(["benchmark", "--compare", files["json"], files["json"]]) == 0


@pytest.mark.parametrize(
    ("words", "peers"),
    [
        ([], ()),
        (["--peers", ""], ()),
        (["--peers", "mlx-lm, torch,"], ("mlx-lm", "torch")),
        (["--peers", "mlx-lm,torch", "--peers", "llama.cpp"], ("mlx-lm", "torch", "llama.cpp")),
    ],
)
def test_peers_are_named_with_commas_or_one_by_one(words, peers):
    args = build_parser().parse_args(["benchmark", *words])
    assert from_args(BenchmarkOptions, args).peers == peers


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert main(["benchmark", "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib: `pip install 'openelm-mlx[plot]'`" in capsys.readouterr().err


def test_ctrl_c_keeps_finished_trials_and_marks_them_partial(tmp_path, capsys, monkeypatch):
    """A real SIGINT, in the midst of the fourth round."""
    ticks = []

    def tick(text, work):
        ticks.append(text)
        if len(ticks) == 1 + 2 * 4 + 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(benchmark, "progress_bar", lambda: nullcontext(tick))
    file = tmp_path / "part.json"
    lengths = ["--prompt-tokens", "8", "12", "--generation-tokens", "2"]
    how = ["--processes", "1", "--trials", "7", "--output", str(file)]
    assert main(["benchmark", *lengths, *how]) == 130
    document = results.load(file)
    counts = [len(row.metrics["decode_tokens_per_second"].values) for row in document.rows]
    assert document.partial and all(3 <= count < 7 for count in counts)
    assert "interrupted: only the trials that were finished are here" in document.notes
    assert "partial:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "3"], "trials is 3; allowed is a whole number from 5 up"),
        (["--random-weights", "2b"], "'2b' is not a published OpenELM size"),
        (["270n"], "did you mean"),
        (["--peers", "vllm"], "peers is 'vllm'; allowed: mlx-lm, llama.cpp, torch"),
        (
            ["--output", "none/x.json"],
            "--output none/x.json cannot be written: its folder does not exist; make it first",
        ),
        (["--plot", "x.gif"], "--plot x.gif: give a name that ends in .png or .svg"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("openelm: ") and message in error and error.count("\n") == 1


@pytest.fixture
def measured(tmp_path, monkeypatch) -> str:
    """A result file in the current folder."""
    monkeypatch.chdir(tmp_path)
    results.save(sparse_document(), "measured.json")
    return "measured.json"


@pytest.mark.parametrize("name", ["output", "csv", "markdown", "plot", "report"])
def test_a_file_that_exists_is_not_replaced(measured, name, capsys):
    Path("mine.png").write_text("precious")
    assert main(["benchmark", "--show", measured, f"--{name}", "mine.png"]) == 2
    message = f"openelm: --{name} mine.png exists already; give another name, or remove it\n"
    assert capsys.readouterr() == ("", message)
    assert Path("mine.png").read_text() == "precious"


def test_a_file_that_appears_during_the_work_is_not_replaced(measured, monkeypatch, capsys):
    def show(document, as_json):
        Path("mine.csv").write_text("precious")

    monkeypatch.setattr(benchmark, "show", show)
    Path("other.md").touch()  # as mktemp makes it
    words = ["--csv", "mine.csv", "--markdown", "other.md"]
    assert main(["benchmark", "--show", measured, *words]) == 2
    message = "openelm: --csv mine.csv exists already; give another name, or remove it\n"
    assert capsys.readouterr().err == message
    assert Path("mine.csv").read_text() == "precious" and Path("other.md").read_text()


def test_the_command_in_a_result_names_no_folder_of_the_user(monkeypatch):
    from openelm_mlx.cli.benchmark import command_line

    words = [
        "benchmark",
        "/home/someone/my model",
        "--output=/home/someone/x.json",
        "apple/OpenELM-270M",
        "../someone/x",
        "--speculation",
        "draft /home/someone/near",
    ]
    monkeypatch.setattr(sys, "argv", ["openelm", *words])
    assert command_line() == (
        "openelm benchmark 'my model' --output=x.json apple/OpenELM-270M x "
        "--speculation 'draft near'"
    )


def test_a_chip_that_is_not_here_is_predicted_and_marked_so(capsys):
    assert main(["benchmark", "270m", "--predict", "m3-max"]) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured" in text and "270m" in text and "1.1b" not in text
