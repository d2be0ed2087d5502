"""Conversations: what the user saw is what the model is fed, whatever happened in between."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from small import random_engine

from openelm_mlx import Conversation, PromptCache, stream_generate
from openelm_mlx.engine.conversation import encode_messages
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.errors import CacheError, OptionError, PromptError

LONG = "a long paste " * 500
PLAIN = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def small(tiny):
    """A model of random weights, which seldom ends an answer by itself."""
    return random_engine(tiny, 3, vocab=4096)


def with_context(engine, length):
    return replace(engine, config=replace(engine.config, max_context_length=length))


def ask(talk, text, **settings):
    events = list(talk.send(text, **settings))
    return [event.token for event in events], events[-1].stats


def answer(events):
    return "".join(event.text for event in events)


def fed(talk):
    """The tokens of each exchange, as they are saved."""
    return [one["tokens"] for one in talk.to_json()["exchanges"]]


def reads_as(engine, tokens, shown):
    """Tell whether the answer among an exchange's tokens is the text that was shown."""
    said = tokens[tokens.index(engine.tokenizer.eos_id) + 1 : -1]
    return engine.tokenizer.decode(said) in (
        "\n<|assistant|>\n" + shown,
        "\n<|assistant|>\n " + shown,
    )


def next_prompt(talk, text):
    """Return what the model should be fed next: the system turn, the saved tokens and the
    message.
    """
    messages = [{"role": "system", "content": talk.system or ""}, {"role": "user", "content": text}]
    ids, eos = encode_messages(talk.engine.tokenizer, messages), talk.engine.tokenizer.eos_id
    head = ids.index(eos) + 1
    return [*ids[:head], *(token for tokens in fed(talk) for token in tokens), *ids[head:]]


def check_next(talk, text):
    """The next answer is the one to `next_prompt`, read without any cache."""
    prompt = next_prompt(talk, text)
    options = (talk.sampling, talk.options)
    stream = stream_generate(talk.engine, prompt, *options, engine_options=talk.engine_options)
    wanted = [event.token for event in stream]
    tokens, stats = ask(talk, text)
    assert tokens == wanted and stats.prompt_tokens == len(prompt)


def test_a_turn_prefills_only_what_is_new(tiny):
    talk = Conversation(tiny, max_tokens=40, **PLAIN)
    events = list(talk.send("Hello!"))
    assert "OpenELM Tiny" in answer(events) and events[-1].stats.reused_tokens == 0
    held = talk.context_used
    assert held == events[-1].stats.prompt_tokens + len(events)  # the answer ended by itself
    _, second = ask(talk, "Who are you?")
    assert second.reused_tokens == held
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_the_tenth_turn_prefills_its_own_message_only(tiny):
    talk, prefilled = Conversation(tiny, max_tokens=6, ignore_eos=True, temperature=0.0), []
    for _ in range(10):
        _, stats = ask(talk, "Hi")
        prefilled.append(stats.prompt_tokens - stats.reused_tokens)
    assert len(set(prefilled[1:])) == 1 and prefilled[9] < prefilled[0] + 3
    assert stats.prompt_tokens > 9 * prefilled[9]


def test_progress_of_a_prompt_counts_what_is_new(tiny):
    talk, seen = Conversation(tiny, max_tokens=2, prefill_chunk=4), []
    ask(talk, "Hello!")
    _, stats = ask(talk, "Who are you?", progress=lambda done, total: seen.append((done, total)))
    total = stats.prompt_tokens - stats.reused_tokens
    assert seen == [(min(done + 4, total), total) for done in range(0, total, 4)]


def test_the_first_prompt_is_the_instruct_format(small):
    talk = Conversation(small, "Be brief.", max_tokens=4)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi </s>"}]
    assert next_prompt(talk, "Hi </s>") == encode_messages(small.tokenizer, messages)
    check_next(talk, "Hi </s>")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 40, **PLAIN},
        {"max_tokens": 3},
        {"max_tokens": 12, "ignore_eos": True, **PLAIN},
        {"max_tokens": 20, "stop": ("e",), **PLAIN},
    ],
    ids=["end of text", "length", "past the end of text", "stop string"],
)
def test_a_turn_is_fed_as_it_was_shown_with_one_end_of_text(tiny, settings):
    talk, eos = Conversation(tiny, seed=1, **settings), tiny.tokenizer.eos_id
    shown = [answer(talk.send(text)) for text in ("Hello!", "Tell me a story about a king.")]
    for tokens, text in zip(fed(talk), shown, strict=True):
        assert tokens.count(eos) == 2 and tokens[-1] == eos and 1 not in tokens
        assert reads_as(tiny, tokens, text)
    assert [m["content"] for m in talk.messages[1::2]] == shown
    check_next(talk, "And then?")


def test_what_was_not_shown_is_not_fed(small):
    """An answer stopped after any of its tokens, also amid the bytes of a character."""
    noise = {"temperature": 100.0, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    held_back = 0
    events = list(Conversation(small, **noise).send("Hi"))
    for count in range(1, len(events)):
        talk = Conversation(small, **noise)
        stream = talk.send("Hi")
        shown = answer(next(stream) for _ in range(count))
        stream.close()
        assert talk.messages[-1]["content"] == shown and reads_as(small, fed(talk)[0], shown)
        held_back += answer(events[: count + 1]).startswith(shown + "\N{REPLACEMENT CHARACTER}")
    assert held_back


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


def said(text):
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_prefill_leaves_no_half_turn(small, error):
    def fail(done, total):
        raise error

    talk = Conversation(with_context(small, 256), max_tokens=5, prefill_chunk=8)
    for _ in range(4):
        ask(talk, "word " * 40)
    before = talk.to_json()
    for use in (
        lambda: talk.send("word " * 60, progress=fail),
        lambda: talk.regenerate(progress=fail),
    ):
        with pytest.raises(error):
            list(use())
        assert talk.to_json() == before and talk.notices == []
    check_next(talk, "Hi")


def test_one_answer_at_a_time(small):
    talk = Conversation(small, max_tokens=8)
    first = talk.send("first")
    next(first)
    for use in (lambda: talk.send("second"), talk.regenerate, talk.undo, talk.reset):
        with pytest.raises(
            PromptError,
            match=r"still being generated; read it to the end, or end it with stop\(\)",
        ):
            use()
    assert talk.messages == []
    talk.stop()
    assert [m["content"] for m in talk.messages[::2]] == ["first"] and list(first) == []
    talk.stop()  # nothing to end
    late, second = talk.send("late"), talk.send("second")
    list(second)
    with pytest.raises(
        PromptError,
        match="the conversation went on before this answer began; send the message again",
    ):
        next(late)
    talk.send("never begun")
    next(talk.send("let go"))  # an iterator without an owner ends
    gc.collect()
    assert [m["content"] for m in talk.messages[::2]] == ["first", "second", "let go"]
    undone = talk.send("undone")
    assert talk.undo() == "let go"
    with pytest.raises(PromptError, match="went on"):
        next(undone)
    check_next(talk, "Hi")


def test_an_error_of_the_reader_keeps_what_was_shown(small):
    talk = Conversation(small, max_tokens=8)
    with pytest.raises(ZeroDivisionError) as caught:
        for _ in talk.send("question"):
            raise ZeroDivisionError
    assert caught.tb is not None  # its frame keeps the iterator, as a notebook's cell does
    talk.stop()
    assert [m["content"] for m in talk.messages[::2]] == ["question"]
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


def test_a_conversation_has_a_seed_and_keeps_it(small):
    talk = Conversation(small)
    assert (
        talk.sampling == replace(small.chat_sampling, seed=talk.sampling.seed)
        and talk.sampling.seed is not None
    )
    assert (
        talk.sampling.repetition_penalty == 1.2
        and Conversation(small).sampling.seed != talk.sampling.seed
    )
    seed = talk.sampling.seed
    talk.sampling = SamplingOptions(temperature=0.5)
    assert talk.sampling == SamplingOptions(temperature=0.5, seed=seed)
    talk.sampling = SamplingOptions(seed=9)
    assert talk.sampling.seed == 9
    mixed = Conversation(
        replace(small, chat_sampling=SamplingOptions(temperature=0.5, top_p=0.9)), top_p=0.8, seed=3
    )
    assert mixed.sampling == SamplingOptions(temperature=0.5, top_p=0.8, seed=3)
    assert Conversation(
        small, sampling=SamplingOptions(seed=2), min_p=0.1
    ).sampling == SamplingOptions(min_p=0.1, seed=2)


def test_regenerate_gives_other_answers_in_place_of_the_last(small):
    talk = Conversation(small, temperature=1.0, seed=5, max_tokens=12)
    for use in (talk.regenerate, talk.undo):
        with pytest.raises(PromptError, match="send a message first|no exchange yet"):
            use()
    ask(talk, "one")
    first = answer(talk.send("two"))
    again = [answer(talk.regenerate()) for _ in range(2)]
    assert len({first, *again}) == 3 and [m["content"] for m in talk.messages[2:]] == [
        "two",
        again[-1],
    ]
    other = Conversation(small, temperature=1.0, seed=5, max_tokens=12)
    ask(other, "one")
    other.sampling = replace(other.sampling, stream=1)
    assert answer(other.send("two")) == again[0]  # the next stream of the same seed
    saved = Conversation.from_json(small, talk.to_json(), temperature=1.0, seed=5, max_tokens=12)
    assert answer(saved.regenerate()) == answer(
        talk.regenerate()
    )  # the fourth answer, live and loaded again
    assert talk.undo() == "two" and answer(talk.send("two")) == first
    greedy = Conversation(small, max_tokens=3, **PLAIN)
    ask(greedy, "one")
    list(greedy.regenerate())
    assert greedy.notices == ["greedy answers are always the same; a temperature gives others"]


def test_options_and_system_may_change_midway(small):
    talk = Conversation(small, "A", max_tokens=4, **PLAIN)
    ask(talk, "one")
    talk.options, talk.engine_options = GenerationOptions(max_tokens=6), EngineOptions(kv_bits=8)
    check_next(talk, "two")
    talk.system = "B"
    check_next(talk, "three")
    talk.engine_options = EngineOptions(kv_window=64)
    check_next(talk, "four")
    talk.options, talk.engine_options = GenerationOptions(max_tokens=5), EngineOptions()
    check_next(talk, "five")
    assert len(talk.messages) == 10


def test_options_of_the_engine_are_its_own_class(tiny, small):
    for talk in (
        Conversation(small, kv_bits=8, max_tokens=3),
        Conversation(small, engine_options=EngineOptions(kv_bits=8), max_tokens=3),
    ):
        assert (talk.engine_options.kv_bits, talk.options.max_tokens) == (8, 3)
    for wrong in (
        lambda: setattr(talk, "engine_options", GenerationOptions()),
        lambda: Conversation(small, engine_options=GenerationOptions()),
    ):
        with pytest.raises(OptionError, match="engine_options is .*; allowed is one made by Engin"):
            wrong()
    narrow = replace(small, config=replace(small.config, head_dim=16))
    with pytest.raises(CacheError, match="kv_bits 8 needs heads of a multiple of 32"):
        Conversation(narrow, kv_bits=8)
    talk = Conversation(narrow)
    with pytest.raises(CacheError, match="kv_bits 8 needs heads of a multiple of 32"):
        talk.engine_options = EngineOptions(kv_bits=8)
    assert talk.engine_options == EngineOptions()


def test_a_conversation_takes_whatever_drafts(small):
    """An engine, and a source of the caller's own: the answers are those without."""
    own = SimpleNamespace(propose=lambda known, length: known[-length:])
    settings = {"max_tokens": 12, "ignore_eos": True, "seed": 1}
    plain = Conversation(small, **settings)
    for draft in (small, own):
        talk = Conversation(small, draft=draft, adaptive_draft=False, **settings)
        (tokens, stats), (wanted, _) = ask(talk, "Hi"), ask(plain, "Hi")
        assert tokens == wanted and stats.drafted_tokens > 0
        plain.reset()
    with pytest.raises(OptionError, match="draft is 'tiny'; allowed is a loaded model"):
        Conversation(small, draft="tiny")


def test_a_conversation_keeps_one_sequence_and_shares_what_it_is_given(small):
    """A shared cache holds the conversations side by side, and what they have in common is read
    once.
    """
    settings = {"temperature": 1.0, "seed": 7, "max_tokens": 8}
    alone = Conversation(small, "Be brief. " * 20, **settings)
    costs = [ask(alone, text)[1] for text in ("one", "two")]
    list(alone.regenerate())
    assert len(alone.prompt_cache) == 1
    shared = PromptCache()
    talks = [Conversation(small, alone.system, prompt_cache=shared, **settings) for _ in range(3)]
    for number, talk in enumerate(talks):
        tokens, stats = ask(talk, ("one", "two", "three")[number])
        head = len(next_prompt(talk, "")) - len(fed(talk)[0])
        assert (stats.reused_tokens >= head - 20) == (number > 0)
    assert len(shared) == 3
    for talk in talks:  # each goes on from its own
        assert ask(talk, "more")[1].reused_tokens >= costs[0].prompt_tokens
        assert len(shared) == 3


def test_reset_forgets(small):
    talk = Conversation(with_context(small, 128), "A", max_tokens=4)
    for _ in range(6):
        ask(talk, "word " * 10)
    talk.reset()
    assert (
        talk.to_json() == Conversation(small, "A").to_json()
        and talk.context_used == 0
        and talk.notices == []
    )
    check_next(talk, "one")
