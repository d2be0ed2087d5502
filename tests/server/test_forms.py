"""Answers over HTTP have the form that was asked for, and streams keep a client informed."""

from __future__ import annotations

import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import SECONDS, server_of, serving

from openelm_mlx import generate
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.threads import device

PATH = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "There was a cat; as JSON:"}]
COUNT = int(os.environ.get("OPENELM_SCHEMAS", "6"))  # schemas, each with a seed of its own


def made_schema(random: random.Random, depth: int = 2) -> dict[str, Any]:
    """Make a schema of documents that come to an end."""
    kinds = ["string", "integer", "boolean", "enum", "null", "number"]
    kind = random.choice(["object", "object", "array", *kinds] if depth else kinds)
    if kind == "object":
        names = random.sample(["name", "age", "kind", "is_old", "näme"], random.randint(1, 3))
        inner = {name: made_schema(random, depth - 1) for name in names}
        return {
            "type": "object",
            "properties": inner,
            "required": names,
            "additionalProperties": False,
        }
    if kind == "array":
        return {"type": "array", "items": made_schema(random, depth - 1), "maxItems": 3}
    if kind == "enum":
        return {"enum": random.sample(["cat", "dog", 7, None, True, "é"], 2)}
    return {"type": kind, "maxLength": 8} if kind == "string" else {"type": kind}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Tell whether a document follows a schema of `made_schema`."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return value.keys() == inner.keys() and all(fits(value[key], inner[key]) for key in inner)
    if kind == "array":
        return len(value) <= 3 and all(fits(one, schema["items"]) for one in value)
    if kind == "string":
        return isinstance(value, str) and len(value) <= 8
    types = {"boolean": bool, "null": type(None), "integer": int, "number": (int, float)}
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


def ask_for(http: httpx.Client, seed: int) -> str:
    """Ask for a document of a random schema, check it, and return why it ended."""
    schema = made_schema(random.Random(seed))
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    body = {"messages": ASKED, "response_format": form, "temperature": 1.0, "seed": seed}
    answer = http.post(PATH, json={**body, "max_tokens": 120})
    assert answer.status_code == 200, (schema, answer.text)
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        text = choice["message"]["content"]
        assert fits(json.loads(text), schema), (schema, text)
    return str(choice["finish_reason"])


def test_documents_follow_their_schemas(http: httpx.Client):
    """OPENELM_SCHEMAS=1000 tries a thousand of them."""
    with ThreadPoolExecutor(8) as pool:
        reasons = list(pool.map(lambda seed: ask_for(http, seed), range(COUNT)))
    assert set(reasons) <= {"stop", "length"}
    assert reasons.count("stop") >= 0.8 * COUNT


@pytest.mark.parametrize(
    "form", [{"response_format": {"type": "json_object"}}, {"regex": "[ab]{3}"}, {"choices": ["é"]}]
)
def test_other_forms_are_followed(http: httpx.Client, tiny: Engine, form: dict[str, Any]):
    settings: Any = {"temperature": 0.9, "seed": 3, "max_tokens": 24}
    body = {"messages": ASKED, **settings}
    choice = http.post(PATH, json={**body, **form}).json()["choices"][0]
    own = {"json_schema": {"type": "object"}} if "response_format" in form else form
    text = generate(tiny, ASKED, tiny.chat_sampling, **settings, **own)
    assert choice["message"]["content"] == text
    lines = http.post(PATH, json={**body, **form, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == text


def test_a_stream_has_comments_while_there_is_no_token():
    """The device's thread is busy until a comment has come."""
    free = threading.Event()
    body = {"prompt": "Once", "max_tokens": 2, "stream": True}
    with serving("openelm-tiny", keep_alive=0.1) as address:
        device.hand_over(lambda: free.wait(SECONDS))
        try:
            path = f"{address}/v1/completions"
            with httpx.stream("POST", path, json=body, timeout=SECONDS) as answer:
                lines = answer.iter_lines()
                assert next(lines) == ": still working"
                free.set()
                assert [line for line in lines if line][-1] == "data: [DONE]"
        finally:
            free.set()


@pytest.mark.parametrize("path", [PATH, "/v1/responses"])
def test_an_error_in_the_middle_of_a_stream_is_told(path: str, monkeypatch: pytest.MonkeyPatch):
    body: dict[str, Any] = {"messages": ASKED} if path == PATH else {"input": "Hello"}
    body["max_tokens" if path == PATH else "max_output_tokens"] = 8
    with server_of("openelm-tiny") as (server, address):
        model = server.config.app
        while not hasattr(model, "state"):
            model = model.app
        batch = model.state.models.loaded["openelm-tiny"].batch
        steps, step = [], batch.step

        def fail() -> Any:
            steps.append(1)
            if len(steps) > 3:
                raise RuntimeError("no more")
            return step()

        monkeypatch.setattr(batch, "step", fail)
        answer = httpx.post(address + path, json={**body, "stream": True}, timeout=SECONDS)
        assert answer.status_code == 200 and "[DONE]" not in answer.text
        last = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))
        told = last["response"]["error"] if "response" in last else last["error"]
        assert "a step of the model failed" in told["message"]
        monkeypatch.undo()
        assert httpx.post(address + path, json=body, timeout=SECONDS).status_code == 200
