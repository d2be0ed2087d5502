"""A draft is never seen in the text: the parts by themselves, then whole runs with every kind of
draft.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from drafted import FIXED, PROMPT, SAMPLED, run, run_batch
from small import random_engine

from openelm_mlx import BatchEngine, ModelDraft, PromptCache, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine import draft_model
from openelm_mlx.engine.decode import Drafted, agreeing
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Context,
    Controls,
    Filters,
    History,
    draw,
    filter_logits,
    seed_key,
)


class HalfRight:
    """Drafts that are right for 0, 1, ... tokens in turn and then wrong, by a token that the model
    has not, now and then.
    """

    def __init__(self, texts):
        self.texts, self.calls = texts, 0

    def propose(self, known, length):
        text = next(text for text in self.texts if text[: len(known)] == known)
        right, self.calls = self.calls % (length + 1), self.calls + 1
        wrong = (10**6, -1, text[len(known)] + 1)[self.calls % 3]
        return text[len(known) : len(known) + right] + [wrong] * (20 - right)


def test_agreeing_counts_to_the_first_difference():
    tokens, drafted = (
        np.random.default_rng(0).integers(0, 2, (40, 6)),
        np.random.default_rng(1).integers(0, 2, (40, 5)),
    )
    lengths = np.arange(40) % 6
    expected = [
        len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(t, d[:n], strict=False))))
        for t, d, n in zip(tokens, drafted, lengths, strict=True)
    ]
    assert (
        agreeing(mx.array(tokens), Drafted(mx.array(drafted), mx.array(lengths))).tolist()
        == expected
    )
    assert len(set(expected)) > 3


@pytest.mark.parametrize("seed", range(4))
def test_acceptance_is_that_of_the_coupling(seed):
    """6000 pairs of draws with one noise; the formula is exact for argmax(log p + Gumbel noise)."""
    generator, runs, vocab = np.random.default_rng(seed), 6000, 7
    p, q = generator.dirichlet(np.full(vocab, 0.7), size=2)
    filters = Filters.of([SamplingOptions(temperature=1.0)])
    controls = Controls.of([SamplingOptions(temperature=1.0)] * runs, filters, vocab)
    keys, places = mx.repeat(seed_key(seed), runs, axis=0), mx.arange(runs)

    def drawn(probabilities):
        logits = mx.broadcast_to(mx.array(np.log(probabilities).astype(np.float32)), (runs, vocab))
        context = Context(controls, keys, places, places.astype(mx.uint32))
        return np.array(draw(logits, filters, context))

    ours, theirs = drawn(p), drawn(q)
    exact = sum(1 / np.maximum(p / p[x], q / q[x]).sum() for x in range(vocab))
    assert abs((ours == theirs).mean() - exact) < 4 * math.sqrt(exact * (1 - exact) / runs)
    assert exact <= np.minimum(p, q).sum() < 1.5 * exact
    for found, wanted in ((ours, p), (theirs, q)):
        chi = ((np.bincount(found, minlength=vocab) - runs * wanted) ** 2 / (runs * wanted)).sum()
        assert chi < vocab - 1 + 4 * math.sqrt(2 * (vocab - 1))


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "kind, compiled",
    [
        ({}, True),
        ({"kv_bits": 8}, False),
        ({"kv_window": 24}, False),
        ({"kv_window": 24, "kv_bits": 4}, True),
    ],
    ids=str,
)
def test_tokens_are_those_without_a_draft(target, draft, kind, compiled, sampling):
    plain, _ = run(target, max_tokens=40, **kind, **sampling)
    wrong = HalfRight([PROMPT + plain + [0] * 16])
    for speculation in (
        {"draft": draft},
        {"draft": target},
        {"draft": wrong},
        {"prompt_lookup": 2},
        {"draft": draft, "prompt_lookup": 2},
    ):
        tokens, stats = run(
            target, max_tokens=40, compiled=compiled, **FIXED, **speculation, **kind, **sampling
        )
        assert tokens == plain, speculation
        assert stats.drafted_tokens and (
            stats.target_passes < 40 or speculation.get("draft") is draft
        )
    assert wrong.calls > 8


@pytest.mark.parametrize("kind", [{}, {"kv_window": 24}], ids=str)
def test_tokens_in_a_batch_are_those_alone_without_a_draft(target, draft, kind):
    """Eight requests of other lengths and options, in one batch with each kind of draft."""
    options = [
        {
            "max_tokens": 12 + 3 * row,
            "draft_tokens": 1 + row,
            "seed": row,
            "temperature": 0.4 * (row % 4),
            "top_k": 8 * (row % 3),
            "repetition_penalty": 1.0 + 0.2 * (row % 2),
            "prompt_lookup": 2 * (row % 2),
            "adaptive_draft": row > 3,
        }
        for row in range(8)
    ]
    requests = [(PROMPT[: 1 + row] * (1 + row), each) for row, each in enumerate(options)]
    off = {"draft_tokens": 8, "adaptive_draft": True, "prompt_lookup": 0}
    plain = [run(target, prompt, **(each | off), **kind)[0] for prompt, each in requests]
    texts = [
        prompt + tokens + [0] * 16 for (prompt, _), tokens in zip(requests, plain, strict=True)
    ]
    for source in (draft, target, HalfRight(texts)):
        tokens, stats = run_batch(target, requests, source, **kind)
        assert tokens == plain
        assert all(one.drafted_tokens for one in stats)


def test_logprobs_go_with_drafts(target):
    """Alone and in a batch where another request wants more of them, and a third one none."""
    settings = {"max_tokens": 20, "ignore_eos": True, **SAMPLED}
    plain = list(stream_generate(target, PROMPT, logprobs=2, **settings))
    drafted = list(stream_generate(target, PROMPT, logprobs=2, draft=target, **settings))
    batch = BatchEngine(target, draft=target)
    first, *_ = (batch.submit(PROMPT, logprobs=n, **settings) for n in (2, 3, None))
    batched = []
    while batch.busy:
        batched += [event for number, event in batch.step() if number == first]
    for events in (drafted, batched):
        assert events[-1].stats.drafted_tokens
        assert [e.logprob for e in events] == pytest.approx([e.logprob for e in plain], abs=1e-4)
        assert [e.top_logprobs[1][0] for e in events] == [e.top_logprobs[1][0] for e in plain]


def test_closing_between_the_tokens_of_one_draft_leaves_true_caches(target):
    cache, kept = PromptCache(), ModelDraft(target, target)
    settings = {"temperature": 1.0, "seed": 1, "max_tokens": 10}
    stream = stream_generate(
        target, PROMPT, draft=kept, prompt_cache=cache, ignore_eos=True, **settings, **FIXED
    )
    seen = [next(stream).token for _ in range(4)]
    stream.close()
    plain, _ = run(target, **settings)
    for held in (cache.tokens, kept.store.tokens):
        assert len(held) >= len(PROMPT) and held == (PROMPT + plain)[: len(held)]
    rest, stats = run(target, PROMPT + seen, prompt_cache=cache, draft=kept, **(settings | FIXED))
    assert stats.reused_tokens >= len(PROMPT) + 3 and (seen + rest)[:10] == plain
    assert stats.accepted_tokens == stats.drafted_tokens


def test_a_stop_amid_a_draft_leaves_a_true_cache(target):
    settings = {"temperature": 2.0, "seed": 1, "max_tokens": 12}
    plain, _ = run(target, **settings)
    kept = ModelDraft(target, target)
    stops = [
        token for place, token in enumerate(plain[:9]) if place > 1 and plain.index(token) == place
    ]
    assert len(stops) > 2
    for stop in stops:
        tokens, stats = run(target, draft=kept, stop_tokens=(stop,), **settings, **FIXED)
        assert tokens == plain[: plain.index(stop) + 1]
        held = kept.store.tokens
        assert len(held) >= len(PROMPT) and held == (PROMPT + tokens)[: len(held)]
        assert stats.accepted_tokens == stats.drafted_tokens


def test_a_draft_that_is_interrupted_leaves_a_true_cache(target, monkeypatch):
    settings = {"temperature": 1.0, "seed": 1, "max_tokens": 19}
    draft = replace(target)  # functions of its own: the one that fails stays among them
    kept, made = ModelDraft(target, draft), draft_model.make_drafter

    def interrupted(*given):
        if given[-1] == 4:
            return made(*given)

        def run(*arrays):
            raise KeyboardInterrupt

        return run

    monkeypatch.setattr(draft_model, "make_drafter", interrupted)
    stream = stream_generate(
        target, PROMPT, draft=kept, ignore_eos=True, compiled=False, **settings, **FIXED
    )
    with pytest.raises(KeyboardInterrupt):
        list(stream)  # its last draft is a shorter one
    monkeypatch.undo()
    plain, _ = run(target, **settings)
    held = kept.store.tokens
    assert len(held) > len(PROMPT) + 8 and held == (PROMPT + plain)[: len(held)]
    tokens, stats = run(target, PROMPT + plain[:10], draft=kept, **(settings | FIXED))
    assert tokens[:9] == plain[10:] and stats.accepted_tokens == stats.drafted_tokens > 0


def test_sampled_tokens_follow_the_exact_joint_distribution(tiny):
    """Three tokens of 600 requests against the product of the model's own conditional
    probabilities.
    """
    vocab, prompt = 6, [1, 5, 3]
    target, draft = (random_engine(tiny, seed=3, vocab=vocab) for _ in range(2))
    draft.model.lm_head.weight += 0.5 * mx.random.normal(draft.model.lm_head.weight.shape) / 8
    options = SamplingOptions(**SAMPLED)
    filters = Filters.of([options])
    controls = Controls.of([options], filters, vocab)

    def conditional(text):
        logits = target.model(mx.array([prompt + text]))[0, -1:]
        history = History.of(prompt, text, options.penalty_window, filters, vocab)
        newest = mx.array((prompt + text)[-1:])
        context = Context(controls, seed_key(0), newest * 0, newest, history)
        scores = filter_logits(logits, filters, context)
        return np.array(mx.softmax(scores, axis=-1)[0], dtype=np.float64)

    first = conditional([])
    second = [conditional([token]) for token in range(vocab)]
    third = {pair: conditional(list(pair)) for pair in itertools.product(range(vocab), repeat=2)}
    runs, settings = 600, SAMPLED | FIXED | {"draft_tokens": 2, "max_tokens": 4}
    requests = [(prompt, settings | {"seed": seed}) for seed in range(runs)]
    tokens, stats = run_batch(target, requests, draft, slots=32)
    drafted, accepted = (
        sum(getattr(one, name) for one in stats) for name in ("drafted_tokens", "accepted_tokens")
    )
    assert 0.3 * drafted < accepted < 0.9 * drafted  # both fates come up
    counts = Counter(tuple(found[:3]) for found in tokens)
    chi, freedom, rare = 0.0, -1, [0.0, 0]
    for cell in itertools.product(range(vocab), repeat=3):
        expected = runs * first[cell[0]] * second[cell[0]][cell[1]] * third[cell[:2]][cell[2]]
        assert expected > 0 or counts[cell] == 0
        if expected >= 5:
            chi, freedom = chi + (counts[cell] - expected) ** 2 / expected, freedom + 1
        else:
            rare = [rare[0] + expected, rare[1] + counts[cell]]
    if rare[0] >= 5:
        chi, freedom = chi + (rare[1] - rare[0]) ** 2 / rare[0], freedom + 1
    z = (chi - freedom) / math.sqrt(2 * freedom)
    assert freedom > 5 and abs(z) < 4, (chi, freedom)
