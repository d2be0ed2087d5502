"""A conversation whose context is full, or is restored from a file."""

from __future__ import annotations

import json

import pytest
from conversations import ask, check_next, fed, next_prompt, reads_as, said, with_context
from small import random_engine

from openelm_mlx import Conversation
from openelm_mlx.engine.conversation import encode_messages
from openelm_mlx.errors import OptionError, PromptError

LONG = "a long paste " * 500


@pytest.fixture(scope="module")
def small(tiny):
    """A model of random weights, which seldom ends an answer by itself."""
    return random_engine(tiny, 3, vocab=4096)


def test_live_and_reloaded_conversations_are_fed_the_same(small):
    for ending in ({"stop": ("e", "th")}, {}, {"ignore_eos": True}):
        settings = {"temperature": 1.0, "seed": 7, "max_tokens": 9, **ending}
        live = Conversation(small, "Be kind.", **settings)
        for text in ("one", "two"):
            ask(live, text)
        stream = live.send("three")
        next(stream)
        stream.close()
        saved = json.loads(json.dumps(live.to_json()))
        again = Conversation.from_json(small, saved, **settings)
        assert again.to_json() == live.to_json() and again.context_used == live.context_used
        assert ask(again, "four")[0] == ask(live, "four")[0] and fed(again) == fed(live)


def restored(engine, text, tokens):
    """Return what is fed of a saved exchange with the answer `text` and these tokens."""
    data = {"system": None, "messages": said(text), "exchanges": [{"tokens": tokens}]}
    return fed(Conversation.from_json(engine, data))[0]


def test_files_of_other_times_are_encoded_as_the_instruct_format(small):
    old = {"format": "openelm-mlx conversation 1", "system": None, "messages": said("Good day.")}
    talk, more = Conversation.from_json(small, old), {"role": "user", "content": "x"}
    assert next_prompt(talk, "x") == encode_messages(small.tokenizer, [*said("Good day."), more])
    good = talk.to_json()
    for key, damaged in (("exchanges", ([], 5, [7])), ("dropped_tokens", (-1, "x"))):
        for value in damaged:
            assert Conversation.from_json(small, good | {key: value}).to_json() == good


def test_saved_tokens_are_fed_as_far_as_they_read_as_the_saved_texts(small):
    encoded = restored(small, "Good day.", None)
    asked = encoded[: -1 - len(small.tokenizer.encode("Good day.", bos=False, continued=True))]
    wrong = ([5, 6], "text", [], [None], [-1.5, "a"], [*encoded[:-1], 10**9, 2], encoded[:-1])
    for tokens in wrong:
        assert restored(small, "Good day.", tokens) == encoded
    assert reads_as(small, restored(small, "Good day.", [*encoded[:-3], 9, 9, 2]), "Good day.")
    cut = restored(small, "日本", None)
    del cut[-2]  # the last byte of a character
    assert reads_as(small, restored(small, "日本", cut), "日本")
    spaced = [*asked, *small.tokenizer.encode("Good day.", bos=False)]  # begins with a space
    assert spaced != encoded[:-1] and restored(small, "Good day.", [*spaced, 2]) == [*spaced, 2]
    kept = restored(small, "Good day.", [*spaced[:-1], 2])
    assert kept[: len(spaced) - 1] == spaced[:-1] and reads_as(small, kept, "Good day.")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "not a saved conversation: it needs the keys 'system' and 'messages'"),
        ([], "not a saved conversation"),
        ({"system": None, "messages": [5]}, "not a saved conversation"),
        ({"system": None, "messages": [{"role": "user", "content": "x"}]}, "ending with an answer"),
        (
            {
                "system": None,
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "content": "a\udcff"},
                ],
            },
            r"not valid UTF-8: character 2 is the lone surrogate",
        ),
        ({"system": "\ud800", "messages": []}, r"not valid UTF-8: character 1 is the lone surr"),
        ({"system": 5, "messages": []}, "the system turn is 5; give a text, or None"),
        (
            {"format": "openelm-mlx conversation 3", "system": None, "messages": []},
            "format 'openelm-mlx conversation 3'",
        ),
    ],
)
def test_what_is_no_saved_conversation(small, data, message):
    with pytest.raises(PromptError, match=message):
        Conversation.from_json(small, data)


def test_a_conversation_is_restored_for_a_loaded_model_only():
    with pytest.raises(OptionError, match="engine is None; allowed is a loaded model"):
        Conversation.from_json(None, {"system": None, "messages": []})


def test_a_message_that_cannot_fit_changes_nothing(small):
    talk = Conversation(with_context(small, 256), "Be kind.", max_tokens=5)
    for text in ("My name is Ann.", "I live in Rome.", "I like tea."):
        ask(talk, text)
    before, used = talk.to_json(), talk.context_used
    with pytest.raises(
        PromptError, match=r"^the message is too long: .* 251 of the context's 256 fit. Shorten it"
    ):
        talk.send(LONG)
    talk.system = "be kind " * 200
    with pytest.raises(PromptError, match="^the system turn is too long: it takes .* Shorten it"):
        talk.send("Hi")
    talk.system = "Be kind."
    for wrong, message in (
        (" \n", "the message is empty"),
        (None, "the message is None; give a text"),
    ):
        with pytest.raises(PromptError, match=message):
            talk.send(wrong)
    assert talk.to_json() == before and talk.notices == [] and talk.context_used == used
    check_next(talk, "Hi")


def test_full_context_drops_the_oldest_turns_and_says_so(small):
    talk = Conversation(with_context(small, 256), "Be brief.", max_tokens=8)
    for words in (70, 70):
        ask(talk, "word " * words)
        assert talk.notices == []
    ask(talk, "word " * 70)
    assert (
        talk.notices == ["the context is full: the oldest turn was dropped"]
        and len(talk.messages) == 4
    )
    check_next(talk, "Hi")
    assert talk.notices == [] and len(talk.messages) == 6
    ask(talk, "word " * 100)
    assert talk.notices == ["the context is full: the 2 oldest turns were dropped"]
    assert [m["content"] for m in talk.messages[::2]] == ["Hi", "word " * 100]
    assert Conversation.from_json(talk.engine, talk.to_json()).to_json() == talk.to_json()
    check_next(talk, "Hi")


def test_an_answer_that_fills_the_context_takes_no_more_than_it(small):
    talk = Conversation(with_context(small, 64), max_tokens=500, ignore_eos=True)
    assert [*talk.send("Hello!")][-1].finish_reason == "length"
    assert talk.context_used == talk.context_length == 64
    other = Conversation.from_json(talk.engine, talk.to_json(), system="Be brief.", max_tokens=4)
    assert other.system == "Be brief." and other.messages == talk.messages


def test_a_dropped_turn_shifts_no_noise(tiny):
    """A model to which all tokens are equally likely says what the noise says."""
    flat = random_engine(tiny, 3, vocab=4096, spread=0.0)
    short, long = (
        Conversation(with_context(flat, length), temperature=1.0, seed=8, max_tokens=6)
        for length in (128, 2048)
    )
    notices = []
    for number in range(12):
        assert ask(short, f"message {number}")[0] == ask(long, f"message {number}")[0]
        notices += short.notices
        short = Conversation.from_json(
            short.engine, short.to_json(), sampling=short.sampling, options=short.options
        )
    assert len(notices) > 1 and len(long.messages) == 24


def test_turns_stay_cheap_when_the_context_is_full(small):
    """50 messages of 45 tokens to a full context of 1024: at most 3 x as much is prefilled."""
    talk = Conversation(with_context(small, 1024), "Be kind.", max_tokens=16)
    costs, used = [], []
    while len(costs) < 50:
        _, stats = ask(talk, "word " * 24)
        if talk.notices or costs:  # from the first drop on
            costs.append(stats.prompt_tokens - stats.reused_tokens)
            used.append(talk.context_used)
    new = min(costs)
    assert 40 <= new <= 50 and sum(costs) <= 3 * new * len(costs)
    assert 512 <= min(used) < 512 + 2 * new and max(used) <= 1024
