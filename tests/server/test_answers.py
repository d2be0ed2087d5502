"""Answers over HTTP are those of the engine in this process, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import httpx

from openelm_mlx import generate
from openelm_mlx.engine.loading import Engine

ASKED = [{"role": "user", "content": "Tell me a story."}]
SAMPLED = {"temperature": 0.8, "seed": 7, "max_tokens": 12}


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the chunks of a stream, which ends with [DONE]."""
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = [line[len("data: ") :] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_chat_is_answered_as_in_this_process(http: httpx.Client, tiny: Engine):
    body = post(http, "/v1/chat/completions", messages=ASKED, **SAMPLED)
    text = generate(tiny, ASKED, tiny.chat_sampling, **SAMPLED)
    assert body["choices"][0]["message"]["content"] == text


def test_an_option_may_rest_on_the_models_own(http: httpx.Client, tiny: Engine):
    asked = {**SAMPLED, "penalty_window": 2}  # of the penalties that the model has for chats
    assert tiny.chat_sampling.penalised
    body = post(http, "/v1/chat/completions", messages=ASKED, **asked)
    text = generate(tiny, ASKED, tiny.chat_sampling, **asked)
    assert body["choices"][0]["message"]["content"] == text


def test_chunks_add_up_to_the_answer(http: httpx.Client):
    body = post(http, "/v1/chat/completions", messages=ASKED, n=2, **SAMPLED)
    usage = {"stream_options": {"include_usage": True}}
    chunks = streamed(http, "/v1/chat/completions", messages=ASKED, n=2, **usage, **SAMPLED)
    texts = ["", ""]
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in body["choices"]]
    assert texts[0] != texts[1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["usage"]["completion_tokens"] == body["usage"]["completion_tokens"] == 24
