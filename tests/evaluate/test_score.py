"""Scoring: the same log probabilities as one sequence at a time, and as those of tokens that were
drawn.
"""

from __future__ import annotations

import math

import pytest
from small import random_engine

from openelm_mlx import stream_generate
from openelm_mlx.device import mx
from openelm_mlx.errors import OptionError, PromptError
from openelm_mlx.evaluate.score import POSITIONS, score

TEXTS = (
    "Once upon a time there was a king.",
    "The",
    "",
    "He said that it was late, and went home.",
    "Once upon",
)


def one_by_one(engine, tokens):
    logits = engine.model(mx.array([tokens]))[0, :, : engine.vocab].astype(mx.float32)
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [logp[place, token].item() for place, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("batch_tokens", [1, 20, 4096])
def test_scores_are_those_of_each_sequence_alone(tiny, batch_tokens):
    sequences = [tiny.tokenizer.encode(text) for text in TEXTS]
    scores = score(tiny, sequences, batch_tokens=batch_tokens)
    assert [len(row) for row in scores] == [len(tokens) - 1 for tokens in sequences] and scores[
        2
    ] == []
    for row, tokens in zip(scores, sequences, strict=True):
        assert row == pytest.approx(one_by_one(tiny, tokens), abs=1e-4)
    assert score(tiny, []) == []


def test_scores_are_the_log_probabilities_of_drawn_tokens(tiny):
    prompt = tiny.tokenizer.encode("Once upon a time")
    drawn = list(
        stream_generate(tiny, prompt, max_tokens=12, temperature=1.0, top_k=50, seed=3, logprobs=0)
    )
    (row,) = score(tiny, [prompt + [event.token for event in drawn]])
    assert row[-len(drawn) :] == pytest.approx([event.logprob for event in drawn], abs=1e-4)


def test_more_positions_than_logits_are_kept_for(tiny):
    engine = random_engine(tiny, 3)
    tokens = [3 + i * i % 61 for i in range(POSITIONS + 40)]
    assert score(engine, [tokens])[0] == pytest.approx(one_by_one(engine, tokens), abs=1e-4)


def test_an_id_that_is_never_drawn_has_no_probability(tiny):
    engine = random_engine(tiny, 3, vocab=tiny.tokenizer.vocab_size + 8)
    (row,) = score(engine, [[1, 5, engine.vocab, 6]])
    assert row[1] == -math.inf and all(math.isfinite(value) for value in (row[0], row[2]))


def test_refused_before_any_work(tiny):
    with pytest.raises(
        PromptError, match="sequence 2: the prompt is empty; give at least one token"
    ):
        score(tiny, [[1, 5], []])
    with pytest.raises(PromptError, match="sequence 1: token id 99999 is outside the vocabulary"):
        score(tiny, [[1, 99999]])
    with pytest.raises(
        PromptError, match=r"sequences is one text; give a list, also for a single one: \[text\]"
    ):
        score(tiny, "Once")
    with pytest.raises(OptionError, match="batch_tokens is 0; allowed is a whole number from 1 up"):
        score(tiny, [[1, 5]], batch_tokens=0)
    with pytest.raises(OptionError, match="engine is 'openelm-tiny'; allowed is a loaded model"):
        score("openelm-tiny", [[1, 5]])
