"""A few of the trials of `tests/tools/equality.py`; the judge must see what is wrong."""

from __future__ import annotations

import json
import re

import equality
import numpy as np
import pytest
from small import random_engine

from openelm_mlx.benchmarks.checks import Answer, Request, alone, soak
from openelm_mlx.benchmarks.checks.judge import Judge, Reference, Report
from openelm_mlx.benchmarks.scripts import against_mlx_lm, pairs, waits
from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.model.cache_kinds import CacheKind

WAYS = {
    "a batch",
    "a batch with drafts and reuse",
    "a draft model",
    "a reused prefix",
    "both drafts",
    "other chunks",
    "prompt lookup",
}


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


@pytest.mark.parametrize(("bits", "trials"), [(None, 4), (8, 2)])
def test_a_request_has_one_answer_however_it_is_run(tiny, engine, bits, trials):
    draft = random_engine(tiny, seed=1, noise=0.3)
    report = equality.run(lambda done: (engine, draft), trials, seed=7, kv_bits=bits, share=1.0)
    assert report.failures == []
    assert report.compared.keys() > WAYS and report.trials == trials <= report.checked


def test_the_independent_pass_is_the_model(engine):
    tokens = [1, *range(5, 40)]
    ours = np.array(engine.model(mx.array([tokens]))[0])[:, : engine.vocab]
    assert np.abs(Reference(engine).logits(tokens, CacheKind()) - ours).max() < 1e-4


def test_the_judge_tells_a_wrong_token_from_a_tie(engine):
    request = Request(
        [1, 5, 9], SamplingOptions(), GenerationOptions(max_tokens=4, ignore_eos=True)
    )
    kind, right = CacheKind(), alone(engine, request, EngineOptions())
    judge = Judge(engine, equality.Trials())
    judge.compare("a way", request, kind, right, Answer(right.tokens[:2], "", None))
    assert judge.report.differences == [] and judge.report.failures == []
    judge.compare("a way", request, kind, right, Answer(right.tokens[:2], "", "length"))
    wrong = [*right.tokens[:3], (right.tokens[3] + 1) % engine.vocab]
    judge.compare("a way", request, kind, right, Answer(wrong, "", "length"))
    judge.compare("a way", request, kind, right, Answer(right.tokens, "other", "length"))
    equality.check(judge, judge.report, request, kind, Answer(wrong, "", "length"))
    assert len(judge.report.failures) == 4
    for text in (
        "the same tokens, but",
        "independent pass: token 3",
        "token 2 is None",
        "WRONG: a way, token 3",
    ):
        assert any(text in failure for failure in judge.report.failures)
    tie = SamplingOptions(logit_bias={7: 50.0, 8: 50.0 + gap(engine)})
    judge = Judge(engine, Report())
    judge.compare(
        "a way",
        Request([1, 5, 9], tie, request.options),
        kind,
        *(Answer([token], "", None) for token in (7, 8)),
    )
    assert judge.report.failures == [] and judge.report.differences[0].gap < 1e-5


def gap(engine) -> float:
    """By how much the logit of token 7 exceeds that of token 8, after [1, 5, 9]."""
    logits = Reference(engine).logits([1, 5, 9], CacheKind())[-1]
    return float(logits[7] - logits[8])


@pytest.mark.needs("a C++ compiler")
def test_new_settings_of_the_sampler_are_not_traced_again(tiny):
    found = waits.temperatures(random_engine(tiny, seed=2), settings=24, pairs=1)
    assert found["traces"] == found["combinations"] < 16


def test_the_commands_report_and_write_what_they_found(tmp_path, capsys, monkeypatch):
    file = tmp_path / "equality.json"
    assert equality.main(["--trials", "1", "--check", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["trials"] == 1 and found["failures"] == [] and found["compared"].keys() > WAYS
    assert found["model"] is None and found["checked_tokens"] > 0
    assert '"largest_gap"' in capsys.readouterr().out
    monkeypatch.setattr(soak, "PROBE", (16, 8))
    file = tmp_path / "soak.json"
    assert soak.main(["random", "--clients", "2", "--requests", "1", "--json", str(file)]) == 0
    assert sum(json.loads(file.read_text(encoding="utf-8"))["generations"].values()) == 2
    assert "2 generations (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (waits, ["conversion", "271m"], r"^waits: .*271m"),
        (waits, ["conversion"], "give the sizes to convert, like 270m"),
        (waits, ["join", "--trials", "1"], "--trials is 1; join needs at least 2"),
        (against_mlx_lm, [], "give a FOLDER, or --random-weights SIZE"),
        (against_mlx_lm, ["a", "--only", "first,last"], "--only names last; known: decode, first,"),
        (against_mlx_lm, ["a", "--only", "drafts"], "needs a draft model; give --draft FOLDER"),
        (against_mlx_lm, ["no-such-model"], r"^against_mlx_lm: .*no-such-model"),
        (pairs, ["no-such-checkout", "--case", "tiny"], r"^pairs: .* install the project there"),
        (soak, ["no-such-model"], r"^soak: .*no-such-model"),
    ],
)
def test_what_is_asked_for_is_checked_before_anything_is_measured(
    program, arguments, message, capsys
):
    with pytest.raises(SystemExit) as left:
        program.main(arguments)
    assert left.value.code == 2 and re.search(message, capsys.readouterr().err)
