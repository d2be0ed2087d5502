"""Perplexity of texts: windows, figures against full passes of one window at a time in float64, and
intervals against those of a comparison and a bootstrap by hand.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from small import random_engine

from openelm_mlx import load
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, OptionError, PromptError, TokenizerError
from openelm_mlx.evaluate.compare import compare_engines
from openelm_mlx.evaluate.options import TextOptions
from openelm_mlx.evaluate.perplexity import (
    TEXT,
    block_starts,
    requests_of,
    text_batches,
    text_perplexity,
)

SHORT = "Once upon a time there was a king, who had three daughters and a very old fox."


@pytest.fixture(scope="module")
def random(tiny):
    """A model of one layer with random weights, and the bundled model's tokenizer."""
    return random_engine(tiny, 3, layers=1, vocab=tiny.tokenizer.vocab_size + 8)


def test_every_token_of_a_text_is_in_one_batch():
    batches = text_batches(list(range(10, 33)), 4)
    assert [batch.shape for batch in batches] == [(4, 4), (3, 4), (1, 3)]
    assert [i for batch in batches for row in batch.tolist() for i in row if i != 1] == list(
        range(10, 33)
    )
    assert text_batches([], 4) == []


@pytest.mark.parametrize(
    ("count", "context", "stride"),
    [(7, 4, 2), (6, 4, 3), (1, 2, 1), (40, 8, 1), (2600, 512, 511), (700, 300, 200), (3, 9, 2)],
)
def test_every_token_is_asked_for_once_after_enough_others(count, context, stride):
    ids = list(range(10, 10 + count))
    requests = list(requests_of(ids, context, stride))
    assert [token for one in requests for token in one.continuation] == ids
    assert max(len(one.continuation) for one in requests) <= 192
    for one in requests:
        text = [*one.context[1:], *one.continuation]
        assert one.context[0] == 1 and 1 not in text and text == sorted(text)
        assert len(text) < context
        before, first = len(one.context), one.continuation[0] == 10
        assert first or before >= context - stride or one.context[1] == 10


def one_by_one(engine, ids, context, stride):
    """Negative log probabilities of all tokens, from a pass for each window, in float64."""
    found, start = [], 0
    while len(found) < len(ids):
        row = [1, *ids[start : start + context - 1]]
        logits = np.array(engine.model(mx.array([row]))[0]).astype(np.float64)[:, : engine.vocab]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = [-logp[place, token] for place, token in enumerate(row[1:])]
        found += chosen[len(found) - start :]
        start += stride
    return found


@pytest.mark.parametrize(("context", "stride"), [(512, None), (12, None), (12, 5), (12, 1)])
def test_figures_are_those_of_one_window_at_a_time(random, context, stride):
    texts = [SHORT, "caf\u00e9"]
    ids = [random.tokenizer.encode(text, bos=False) for text in texts]
    nats = [x for own in ids for x in one_by_one(random, own, context, stride or context - 1)]
    told = []
    options = TextOptions(context, stride, batch_tokens=40)
    report = lambda *step: told.append(step)  # noqa: E731
    found = text_perplexity(random, texts, options, progress=report)
    assert found.tokens == len(nats) == sum(map(len, ids))
    assert found.bytes == len(SHORT) + 5 and found.intervals_95 == {}
    assert found.nats_per_token == pytest.approx(np.mean(nats), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / found.bytes, rel=1e-5)
    steps = [math.ceil(max(0, len(own) + 1 - context) / (stride or context - 1)) for own in ids]
    assert found.windows == sum(steps) + 2
    assert told[-1][:2] == (told[0][1],) * 2 and len(told) > 1


@pytest.mark.needs("lm-eval")
def test_figures_are_lm_evals_of_texts_that_fit_one_window(random):
    from lm_eval.api.instance import Instance
    from lm_eval.api.metrics import bits_per_byte, weighted_perplexity

    from openelm_mlx.evaluate.language_model import OpenELMLM

    texts = [SHORT, "caf\u00e9"]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    scores = OpenELMLM(random).loglikelihood_rolling(asked)
    items = [(score, len(text.encode())) for score, text in zip(scores, texts, strict=True)]
    found = text_perplexity(random, texts)
    assert found.bits_per_byte == pytest.approx(bits_per_byte(items), rel=1e-6)
    assert 2**found.bits_per_byte == pytest.approx(weighted_perplexity(items), rel=1e-6)


def test_intervals_are_those_of_a_comparison_of_the_model_with_itself(random):
    text = TEXT.read_text(encoding="utf-8")[:4200]
    found, same = text_perplexity(random, [text]), compare_engines(random, random, [text])
    assert same.mean_kl_divergence == same.max_logit_difference == 0
    assert same.top_1_agreement == same.perplexity_ratio == 1
    assert same.intervals_95["perplexity_ratio"] == (1, 1)
    assert found.tokens == same.tokens
    assert same.perplexity == same.reference_perplexity
    assert found.perplexity == pytest.approx(same.perplexity, rel=1e-6)
    own = found.intervals_95["perplexity"]
    assert own == pytest.approx(same.intervals_95["perplexity"], rel=1e-6)
    assert own[0] < found.perplexity < own[1]
    assert found.intervals_95["nats_per_token"] == pytest.approx(np.log(own))
    low, high = found.intervals_95["bits_per_byte"]
    assert low < found.bits_per_byte < high


def test_the_blocks_of_a_short_stride_are_drawn_together(random):
    ids = random.tokenizer.encode(TEXT.read_text(encoding="utf-8")[:4200], bos=False)
    text = random.tokenizer.decode(ids)
    nats = np.array(one_by_one(random, ids, 64, 50))
    edges = [0, *(np.arange(63 + 50, len(ids), 100)), len(ids)]  # 63, then 50 and 50 ...
    blocks = [nats[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    drawn = np.random.RandomState(0)
    means = []
    for _ in range(1000):
        choice = drawn.randint(len(blocks), size=len(blocks))
        means.append(np.concatenate([blocks[n] for n in choice]).mean())
    found = text_perplexity(random, [text], TextOptions(context=64, stride=50))
    expected = np.quantile(means, (0.025, 0.975))
    assert found.intervals_95["nats_per_token"] == pytest.approx(expected, rel=1e-5)


def test_intervals_of_many_short_texts_are_about_their_own_bytes(random):
    """A tokenizer begins each text with a space, which is none of its bytes."""
    found = text_perplexity(random, ["it"] * 8)
    assert found.bytes == 16
    assert found.intervals_95["bits_per_byte"] == pytest.approx((found.bits_per_byte,) * 2)


def test_blocks_of_about_128_positions():
    assert block_starts(512) == [0, 128, 256, 384] and block_starts(5) == [0]
    assert block_starts(300) == [0, 150]


@pytest.mark.parametrize(
    ("texts", "options", "error", "text"),
    [
        ("Once", {}, PromptError, r"texts is one text; give a list, also for a single one: \[text"),
        ([], {}, PromptError, "there is no text; give at least one"),
        (["a", ""], {}, PromptError, "text 2 is empty; give at least one character"),
        (["\udcff"], {}, PromptError, "the text is not valid UTF-8"),
        (["a"], {"context": 65}, OptionError, "context is 65, but .* has a context of 64 tokens; "
         "allowed is a whole number from 2 to 64"),
        (["a"], {"context": 8, "stride": 8}, OptionError, "stride is 8, but a window of 8 tokens "
         "has 7 after BOS; allowed is a whole number from 1 to 7"),
        (["a"], {"stride": 64}, OptionError, "a window of 64 tokens has 63"),
        (["a"], {"context": 1}, OptionError, "context is 1; allowed is a whole number from 2 up"),
        (["a"], {"batch_tokens": 0}, OptionError, "batch_tokens is 0; allowed is a whole"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_any_work(short, texts, options, error, text):
    engine = load(short)
    with pytest.raises(error, match=text):
        text_perplexity(engine, texts, TextOptions(**options))
    with pytest.raises(OptionError, match="engine is 'openelm-tiny'; allowed is a loaded model"):
        text_perplexity("openelm-tiny", ["a"])


def test_numbers_that_overflow_and_a_context_of_one_token(tiny):
    wild = random_engine(tiny, 3, layers=1, vocab=tiny.tokenizer.vocab_size)
    wild.model.transformer.norm.weight *= 1e30
    for call in (lambda: text_perplexity(wild, ["a"]), lambda: compare_engines(wild, wild, ["a"])):
        with pytest.raises(
            CheckpointError, match="random-3 computes numbers that overflow, so its"
        ):
            call()
    wild.config = type(wild.config)(**{**vars(wild.config), "max_context_length": 1})
    with pytest.raises(OptionError, match="random-3 has a context of 1 token, so it predicts none"):
        text_perplexity(wild, ["a"])


def test_models_of_other_tokenizers_are_not_compared(tiny, random):
    other = random_engine(tiny, 4, layers=1)
    other.tokenizer = replace(tiny.tokenizer, pieces=tiny.tokenizer.pieces[:64])
    with pytest.raises(
        TokenizerError,
        match="^random-3 and random-4 have different tokenizers, of 4,096 pieces and 64 pieces, so "
        "that their predictions cannot be compared; give two forms of one model$",
    ):
        compare_engines(random, other, ["a"])
