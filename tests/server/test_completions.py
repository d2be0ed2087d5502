"""Completions: echoes, log probabilities of prompts and answers, several prompts, no token."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openapi_types import checked, near

from openelm_mlx import generate, stream_generate
from openelm_mlx.engine.loading import Engine
from openelm_mlx.evaluate.score import likeliest, score
from openelm_mlx.server import answer_schemas as schemas

PATH = "/v1/completions"
TEXT = "Once upon a time there was a naïve 🦊"


def complete(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """Return the choices of an answer, which are those of its stream."""
    whole = checked(http.post(PATH, json=body), schemas.CompletionReply)["choices"]
    usage = {"stream_options": {"include_usage": True}}
    found = http.post(PATH, json={**body, **usage, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in found.splitlines() if line]
    assert lines.pop() == "[DONE]"
    *chunks, last = [checked(json.loads(line), schemas.CompletionReply) for line in lines]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] >= 0
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in whole:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own][-1] == choice["finish_reason"]
        assert not any(one["finish_reason"] for one in own[:-1])
        for name, values in (choice["logprobs"] or {}).items():
            parts = [one["logprobs"][name] for one in own if one["logprobs"]]
            assert sum(parts, []) == near(values)
    return whole


def test_an_echo_has_the_log_probabilities_of_the_prompt(http: httpx.Client, tiny: Engine):
    """As lm-eval's local-completions asks: it reads those of a text's tokens after its context."""
    tokens = tiny.tokenizer.encode(TEXT)
    asked = {"logprobs": 1, "echo": True, "max_tokens": 1, "temperature": 0, "seed": 1234}
    (choice,) = complete(http, prompt=[tokens], **asked)
    found = choice["logprobs"]
    expected = score(tiny, [tokens])[0]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    for value, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
        assert value in top.values() and len(top) in (1, 2) and max(top.values()) >= value
    assert len(found["tokens"]) == len(tokens) + 1
    places = [len(tiny.tokenizer.decode(tokens[:n]).rstrip("\ufffd")) for n in range(len(tokens))]
    assert found["text_offset"] == [*places, len(TEXT)]
    assert choice["text"].startswith(TEXT) and any(
        one.startswith("bytes:") for one in found["tokens"]
    )


def test_an_echo_without_text_has_its_tokens(http: httpx.Client):
    choices = complete(http, prompt=[1, 1], echo=True, logprobs=1, max_tokens=2, n=2)
    assert [choice["logprobs"]["tokens"][:2] for choice in choices] == [["<s>", "<s>"]] * 2


def test_log_probabilities_of_a_prompt_are_those_of_an_answer(tiny: Engine):
    """A greedy answer, fed as a prompt, has the numbers that it was drawn with."""
    tokens = tiny.tokenizer.encode("Once upon")
    events = list(stream_generate(tiny, tokens, max_tokens=8, logprobs=3))
    found = likeliest(tiny, [*tokens, *(event.token for event in events)], 3)[len(tokens) - 1 :]
    for event, (logprob, top) in zip(events, found, strict=True):
        assert logprob == pytest.approx(event.logprob, abs=1e-4)
        assert [token for token, _ in top] == [token for token, _ in event.top_logprobs]
        assert top[0] == (event.token, logprob)
    assert likeliest(tiny, tokens, 0) == [
        (pytest.approx(one), ()) for one in score(tiny, [tokens])[0]
    ]


def test_no_token_is_an_answer(http: httpx.Client):
    (choice,) = complete(http, prompt=TEXT, max_tokens=0, echo=True, logprobs=0)
    assert choice["text"] == TEXT and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) > 5
    (choice,) = complete(http, prompt=[5], max_tokens=0)
    assert choice["text"] == "" and choice["logprobs"] is None


def test_each_prompt_gets_n_answers_of_the_streams_of_one_seed(http: httpx.Client, tiny: Engine):
    prompts = ["Once upon a time", "A dog"]
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 6}
    found = complete(http, prompt=prompts, n=2, **settings)
    expected = [generate(tiny, one, stream=i, **settings) for one in prompts for i in (0, 1)]
    assert [choice["text"] for choice in found] == expected
    ids = [tiny.tokenizer.encode(one) for one in prompts]
    assert complete(http, prompt=ids, n=2, **settings) == found
    assert complete(http, prompt=ids[0], **settings)[0] == found[0]


def test_completions_are_greedy_where_nothing_is_asked(http: httpx.Client, tiny: Engine):
    (choice,) = complete(http, prompt="Once upon a time")
    assert choice["text"] == generate(tiny, "Once upon a time", max_tokens=16)
    assert choice["finish_reason"] == "length"


def test_text_ends_before_a_stop_string(http: httpx.Client, tiny: Engine):
    whole = generate(tiny, "Once upon a time", max_tokens=16)
    stop = whole[9:14]  # begins and ends within tokens
    before = whole[: whole.index(stop)]
    (choice,) = complete(http, prompt="Once upon a time", stop=["never", stop], logprobs=2)
    assert choice["text"] == before and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["text_offset"][0] == 0
    (again,) = complete(http, prompt="Once upon a time", stop=stop, echo=True)
    assert again["text"] == f"Once upon a time{before}"


def test_characters_are_whole_in_a_stream(http: httpx.Client, tiny: Engine):
    """A fox of four byte tokens comes at once; half of it is never sent."""
    (choice,) = complete(http, prompt="a", regex="🦊é{3}", max_tokens=64, logprobs=0)
    assert choice["text"] == "🦊ééé" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    cut = complete(http, prompt="a", regex="🦊", max_tokens=2)[0]
    assert cut["finish_reason"] == "length" and cut["text"] in ("", "\ufffd")


def test_ids_and_text_come_back(http: httpx.Client, tiny: Engine):
    tokens = tiny.tokenizer.encode(TEXT)
    answer = http.post("/tokenize", json={"prompt": TEXT})
    said = checked(answer, schemas.TokensReply)
    assert said == {"tokens": tokens, "count": len(tokens), "context_length": 1024}
    answer = http.post("/tokenize", json={"prompt": TEXT, "add_special_tokens": False})
    assert answer.json()["tokens"] == tokens[1:]
    answer = http.post("/detokenize", json={"tokens": tokens})
    assert checked(answer, schemas.TextReply) == {"prompt": TEXT}
    messages = [{"role": "user", "content": "Hello"}]
    count = http.post("/tokenize", json={"messages": messages}).json()["count"]
    usage = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
    assert count == usage["usage"]["prompt_tokens"]
    long = http.post("/tokenize", json={"prompt": "a " * 2000}).json()
    assert long["count"] == len(long["tokens"]) > long["context_length"]  # counted all the same
