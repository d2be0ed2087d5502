from __future__ import annotations

from dataclasses import replace

import pytest

from openelm_mlx import Conversation
from openelm_mlx.chat import encode_messages
from openelm_mlx.errors import PromptError


def ask(talk, text):
    events = list(talk.send(text))
    return "".join(event.text for event in events), events[-1].stats


def test_a_turn_prefills_only_what_is_new(tiny):
    talk = Conversation(tiny, max_tokens=40)
    answer, first = ask(talk, "Hello!")
    assert "OpenELM Tiny" in answer and first.reused_tokens == 0
    held = talk.context_used
    _, second = ask(talk, "Who are you?")
    assert second.reused_tokens == held
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_first_prompt_is_the_instruct_format(tiny):
    talk = Conversation(tiny, system="Be brief.")
    wanted = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi </s>"}]
    assert talk._encode("Hi </s>") == encode_messages(tiny.tokenizer, wanted)


def test_later_prompts_are_the_instruct_format_too(tiny):
    talk = Conversation(tiny, system="Be brief.", temperature=0.0, max_tokens=200)
    for question in ("Hello!", "Who are you?", "Goodbye!"):
        wanted = [{"role": "system", "content": "Be brief."}, *talk.messages, {"role": "user", "content": question}]
        answer = list(talk.send(question))
        assert answer[-1].finish_reason == "stop"  # so the end of the answer is a token that was generated
        assert answer[-1].stats.prompt_tokens == len(encode_messages(tiny.tokenizer, wanted))


def test_full_context_drops_the_oldest_turns_and_says_so(tiny):
    small = replace(tiny, config=replace(tiny.config, max_context_length=256))
    talk = Conversation(small, system="Be brief.", max_tokens=8)
    for number in range(4):
        ask(talk, f"Number {number}. " + "word " * 22)
    assert talk.notices == ["the context is full: the 1 oldest turn was dropped"]
    assert talk.messages[0]["content"].startswith("Number 1") and talk.context_used <= talk.context_length
    head = encode_messages(tiny.tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}])
    assert talk._cache.tokens[:5] == head[:5]
    with pytest.raises(PromptError, match="Shorten it"):
        talk.send("word " * 500)


def test_stopping_an_answer_keeps_the_conversation(tiny):
    talk = Conversation(tiny, max_tokens=12)
    stream = talk.send("Tell me a story.")
    part = next(stream).text + next(stream).text
    stream.close()
    assert talk.messages[-1]["content"] == part
    assert ask(talk, "Hello!")[0]


def test_saved_and_loaded(tiny):
    talk = Conversation(tiny, max_tokens=12)
    ask(talk, "Hello!")
    again = Conversation.from_json(tiny, talk.to_json(), max_tokens=12)
    assert again.messages == talk.messages and again.to_json() == talk.to_json()
    assert ask(again, "Who are you?")[0]
    for bad in ({}, {"system": None, "messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(PromptError, match="saved conversation"):
            Conversation.from_json(tiny, bad)
    with pytest.raises(PromptError, match="message is empty"):
        talk.send("  ")
    talk.reset()
    assert talk.messages == [] and talk.context_used == 0


def test_progress_of_a_prompt_counts_what_is_new(tiny):
    talk, seen = Conversation(tiny, max_tokens=2, prefill_chunk=4), []
    list(talk.send("Hello!"))
    held = talk.context_used
    *_, last = talk.send("Who are you?", progress=lambda done, total: seen.append((done, total)))
    total = last.stats.prompt_tokens - held
    assert seen == [(min(done + 4, total), total) for done in range(0, total, 4)]
