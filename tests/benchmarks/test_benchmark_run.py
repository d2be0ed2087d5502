"""The work of one process of a benchmark: its cases, what it leaves out, and what its notes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_sessions import measured

from openelm_mlx import device
from openelm_mlx.benchmarks import peers
from openelm_mlx.benchmarks.measure import harness, run, suites, weights
from openelm_mlx.benchmarks.measure.harness import NewProcess
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions
from openelm_mlx.benchmarks.measure.weights import groups, last_part
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.results.document import to_json
from openelm_mlx.cli import main
from openelm_mlx.errors import BenchmarkError


@pytest.fixture(autouse=True)
def few_trials(monkeypatch):
    """Let each process run two trials, the least: what five of them give is tested elsewhere."""
    monkeypatch.setattr(suites.Suite, "trials_of_a_process", 2)


def test_every_kind_of_case_runs(capsys):
    document = measured(
        prompt_tokens=(20,),
        generation_tokens=(3,),
        batch_sizes=(1, 2),
        caches=("kv8",),
        speculations=("none", "prompt-lookup"),
    )
    labels = [
        str(row.case).removeprefix("openelm-mlx openelm-tiny 8-bit 20+3 ") for row in document.rows
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


def test_a_peer_that_is_not_installed_is_left_out_with_the_remedy(monkeypatch):
    monkeypatch.setattr(peers, "why_not", lambda name: "not installed: `pip install mlx-lm`")
    document = measured(prompt_tokens=(8,), generation_tokens=(2,), peers=("mlx-lm",))
    assert (
        "mlx-lm was left out: not installed: `pip install mlx-lm`" in document.notes
        and len(document.rows) == 1
    )


def test_a_new_process_gives_the_same_first_token(tiny):
    from openelm_mlx.benchmarks.peers.on_mlx import OurSession, prompt_ids

    prompt = prompt_ids(tiny, 12)
    timed = NewProcess("openelm-mlx", tiny.path, "float32", tiny.tokenizer.path).generate(prompt)
    assert timed.tokens == OurSession(tiny).generate(prompt, 1).tokens and timed.first > 0
    with pytest.raises(
        BenchmarkError, match="^openelm-mlx did not start up: unknown model 'no-such-folder'"
    ):
        NewProcess("openelm-mlx", Path("no-such-folder"), "float32", None).generate(prompt)


def test_a_new_process_may_say_much_but_must_end(tmp_path, monkeypatch):
    loud = "import sys; sys.stderr.write('x' * 2**20); print('token 7')"
    monkeypatch.setattr(harness, "START_UP", loud)
    session = NewProcess("torch", tmp_path, "float32", None)
    assert session.generate([1]).tokens == (7,)
    stays = "import signal; print('token 7', flush=True); signal.pause()"
    monkeypatch.setattr(harness, "START_UP", stays)
    monkeypatch.setattr(harness, "TIMEOUT", 0.1)
    with pytest.raises(BenchmarkError, match=r"^torch gave a token, but did not end within 0"):
        session.generate([1])


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
    assert ours.metrics["startup_seconds"].values == (0.5,) * 2 and ours.case.generation_tokens == 1
    assert theirs.metrics == {} and (theirs.agrees, theirs.parts_at) == (False, 0)
    assert (
        theirs.notes == ("not timed: token 0 is 8, in openelm-mlx 7",)
        and [name for name, _ in ran].count("mlx-lm") == 1
    )
    assert ran[0][1] == str(tiny.tokenizer.path)


def test_no_note_names_a_folder_of_the_user(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "near").symlink_to(tiny.path)
    models = tuple(str(tmp_path / name) for name in ("near", "gone"))
    document = measured(models=models, prompt_tokens=(9,), generation_tokens=(2,))
    assert str(tmp_path) not in to_json(document)
    (told,) = (note for note in document.notes if "was left out" in note)
    assert "~/gone" in told
    notes = []
    assert groups(models[0], BenchmarkOptions(bits=(8, 4)), 0, notes) == [(4,)]
    assert notes[0].startswith("openelm-tiny has 8-bit weights already: 8 bits left out")


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
