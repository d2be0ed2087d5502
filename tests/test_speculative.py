from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from small import random_engine

from openelm_mlx import ModelDraft, PromptCache, stream_generate
from openelm_mlx.drafts import EXTRA, LEAVING, DraftLength, PromptLookup, gain
from openelm_mlx.errors import OptionError
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions
from openelm_mlx.sampling import DRAFTING, History, filter_logits, gumbel, seed_key
from openelm_mlx.speculative import along, keep_sampled
from openelm_mlx.tokenizer import Tokenizer

PROMPT = [1, 9, 30, 12, 9, 30, 12, 9]
SAMPLED = {"temperature": 0.9, "top_k": 5, "top_p": 0.97, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.1,
           "frequency_penalty": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def target(tiny):
    return random_engine(tiny, seed=1)


@pytest.fixture(scope="module")
def draft(tiny):
    return random_engine(tiny, seed=2, layers=1)


def run(engine, prompt=PROMPT, **settings):
    events = list(stream_generate(engine, prompt, ignore_eos=True, **settings))
    return [event.token for event in events], events[-1].stats


@pytest.mark.parametrize(
    "kind, compiled",
    [({}, True), ({}, False), ({"kv_bits": 8}, False), ({"kv_window": 24}, False), ({"kv_window": 24, "kv_bits": 4}, True)],
)
def test_greedy_tokens_are_those_of_plain_decoding(target, draft, kind, compiled):
    plain, _ = run(target, max_tokens=40, **kind)
    for speculation in ({"draft": draft}, {"draft": target}, {"prompt_lookup": 2}, {"draft": draft, "prompt_lookup": 2}):
        tokens, stats = run(target, max_tokens=40, compiled=compiled, adaptive_draft=False, draft_tokens=2, **speculation, **kind)
        assert tokens == plain, speculation
        assert stats.drafted_tokens and stats.target_passes < 40 or speculation == {"draft": draft}


def test_a_model_drafting_for_itself_is_always_right(target):
    _, stats = run(target, draft=target, max_tokens=41, draft_tokens=4, adaptive_draft=False)
    assert stats.accepted_tokens == stats.drafted_tokens and stats.tokens_per_pass == 5.0


def test_penalties_see_the_drafted_tokens(target):
    settings = {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "max_tokens": 30}
    assert run(target, draft=target, draft_tokens=4, adaptive_draft=False, **settings)[0] == run(target, **settings)[0]
    history = History.of_prompt([[3, 4]], 8)
    rows, step = along(history, mx.array([5, 5])), history
    for row in range(3):
        assert mx.array_equal(rows.seen[row], step.seen[0]) and mx.array_equal(rows.generated[row], step.generated[0])
        step = step.plus(mx.array([5]))


def test_logprobs_stop_and_reuse_go_with_speculation(target, draft):
    plain = list(stream_generate(target, PROMPT, max_tokens=20, logprobs=2, ignore_eos=True))
    drafted = list(stream_generate(target, PROMPT, max_tokens=20, logprobs=2, ignore_eos=True, draft=target))
    assert [e.logprob for e in drafted] == pytest.approx([e.logprob for e in plain], abs=1e-4)
    assert [e.top_logprobs[1][0] for e in drafted] == [e.top_logprobs[1][0] for e in plain]
    kept = ModelDraft(target, draft)
    for length in (8, 6, 8):  # the draft's cache follows a prompt that grows, shrinks and changes
        prompt = PROMPT[:length] + [length]
        assert run(target, prompt, draft=kept, max_tokens=12)[0] == run(target, prompt, max_tokens=12)[0]


def test_closing_between_the_tokens_of_one_draft_leaves_a_true_cache(target):
    cache = PromptCache.for_config(target.config)
    stream = stream_generate(target, PROMPT, draft=target, draft_tokens=4, adaptive_draft=False, prompt_cache=cache)
    seen = [next(stream).token for _ in range(4)]
    stream.close()
    assert cache.tokens == PROMPT + seen[: len(cache.tokens) - len(PROMPT)]
    rest, stats = run(target, PROMPT + seen, prompt_cache=cache, max_tokens=6)
    assert stats.reused_tokens >= len(PROMPT) + 3 and seen + rest == run(target, max_tokens=10)[0]


def test_sampled_tokens_follow_the_exact_joint_distribution(tiny):
    """Three tokens of 600 runs against the product of the model's own conditional probabilities."""
    vocab, prompt = 6, [1, 5, 3]
    target, draft = (random_engine(tiny, seed, vocab) for seed in (3, 4))
    options = SamplingOptions(**SAMPLED)

    def conditional(text):
        history = History.of_prompt([prompt], vocab)
        for token in text:
            history = history.plus(mx.array([token]))
        logits = target.model(mx.array([prompt + text]))[0, -1:]
        return np.array(mx.softmax(filter_logits(logits, options, history), axis=-1)[0], dtype=np.float64)

    first = conditional([])
    second = [conditional([token]) for token in range(vocab)]
    third = {pair: conditional(list(pair)) for pair in itertools.product(range(vocab), repeat=2)}
    runs, kept = 600, ModelDraft(target, draft)
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs):
        tokens, _ = run(target, prompt, seed=seed, max_tokens=3, draft=kept, draft_tokens=2, adaptive_draft=False, **SAMPLED)
        counts[tuple(tokens)] += 1
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


def test_a_window_knows_how_far_drafts_have_overwritten_it(target, draft):
    cache = PromptCache.for_config(target.config, CacheKind.of(target.config, GenerationOptions(kv_window=24)))
    stream = stream_generate(target, PROMPT, draft=draft, draft_tokens=16, adaptive_draft=False, kv_window=24, max_tokens=60,
                             ignore_eos=True, prompt_cache=cache)  # fmt: skip
    for _ in range(30):
        next(stream)
    stream.close()
    assert cache.layers[0].written >= cache.layers[0].offset + 14  # nearly all of each draft was rejected


def test_a_draft_model_is_not_asked_beyond_its_own_context(target):
    short = replace(target, config=replace(target.config, max_context_length=len(PROMPT) + 6))
    tokens, stats = run(target, draft=short, max_tokens=30, draft_tokens=4, adaptive_draft=False)
    assert tokens == run(target, max_tokens=30)[0] and 0 < stats.drafted_tokens <= 6


def test_a_draft_model_keeps_what_was_accepted(target, monkeypatch):
    """Its cache is fed one new pair of tokens a draft, not the accepted ones again."""
    fed, whole = [], target.model.hidden
    monkeypatch.setattr(type(target.model), "hidden", lambda model, tokens, *rest, **named: (
        fed.append(tokens.size), whole(tokens, *rest, **named))[1])  # fmt: skip
    draft = ModelDraft(target, target)
    run(target, draft=draft, max_tokens=41, draft_tokens=4, adaptive_draft=False, compiled=False)
    assert set(fed[2:]) == {2, 1, 5}  # after both prompts: pairs and single tokens of the draft, and five to verify


def test_verification_is_independent_of_the_draw(target):
    """Two drafted tokens against the product of their distributions: noise that serves twice would show here."""
    p, q = np.random.default_rng(0).dirichlet(np.ones(5), size=2)
    scores, q_logits = mx.array(np.log([p] * 3).astype(np.float32)), mx.array(np.log([q] * 2).astype(np.float32))
    place = mx.array([4])

    def one(key):
        drafted = [mx.argmax(q_logits[k] + gumbel(key, place + 1 + k, 5, DRAFTING)[0]) for k in range(2)]
        tokens, count = keep_sampled(scores, mx.stack(drafted).astype(mx.uint32), q_logits, key, place)
        return mx.concatenate([tokens, count[None].astype(mx.uint32)])

    draw, runs = mx.compile(one), 6000
    found = np.array(mx.stack([draw(seed_key(seed)) for seed in range(runs)]))
    pairs = found[found[:, 3] >= 1]  # where the first was accepted, the second says nothing of the first
    expected, seen = np.outer(np.bincount(pairs[:, 0], minlength=5), p), np.zeros((5, 5))
    np.add.at(seen, (pairs[:, 0], pairs[:, 1]), 1)
    often = expected > 5
    for observed, wanted in ((np.bincount(found[:, 0], minlength=5), runs * p), (seen[often], expected[often])):
        freedom = wanted.size - 1
        assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("certain", [False, True])
def test_acceptance_is_the_sum_of_the_smaller_probability(certain):
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(5), size=2)
    scores = mx.array(np.log(np.stack([p, p])).astype(np.float32))
    runs, hits, drawn = 3000, 0, np.zeros(5)
    q_logits = None if certain else mx.array(np.log(q)[None])
    keep = mx.compile(lambda token, key: keep_sampled(scores, token, q_logits, key, mx.array([4])))
    for seed in range(runs):
        token = 2 if certain else generator.choice(5, p=q)
        tokens, count = keep(mx.array([token], dtype=mx.uint32), mx.array([[7, seed]], dtype=mx.uint32))
        hits += int(count.item())
        drawn[int(tokens[0].item())] += 1
    rate = p[2] if certain else np.minimum(p, q).sum()
    assert abs(hits / runs - rate) < 4 * math.sqrt(rate * (1 - rate) / runs)
    assert ((drawn - runs * p) ** 2 / (runs * p)).sum() < 4 + 4 * math.sqrt(8)  # chi-square of 4 degrees of freedom


def test_the_same_seed_gives_the_same_text(target, draft):
    settings = {"draft": draft, "temperature": 1.0, "seed": 5, "max_tokens": 30}
    assert run(target, **settings)[0] == run(target, **settings)[0] != run(target, **{**settings, "seed": 6})[0]


def test_lookup_finds_the_latest_occurrence_and_repeats_a_loop():
    lookup = PromptLookup(2)
    known = [5, 6, 7, 8, 5, 6, 9, 5, 6]
    assert lookup.find(known) == (6, 2)
    proposal = lookup.propose(type("R", (), {"known": known}), 5)
    assert proposal.tokens.tolist() == [9, 5, 6, 9, 5] and proposal.logits is None
    assert lookup.find([*known, 1]) is None and PromptLookup(3).find([1, 2, 3]) is None
    assert PromptLookup(3).find([4, 5, 9, 5]) == (2, 1)  # no longer match: the latest one of length 1
    looping, wild = PromptLookup(2), PromptLookup(2)
    assert looping.policy(8, True).next([1, 2, 3] * 9) == 8 and looping.hits[2] > 0.9
    noise = [int(x) for x in np.random.default_rng(0).integers(0, 9, 80)]
    assert wild.policy(8, True).next(noise) == 0 and max(wild.hits[1:]) < 0.5


def test_the_share_of_accepted_drafts_is_a_mean_that_forgets():
    length = DraftLength(limit=8, cost=0.1)
    length.record(9, 4, 2)  # two hits, a rejection, and one token that tells nothing
    assert length.acceptance == pytest.approx(((0.7 * 0.9 + 0.1) * 0.9 + 0.1) * 0.9)


def test_drafting_stops_while_it_loses_and_tries_again():
    length, asked = DraftLength(limit=8, cost=0.3), []
    for known in range(600):
        k = length.next([0] * known)
        asked.append(k)
        if k:
            length.record(known, k, 0)
    assert asked[0] and sum(k > 0 for k in asked) < 0.05 * len(asked) and any(asked[300:])
    for known in range(600, 1200):
        k = length.next([0] * known)
        if k:
            length.record(known, k, k)
    assert k == 8 and DraftLength(5, 0.3, adaptive=False).next([]) == 5
    a, k = 0.7, 3
    assert gain(a, k, 0.1) == pytest.approx(sum(a**i for i in range(k + 1)) / (1 + LEAVING + k * (0.1 + EXTRA)))


def test_a_tokenizer_is_the_same_from_either_file(tiny):
    folder = tiny.tokenizer.path.parent
    model, json = (Tokenizer.from_file(folder / name) for name in ("tokenizer.model", "tokenizer.json"))
    assert model.fingerprint != json.fingerprint
    tokens = [event.token for event in stream_generate(replace(tiny, tokenizer=model), "Once", max_tokens=6)]
    draft = replace(tiny, tokenizer=json)
    assert [e.token for e in stream_generate(replace(tiny, tokenizer=model), "Once", max_tokens=6, draft=draft)] == tokens


def test_mistakes(tiny, target):
    with pytest.raises(OptionError, match="has another tokenizer than openelm-tiny; a draft must share it"):
        stream_generate(tiny, "Once", draft=target)
    with pytest.raises(OptionError, match="draft_tokens is 99; allowed is a whole number from 1 to 16"):
        stream_generate(tiny, "Once", draft_tokens=99)
    with pytest.raises(OptionError, match="draft is 'openelm-tiny'; allowed is a loaded model"):
        stream_generate(tiny, "Once", draft="openelm-tiny")
    for name, value in (("draft_tokens", 3), ("adaptive_draft", False)):
        with pytest.raises(OptionError, match=f"{name} is {value}, but nothing drafts; give a draft model or prompt_lookup"):
            stream_generate(tiny, "Once", **{name: value})
