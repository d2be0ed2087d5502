"""/v1/responses answers as chat does, in one object or as the typed events of a stream."""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai import OpenAI
from openai.types.responses import Response
from openapi_types import checked, near

from openelm_mlx.server import answer_schemas as schemas

ASKED: dict[str, Any] = {"input": "Tell me a story.", "temperature": 0.8, "seed": 7}
PATH = "/v1/responses"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def respond(http: httpx.Client, **body: Any) -> dict[str, Any]:
    said = checked(http.post(PATH, json=body), schemas.ResponseReply)
    Response.model_validate(said)
    return said


def test_a_response_is_the_answer_of_chat(http: httpx.Client):
    said = respond(
        http, **ASKED, instructions="Be kind.", max_output_tokens=12, metadata={"a": "b"}, user="me"
    )
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": ASKED["input"]},
    ]
    body = {"messages": messages, "temperature": 0.8, "seed": 7, "max_tokens": 12}
    chat = http.post("/v1/chat/completions", json=body).json()
    assert said["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert said["status"] == said["output"][0]["status"] == "incomplete"
    assert said["incomplete_details"] == {"reason": "max_output_tokens"}
    assert said["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert said["usage"]["output_tokens"] == 12
    assert (said["metadata"], said["instructions"], said["user"]) == ({"a": "b"}, "Be kind.", "me")
    items = [{"type": "message", "role": "developer", "content": "Be kind."}]
    items += [{"role": "user", "content": [{"type": "input_text", "text": ASKED["input"]}]}]
    again = respond(http, **{**ASKED, "input": items}, max_output_tokens=12)
    assert again["output"][0]["content"] == said["output"][0]["content"]


def test_an_answer_can_be_sent_back(http: httpx.Client):
    first = respond(http, **ASKED, max_output_tokens=4)
    more = [
        {"role": "user", "content": "Hello"},
        *first["output"],
        {"role": "user", "content": "Go"},
    ]
    assert respond(http, input=more, max_output_tokens=4)["output"]


def test_the_events_of_a_stream_add_up_to_the_response(http: httpx.Client):
    body = {**ASKED, "max_output_tokens": 6, "include": ["message.output_text.logprobs"]}
    body["top_logprobs"] = 2
    whole = respond(http, **body)
    text = http.post(PATH, json={**body, "stream": True}).text
    pairs = [block.split("\n") for block in text.strip().split("\n\n")]
    events = [json.loads(line.removeprefix("data: ")) for _, line in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [one["type"] for one in events]
    assert [one["sequence_number"] for one in events] == list(range(len(events)))
    kinds = [one["type"] for one in events]
    assert list(dict.fromkeys(kinds)) == [*EVENTS, "response.incomplete"]
    last = checked(events[-1]["response"], schemas.ResponseReply)
    part, known = last["output"][0]["content"][0], whole["output"][0]["content"][0]
    assert part == near(known) and len(known["logprobs"]) == 6
    deltas = [one for one in events if one["type"] == EVENTS[4]]
    assert "".join(one["delta"] for one in deltas) == known["text"]
    assert [one for event in deltas for one in event["logprobs"]] == part["logprobs"]
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    for name in ("response.created", "response.in_progress"):
        begun = checked(
            next(one for one in events if one["type"] == name)["response"], schemas.ResponseReply
        )
        assert begun["status"] == "in_progress" and begun["output"] == []


def test_a_format_is_followed_by_openais_client(address: str):
    schema = {"type": "object", "properties": {"cat": {"enum": ["yes", "no"]}}, "required": ["cat"]}
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    form: Any = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    answer = client.responses.create(input="Is it?", text=form, store=False, temperature=0)
    assert answer.status == "completed" and json.loads(answer.output_text)["cat"] in ("yes", "no")
    assert answer.text is not None and answer.text.format.schema_ == schema  # type: ignore[union-attr]
    with client.responses.stream(
        input="Is it?", text=form, temperature=0, model="openelm-tiny"
    ) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == answer.output_text
    assert kinds[-1] == "response.completed"
