"""The script that a model's chat defaults are chosen with."""

from __future__ import annotations

import json
import math

import chat_defaults
import pytest
from chat_defaults import Answer, answer_perplexity, label, main

from openelm_mlx import load, stream_generate
from openelm_mlx.engine.conversation import encode_messages
from openelm_mlx.engine.options import SamplingOptions

ASKED = [{"role": "user", "content": "Hello!"}]


def said(text, ended=False):
    return Answer([1], [5], text, ended)


def test_what_loops_and_what_is_too_short():
    line = "the king and the queen went out "
    assert said(line * 3).loops and said(line.upper() + line * 2).loops
    assert not said(line * 2).loops and not said("a king and a queen " * 2).loops
    assert said("word " * 59).too_short and not said("word " * 60).too_short
    assert not said("word " * 59, ended=True).too_short


def test_perplexity_is_that_of_the_answers_alone(tiny):
    prompt = encode_messages(tiny.tokenizer, ASKED)
    answers, logprobs = [], []
    for seed in (1, 2):
        settings = {"temperature": 1.0, "seed": seed, "max_tokens": 6, "logprobs": 1}
        events = list(stream_generate(tiny, prompt, **settings))
        answers.append(Answer(prompt, [event.token for event in events], "", False))
        logprobs += [event.logprob for event in events]
    assert math.isclose(
        answer_perplexity(tiny, answers), math.exp(-sum(logprobs) / len(logprobs)), rel_tol=1e-4
    )


def test_a_run_that_was_cut_off_goes_on(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat_defaults, "PROMPTS", ("Hello!",))
    monkeypatch.setattr(chat_defaults, "SEEDS", (1, 2))
    monkeypatch.setattr(chat_defaults, "MAX_TOKENS", 3)
    monkeypatch.setattr(chat_defaults, "GRID", (SamplingOptions(),))
    file = tmp_path / "answers.jsonl"
    assert main(["openelm-tiny", "openelm-tiny", str(file), "--own"]) == 0
    own = label(tiny.chat_sampling)
    first = file.read_text()
    assert [json.loads(line)[0] for line in first.splitlines()] == [own]
    assert f"| {own} (the model's own) | 0 of 2 | 2 |" in capsys.readouterr().out
    assert main(["openelm-tiny", "openelm-tiny", str(file)]) == 0
    assert file.read_text().startswith(first)
    assert [json.loads(line)[0] for line in file.read_text().splitlines()] == [own, "greedy"]
    assert "| greedy | 0 of 1 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (SamplingOptions(seed=3), "greedy, seed 3"),
        (SamplingOptions(temperature=0.5, min_p=0.1), "temperature 0.5, min_p 0.1"),
    ],
)
def test_settings_are_named_by_what_they_change(sampling, name):
    assert label(sampling) == name


def test_the_bundled_model_draws_its_answers():
    sampling = load("openelm-tiny").chat_sampling
    assert not sampling.greedy and sampling.penalised
