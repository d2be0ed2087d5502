"""Conversations: what the user saw is what the model is fed, whatever happened in between."""

from __future__ import annotations

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conversations import ask, check_next, fed, next_prompt, reads_as, with_context
from small import random_engine

from openelm_mlx import Conversation, PromptCache
from openelm_mlx.engine.conversation import encode_messages
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.errors import CacheError, OptionError, PromptError

PLAIN = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def small(tiny):
    """A model of random weights, which seldom ends an answer by itself."""
    return random_engine(tiny, 3, vocab=4096)


def answer(events):
    return "".join(event.text for event in events)


def test_a_turn_prefills_only_what_is_new(tiny):
    talk = Conversation(tiny, max_tokens=40, **PLAIN)
    events = list(talk.send("Hello!"))
    assert "OpenELM Tiny" in answer(events) and events[-1].stats.reused_tokens == 0
    held = talk.context_used
    assert held == events[-1].stats.prompt_tokens + len(events)  # the answer ended by itself
    _, second = ask(talk, "Who are you?")
    assert second.reused_tokens == held
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_the_tenth_turn_prefills_its_own_message_only(small):
    talk, prefilled = Conversation(small, max_tokens=6, ignore_eos=True, temperature=0.0), []
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
    noise = {"temperature": 100.0, "seed": 4, "max_tokens": 30, "ignore_eos": True}
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
