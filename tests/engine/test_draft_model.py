"""A draft model: it keeps what it has read, and never meets an id that only the target has."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from drafted import FIXED, PROMPT, SAMPLED, run, run_batch
from small import random_engine

from openelm_mlx import BatchEngine, ModelDraft, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.speculation import DraftLength
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import OptionError


def test_a_model_drafting_for_itself_is_always_right(target):
    """With every option, alone and in a batch: also for prompts that are read in chunks."""
    for sampling in ({}, SAMPLED):
        settings = {"max_tokens": 41, **FIXED, **sampling}
        _, stats = run(target, draft=target, **settings)
        assert stats.accepted_tokens == stats.drafted_tokens and stats.tokens_per_pass == 5.0
        requests = [((PROMPT * 20)[: 20 * row + 2], settings) for row in range(8)]
        tokens, stats = run_batch(target, requests, target)
        assert all(one.accepted_tokens == one.drafted_tokens > 20 for one in stats)
        assert stats[0].tokens_per_pass == 5.0
        assert (
            tokens[7]
            == run(
                target, requests[7][0], **(settings | {"draft_tokens": 8, "adaptive_draft": True})
            )[0]
        )


@pytest.mark.parametrize("pause", [5, 20, 60])
def test_a_draft_model_catches_up_after_a_pause(target, monkeypatch, pause):
    """By a short lag in its row, by a long one outside it, while other rows pause at other
    times.
    """
    monkeypatch.setattr(DraftLength, "length", lambda self, known: 4 * (known // pause % 2))
    requests = [
        (PROMPT[: 2 + row] * 2, {"max_tokens": 160 - 9 * row, **SAMPLED}) for row in range(3)
    ]
    for group in (requests[:1], requests):
        _, stats = run_batch(target, group, target)
        assert all(one.accepted_tokens == one.drafted_tokens > 40 for one in stats)


def test_a_draft_model_keeps_what_it_has_read(target, draft):
    kept = ModelDraft(target, draft)
    for length in (8, 6, 8):  # the draft follows a prompt that grows, shrinks and changes
        prompt = PROMPT[:length] + [length]
        tokens, _ = run(target, prompt, draft=kept, max_tokens=12, **FIXED)
        assert tokens == run(target, prompt, max_tokens=12)[0]
        held = kept.store.tokens
        assert len(held) > len(prompt) + 4 and held == (prompt + tokens)[: len(held)]


def test_a_draft_model_holds_no_memory_for_rows_that_have_ended(target, draft):
    batch = BatchEngine(target, 4, draft=draft, compiled=False)
    for _ in range(2):
        for row in range(3):
            batch.submit(PROMPT[: 5 + row], max_tokens=1000, ignore_eos=True, **FIXED)
        while not batch._lanes[0].speculation.model.buffers.nbytes:
            batch.step()
        batch.close()  # all rows end at once
        assert batch.nbytes == 0


def test_a_draft_model_reads_nothing_twice(target, monkeypatch):
    """It is fed one pair of tokens a draft, and in a next turn what is new of it."""
    fed, whole = [], target.model.hidden
    monkeypatch.setattr(
        type(target.model),
        "hidden",
        lambda model, tokens, *rest, **named: (
            fed.append(tokens.size),
            whole(tokens, *rest, **named),
        )[1],
    )
    kept = ModelDraft(target, target)
    tokens, _ = run(target, draft=kept, max_tokens=41, compiled=False, **FIXED)
    assert set(fed[2:]) == {
        2,
        1,
        5,
    }  # after both prompts: pairs and single tokens of the draft, and five to verify
    fed.clear()
    run(target, PROMPT + tokens + PROMPT, draft=kept, max_tokens=6, compiled=False, **FIXED)
    assert sum(fed) < len(PROMPT + tokens + PROMPT) + 4 * len(
        PROMPT
    )  # the target, which kept nothing, reads all of it


def test_a_draft_model_never_reads_an_id_that_only_the_target_has(tiny, monkeypatch):
    """The rows of an embedding beyond the tokenizer's pieces are as many as its writer liked."""
    target, draft = (random_engine(tiny, seed=1, vocab=vocab) for vocab in (4200, 4096))
    whole = target.model.hidden.__func__

    def hidden(model, tokens, *rest, **named):
        assert mx.all(tokens < model.args.vocab_size).item()
        return whole(model, tokens, *rest, **named)

    monkeypatch.setattr(type(target.model), "hidden", hidden)
    prompt = [1, 4199] * 20 + [5, 4150]  # read in a chunk, and at the beginning of a draft
    _, stats = run(target, prompt, draft=draft, max_tokens=4, compiled=False, **FIXED)
    assert stats.drafted_tokens


def test_a_draft_model_is_not_asked_beyond_its_own_context(target):
    short = replace(target, config=replace(target.config, max_context_length=len(PROMPT) + 6))
    tokens, stats = run(target, draft=short, max_tokens=30, **FIXED)
    assert tokens == run(target, max_tokens=30)[0] and 0 < stats.drafted_tokens <= 6


def test_a_tokenizer_is_the_same_from_either_file(tiny):
    folder = tiny.tokenizer.path.parent
    model, json = (
        Tokenizer.from_file(folder / name) for name in ("tokenizer.model", "tokenizer.json")
    )
    assert model.fingerprint != json.fingerprint
    tokens = [
        event.token
        for event in stream_generate(replace(tiny, tokenizer=model), "Once", max_tokens=6)
    ]
    draft = replace(tiny, tokenizer=json)
    assert [
        e.token
        for e in stream_generate(replace(tiny, tokenizer=model), "Once", max_tokens=6, draft=draft)
    ] == tokens


def test_mistakes(tiny, target, draft):
    with pytest.raises(
        OptionError, match="has another tokenizer than openelm-tiny; a draft must share it"
    ):
        stream_generate(tiny, "Once", draft=target)
    with pytest.raises(
        OptionError, match="has another tokenizer than openelm-tiny; a draft must share it"
    ):
        stream_generate(tiny, "Once", draft=ModelDraft(target, draft))
    with pytest.raises(
        OptionError, match="draft_tokens is 99; allowed is a whole number from 1 to 16"
    ):
        stream_generate(tiny, "Once", draft_tokens=99)
    with pytest.raises(OptionError, match="draft is 'openelm-tiny'; allowed is a loaded model"):
        stream_generate(tiny, "Once", draft="openelm-tiny")
    for name, value in (("draft_tokens", 3), ("adaptive_draft", False)):
        with pytest.raises(
            OptionError,
            match=f"{name} is {value}, but nothing drafts; give a draft model or prompt_lookup",
        ):
            stream_generate(tiny, "Once", **{name: value})
    for given in (None, ["x"], [1.5], "5 6"):
        own = SimpleNamespace(propose=lambda known, length, given=given: given)
        with pytest.raises(
            OptionError,
            match=r"draft proposed .*; allowed is a list of token ids, \[\] for no draft",
        ):
            list(stream_generate(target, PROMPT, draft=own))
