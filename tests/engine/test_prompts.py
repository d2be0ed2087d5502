"""Prompts: text, ids and messages, and what of them a cache has already."""

from array import array

import numpy as np
import pytest
from held_text import HELD, ids_of
from small import random_engine

from openelm_mlx import BatchEngine, batch_generate, generate, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.prompts import encode_messages
from openelm_mlx.errors import PromptError

PROMPT = "Once upon a time"


def tokens_of(engine, prompt=PROMPT, **settings):
    return [event.token for event in stream_generate(engine, prompt, **settings)]


@pytest.mark.parametrize("prompt", ["Once upon", "The king and the", "Once upon a tim", "a\n", " "])
def test_prompt_and_text_are_the_text_of_all_ids(tiny, prompt):
    """The space that begins a word is part of a completion, alone and in a batch, at once and token
    by token.
    """
    ids = tiny.tokenizer.encode(prompt)
    events = list(stream_generate(tiny, prompt, max_tokens=6))
    text = "".join(event.text for event in events)
    assert prompt + text == tiny.tokenizer.decode(ids + [event.token for event in events])
    assert (
        generate(tiny, ids, max_tokens=6)
        == text
        == batch_generate(tiny, [prompt], max_tokens=6)[0].text
    )
    assert prompt != "Once upon" or text.startswith(" a time")


def test_an_answer_to_messages_begins_without_its_space(tiny):
    noise = random_engine(
        tiny, seed=1, vocab=tiny.tokenizer.vocab_size, spread=0.0
    )  # whose answers begin with any token
    question, decode = [{"role": "user", "content": "Hi"}], tiny.tokenizer.decode
    first = [
        next(stream_generate(noise, question, max_tokens=1, temperature=1.0, seed=seed))
        for seed in range(20)
    ]
    assert [event.text for event in first] == [decode([event.token]) for event in first]
    assert any(tiny.tokenizer.piece_bytes(event.token).startswith(b" ") for event in first)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    ids = encode_messages(tiny.tokenizer, messages)
    events = list(stream_generate(tiny, messages, max_tokens=6))
    assert events[-1].stats.prompt_tokens == len(ids)
    text = "".join(event.text for event in events)
    assert text == tiny.tokenizer.decode([event.token for event in events]) and not text.startswith(
        " "
    )
    assert (
        batch_generate(tiny, [messages, ids], max_tokens=6)[0].text
        == text
        == generate(tiny, ids, max_tokens=6)
    )


def test_a_prompt_that_extends_the_cached_text_reuses_every_cached_token(tiny):
    """As a seed drew them, the tokens are not those that their text would be encoded to."""
    cache, settings = PromptCache(), {"temperature": 1.5, "seed": 3}
    whole = list(stream_generate(tiny, PROMPT, max_tokens=24, **settings))
    text = PROMPT + generate(tiny, PROMPT, max_tokens=16, prompt_cache=cache, **settings)
    held = list(cache.tokens)
    assert held != tiny.tokenizer.encode(text)[: len(held)]  # else this test shows nothing
    events = list(stream_generate(tiny, text, max_tokens=8, prompt_cache=cache, **settings))
    assert events[-1].stats.reused_tokens == len(held) and cache.tokens[: len(held)] == held
    assert [event.token for event in events] == [event.token for event in whole[16:]]
    more = text + "".join(event.text for event in events) + "\nOnce more"
    held = list(cache.tokens)
    last = list(stream_generate(tiny, more, max_tokens=2, prompt_cache=cache))[-1]
    assert last.stats.reused_tokens == len(held) and tiny.tokenizer.decode(cache.tokens).startswith(
        more
    )


def held_after(tiny, ids):
    """A cache that contains exactly these tokens."""
    cache = PromptCache()
    list(stream_generate(tiny, ids, max_tokens=1, prompt_cache=cache))
    assert cache.tokens == ids
    return cache


@pytest.mark.parametrize("held, prompt, dropped", HELD)
def test_what_a_prompt_of_text_keeps_of_the_cached_tokens(tiny, held, prompt, dropped):
    ids = ids_of(tiny.tokenizer, held)
    cache = held_after(tiny, ids)
    stats = list(stream_generate(tiny, prompt, max_tokens=1, prompt_cache=cache))[-1].stats
    # the last token of a prompt is always run
    assert stats.reused_tokens == min(len(ids) - dropped, stats.prompt_tokens - 1)
    assert tiny.tokenizer.decode(cache.tokens) == prompt
    stats = list(stream_generate(tiny, "Another text", max_tokens=1, prompt_cache=cache))[-1].stats
    assert stats.reused_tokens == 0  # <s> alone is not worth a copy
    assert cache.tokens == tiny.tokenizer.encode("Another text")


def test_cached_text_that_ends_amid_a_character_goes_on(tiny):
    ids = tiny.tokenizer.encode("A 🦙")[:-2]
    cache = held_after(tiny, ids)
    shown = tiny.tokenizer.decode(ids)
    assert shown.endswith("\ufffd")
    last = list(stream_generate(tiny, shown + " is", max_tokens=1, prompt_cache=cache))[-1]
    assert (
        last.stats.reused_tokens == len(ids)
        and tiny.tokenizer.decode(cache.tokens) == shown + " is"
    )
    stats = list(stream_generate(tiny, "A 🦙 is", max_tokens=1, prompt_cache=cache))[-1].stats
    assert stats.reused_tokens >= 2 and tiny.tokenizer.decode(cache.tokens) == "A 🦙 is"


@pytest.mark.parametrize(
    "ids",
    [
        (1, 5),
        range(1, 3),
        np.array([1, 5]),
        mx.array([1, 5]),
        [np.int64(1), mx.array(5)],
        array("i", [1, 5]),
    ],
)
def test_ids_are_integers_of_any_kind(tiny, ids):
    assert tokens_of(tiny, ids, max_tokens=1) == tokens_of(
        tiny, [int(token) for token in ids], max_tokens=1
    )


@pytest.mark.parametrize(
    "prompt, text",
    [
        (
            b"abc",
            "the prompt is of type bytes; give text, a list of token ids or a list of messages",
        ),
        (None, "the prompt is of type NoneType"),
        (5, "the prompt is of type int"),
        ({"role": "user"}, "the prompt is of type dict"),
        (
            [1, 2.7],
            "number 2 of the prompt is of type float; a list is one of token ids, which are int",
        ),
        (["5"], "number 1 of the prompt is of type str.*Give text as one string"),
        ([True], "of type bool"),
        ([1, None], "of type NoneType"),
        (np.array([1.0]), "of type float"),
        (mx.array([[1]]), "of type list"),
        (mx.array([True]), "of type bool"),
        (np.array([]), "give at least one token"),
        ([{"role": "user", "content": "x"}, "y"], "message 2 is of type str"),
        ("caf\udce9", "character 4 is the lone surrogate"),
        ([{"role": "user", "content": "\ud83d"}], "lone surrogate"),
        (
            [{"role": "system", "content": "\ud83d"}, {"role": "user", "content": "x"}],
            "lone surrogate",
        ),
    ],
)
def test_what_is_no_prompt_is_refused(tiny, prompt, text):
    with pytest.raises(PromptError, match=text):
        stream_generate(tiny, prompt)
    with pytest.raises(PromptError, match=text):
        BatchEngine(tiny).submit(prompt)
