"""`openelm benchmark` from end to end on the bundled model, short."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from small import random_engine

from openelm_mlx import device
from openelm_mlx.benchmarks import peers
from openelm_mlx.benchmarks.checks import Answer, Request
from openelm_mlx.benchmarks.checks import soak as soaking
from openelm_mlx.benchmarks.measure import harness, machine, run, weights
from openelm_mlx.benchmarks.measure.harness import NewProcess
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.measure.weights import groups, last_part
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.results import document as results
from openelm_mlx.cli import benchmark, build_parser, main
from openelm_mlx.cli.options import from_args
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.errors import BenchmarkError, HubError

SHORT = ["--prompt-tokens", "12", "--generation-tokens", "5", "--processes", "1"]


@pytest.fixture(autouse=True)
def small_copies(monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 2**22)


def measured(**options):
    """Measure in this process, where a test can change things."""
    return run.run(BenchmarkOptions(trials=5, processes=1, **options))


def test_help_teaches_by_example_and_loads_nothing_heavy():
    code = (
        "import sys\nfrom openelm_mlx.cli import main\n"
        "try:\n    main(['benchmark', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = ('mlx.core', 'numpy', 'rich', 'openelm_mlx.benchmarks.results.document')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n")
    for example in (
        "openelm benchmark --suite quick --peers mlx-lm",
        "--compare before.json after.json",
    ):
        assert example in result.stdout


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
from openelm_mlx.benchmarks.measure.run import run
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
options = dict(prompt_tokens=(4,), generation_tokens=(2,), trials=5)
print("rows", len(run(BenchmarkOptions(processes=2, **options)).rows))
"""


def test_a_script_without_a_main_guard_measures_in_several_processes(tmp_path):
    """Processes of multiprocessing would import the script, and not find one read from stdin.

    What lies in the working folder is not taken for a module of Python's.
    """
    (tmp_path / "pickle.py").write_text("raise ImportError('not mine')")
    command, settings = [sys.executable, "-P", "-"], {"capture_output": True, "text": True}
    done = subprocess.run(command, input=SCRIPT, cwd=tmp_path, **settings)
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


def test_a_soak_becomes_a_row_that_says_what_went_wrong(monkeypatch):
    def soak(engine, minutes, tick, seen):
        seen.probes += [Timed((1, 2), (0.5, 0.75))] * 3
        seen.failures.append("WRONG: a token")

    monkeypatch.setattr(soaking, "soak", soak)
    document = run.run(BenchmarkOptions(suite="soak", minutes=1))
    (row,) = document.rows
    assert row.metrics["decode_tokens_per_second"].values == (4.0,) * 3
    assert row.notes[0] == "failed: WRONG: a token" and run.failed(document)


def test_every_kind_of_case_runs(capsys):
    document = measured(
        prompt_tokens=(20,),
        generation_tokens=(6,),
        batch_sizes=(1, 2),
        caches=("kv8",),
        speculations=("none", "prompt-lookup"),
    )
    labels = [
        str(row.case).removeprefix("openelm-mlx openelm-tiny 8-bit 20+6 ") for row in document.rows
    ]
    assert labels == ["kv8", "kv8 prompt-lookup", "batch 2 kv8", "batch 2 kv8 prompt-lookup"]
    assert all("decode_tokens_per_second" in row.metrics for row in document.rows)
    one, lookup, batch, both = (row.metrics for row in document.rows)
    assert (
        "tokens_per_pass" in lookup and "tokens_per_pass" in both and "tokens_per_pass" not in one
    )
    assert (
        "time_to_first_token_reused_seconds" in one
        and "time_to_first_token_reused_seconds" not in batch
    )
    assert batch["peak_memory_bytes"].median > one["peak_memory_bytes"].median


def test_widths_are_made_from_the_stored_weights_and_their_loss_is_measured(monkeypatch):
    monkeypatch.setattr(weights, "LOSS_TOKENS", 32)
    document = measured(suite="bits", bits=(8, 4), prompt_tokens=(9,), generation_tokens=(2,))
    (row,) = document.rows
    assert (
        row.case.bits == 4
        and row.metrics["kl_mean"].median > 0
        and row.metrics["top_1_agreement"].median > 0.5
    )
    assert (
        "openelm-tiny has 8-bit weights already: 8 bits left out, fewer bits made from those"
        in document.notes
    )
    assert (
        "loss is against the model as stored, on 32 tokens that it samples itself" in document.notes
    )


def test_the_first_process_measures_the_loss_and_its_first_case_has_it(monkeypatch):
    monkeypatch.setattr(weights, "LOSS_TOKENS", 32)
    lengths = {"prompt_tokens": (9, 12), "generation_tokens": (2,)}
    options = BenchmarkOptions(suite="bits", bits=(4,), trials=5, processes=1, **lengths)
    for number, expected in enumerate(([True, False], [False, False])):
        rows = run.Run(options, lambda label, work: None, number).document().rows
        assert ["kl_mean" in row.metrics for row in rows] == expected


def test_widths_that_do_not_fit_into_memory_together_are_measured_one_by_one(monkeypatch):
    options = BenchmarkOptions(suite="paper", random_weights=("3b",))
    notes = []
    monkeypatch.setattr(device, "memory_bytes", lambda: 64 * 2**30)
    assert groups("3b", options, 0, notes) == [(None, 4)] and notes == []
    monkeypatch.setattr(device, "memory_bytes", lambda: 8 * 2**30)
    assert groups("3b", options, 0, notes) == [(None,), (4,)]
    assert notes == [
        "3b: the numbers of bits do not fit into memory together and were measured one after the "
        "other"
    ]


def test_what_does_not_fit_the_context_is_left_out_and_said():
    document = measured(prompt_tokens=(8, 2000), generation_tokens=(3,), peers=("mlx-lm", "mlx-lm"))
    assert [row.case.prompt_tokens for row in document.rows] == [8, 8]
    assert "openelm-tiny: 2000 + 3 tokens left out, its context is 1024 tokens" in document.notes


def test_one_of_several_models_that_cannot_be_loaded_costs_the_others_nothing(capsys):
    document = measured(models=("270n", "openelm-tiny"), prompt_tokens=(8,), generation_tokens=(2,))
    assert len(document.rows) == 1 and any(
        note.startswith("270n was left out: unknown model '270n'") for note in document.notes
    )
    assert main(["benchmark", "270n", "450n"]) == 2
    assert (
        "openelm: " in (error := capsys.readouterr().err)
        and "270n was left out" in error
        and "450n was left out" in error
    )


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    assert main(["benchmark", "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib: `pip install 'openelm-mlx[plot]'`" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_left_out_with_the_remedy(monkeypatch):
    monkeypatch.setattr(peers, "why_not", lambda name: "not installed: `pip install mlx-lm`")
    document = measured(prompt_tokens=(8,), generation_tokens=(2,), peers=("mlx-lm",))
    assert (
        "mlx-lm was left out: not installed: `pip install mlx-lm`" in document.notes
        and len(document.rows) == 1
    )


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


def test_a_new_process_gives_the_same_first_token(tiny):
    from openelm_mlx.benchmarks.peers.on_mlx import OurSession, prompt_ids

    prompt = prompt_ids(tiny, 12)
    timed = NewProcess("openelm-mlx", tiny.path, "float32", tiny.tokenizer.path).generate(prompt)
    assert timed.tokens == OurSession(tiny).generate(prompt, 1).tokens and timed.first > 0
    with pytest.raises(
        BenchmarkError, match="^openelm-mlx did not start up: unknown model 'no-such-folder'"
    ):
        NewProcess("openelm-mlx", Path("no-such-folder"), "float32", None).generate(prompt)


def test_the_startup_suite_takes_turns_with_peers_and_times_only_those_that_agree(
    tiny, monkeypatch
):
    ran = []

    def generate(self, prompt, tokens):
        ran.append((self.engine, self.task["tokenizer"]))
        return Timed((7 if self.engine == "openelm-mlx" else 8,), (0.5,))

    monkeypatch.setattr(harness.NewProcess, "generate", generate)
    monkeypatch.setattr(peers, "why_not", lambda name: None)
    document = measured(suite="startup", peers=("mlx-lm",))
    ours, theirs = document.rows
    assert ours.metrics["startup_seconds"].values == (0.5,) * 5 and ours.case.generation_tokens == 1
    assert theirs.metrics == {} and (theirs.agrees, theirs.parts_at) == (False, 0)
    assert (
        theirs.notes == ("not timed: token 0 is 8, in openelm-mlx 7",)
        and [name for name, _ in ran].count("mlx-lm") == 1
    )
    assert ran[0][1] == str(tiny.tokenizer.path)


def test_the_command_in_a_result_names_no_folder_of_the_user(monkeypatch):
    from openelm_mlx.cli.benchmark import command_line

    words = [
        "benchmark",
        "/home/someone/my model",
        "--output=/home/someone/x.json",
        "apple/OpenELM-270M",
    ]
    monkeypatch.setattr(sys, "argv", ["openelm", *words])
    assert command_line() == "openelm benchmark 'my model' --output=x.json apple/OpenELM-270M"


def test_a_soak_of_a_few_requests_finds_nothing_wrong(tiny, monkeypatch):
    monkeypatch.setattr(soaking, "SAMPLE", 1.0)  # all are run again alone
    monkeypatch.setattr(soaking, "CANCELLED", 0.3)
    monkeypatch.setattr(soaking, "PROBE", (16, 8))
    small = random_engine(tiny, seed=3)
    seen = soaking.soak(
        small, seed=5, draft=random_engine(tiny, seed=3, noise=0.3), clients=4, requests=3
    )
    assert seen.failures == [] and sum(seen.generations.values()) == 12 and len(seen.probes) == 2
    assert seen.tokens > 0 and seen.checked == 12 and seen.cancelled > 0
    assert "repeated alone" in seen.summary()[0]


def test_the_suite_of_a_soak_gives_the_row_of_its_probe(short, monkeypatch):
    monkeypatch.setattr(soaking, "SHIFT", 1)
    monkeypatch.setattr(soaking, "PROBE", (16, 8))
    options = BenchmarkOptions(models=(str(short),), suite="soak", minutes=0.01)
    document = run.run(options)
    (row,) = document.rows
    assert (row.case.prompt_tokens, row.case.generation_tokens) == (16, 8)
    assert row.metrics["decode_tokens_per_second"].median > 0
    assert "generations (" in row.notes[0] and "repeated alone" in row.notes[0]
    assert not run.failed(document)


def test_a_soak_sees_a_wrong_token(tiny):
    seen = soaking.Soak()
    driver = soaking.Driver(tiny, random.Random(0), seen)
    request = Request([1, 5, 9], SamplingOptions(), GenerationOptions(max_tokens=3))
    driver.check(request, EngineOptions(), Answer([4095, 4095, 1], "", "length"))
    assert len(seen.failures) == 1 and seen.failures[0].startswith(
        "WRONG: a client's answer, token 0 is 4095, alone"
    )


def test_a_soak_judges_memory_and_speed():
    steady = [Timed((1, 2), (1.0, 1.0 + 0.01)) for _ in range(12)]
    slower = [Timed((1, 2), (1.0, 1.0 + 0.01 * (1 + i / 20))) for i in range(12)]
    still = [0.01] * 12
    good = soaking.Soak(
        probes=steady, references=still, arrays=[10**6, 10**6 + 20], process=[100, 10**8, 10**8]
    )
    bad = soaking.Soak(
        probes=slower,
        references=still,
        arrays=[10**8, 10**8 + 3 * 2**20],
        process=[10**7, 10**8, 3 * 10**8],
    )
    good.judge()
    bad.judge()
    assert good.failures == []
    assert bad.failures == [
        "memory did not return: arrays grew by 3.1 MB",
        "memory did not return: the process grew by 200 MB in the second half",
        "decode speed fell by 28% against a fixed work timed beside it",
    ]
    hot = soaking.Soak(probes=slower, references=[0.01 * (1 + i / 20) for i in range(12)])
    hot.judge()
    assert (
        hot.failures == []
        and "-27.6%; relative to a fixed work timed beside them -0.0%" in hot.summary()[-1]
    )
    assert soaking.trend([1.0] * 5) == (0.0, False)


def test_a_chip_that_is_not_here_is_predicted_and_marked_so(capsys):
    assert main(["benchmark", "270m", "--predict", "m3-max"]) == 0
    text = capsys.readouterr().out
    assert "predicted, not measured" in text and "270m" in text and "│ 1.1b" not in text


def test_a_draft_model_by_folder_and_no_folder_named_in_the_result(tiny, tmp_path, monkeypatch):
    (tmp_path / "near").symlink_to(tiny.path)
    document = measured(
        models=(str(tiny.path),),
        prompt_tokens=(9,),
        generation_tokens=(8,),
        speculations=(f"draft {tmp_path / 'near'}",),
    )
    (row,) = document.rows
    assert row.case.model == "openelm-tiny" and row.case.speculation == "draft openelm-tiny"
    assert row.metrics["tokens_per_pass"].median > 1  # it drafts for itself
    assert (
        last_part("apple/OpenELM-270M") == "apple/OpenELM-270M"
        and last_part("prompt-lookup") == "prompt-lookup"
    )


@pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")
def test_machine_facts():
    found = machine.machine()
    assert (
        found.cores == os.cpu_count()
        and found.memory_bytes == device.memory_bytes()
        and "user" not in str(found)
    )


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
