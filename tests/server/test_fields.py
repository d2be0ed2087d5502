"""Each field of OpenAI's API is honoured, asks for nothing, or is refused by name."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as of_completion
from openai.types.chat import completion_create_params as of_chat
from openai.types.responses import response_create_params as of_response
from openapi_types import checked
from pydantic import ValidationError

from openelm_mlx.engine.loading import Engine
from openelm_mlx.server import answer_schemas as schemas
from openelm_mlx.server.bodies import ChatBody, CompletionBody
from openelm_mlx.server.other_bodies import ResponseBody
from openelm_mlx.server.strict import Strict, parsed

ASKED = [{"role": "user", "content": "Tell me a story."}]
CHAT = ("/v1/chat/completions", {"messages": ASKED, "max_tokens": 1})
TEXT = ("/v1/completions", {"prompt": "Once", "max_tokens": 1})
RESPONSE = ("/v1/responses", {"input": "Hello", "max_output_tokens": 1})
KINDS: list[tuple[Any, type[Strict], tuple[str, dict[str, Any]]]] = [
    (of_chat, ChatBody, CHAT),
    (of_completion, CompletionBody, TEXT),
    (of_response, ResponseBody, RESPONSE),
]


def fields_of(module: Any) -> set[str]:
    """Return the names of all fields of a kind of request in the package openai."""
    kinds = (module.CompletionCreateParamsBase, module.CompletionCreateParamsStreaming)
    return {name for kind in kinds for name in kind.__annotations__}


of_response.CompletionCreateParamsBase = of_response.ResponseCreateParamsBase
of_response.CompletionCreateParamsStreaming = of_response.ResponseCreateParamsStreaming


@pytest.mark.parametrize(("module", "kind", "request_"), KINDS)
def test_every_field_of_openai_is_known(
    module: Any, kind: type[Strict], request_: tuple[str, dict[str, Any]]
):
    known = kind.model_fields.keys() | kind.NEUTRAL.keys()
    assert fields_of(module) - known == set()
    assert kind.NEUTRAL.keys() - fields_of(module) == set()
    assert not kind.model_fields.keys() & kind.NEUTRAL.keys()


@pytest.mark.parametrize(("module", "kind", "request_"), KINDS)
def test_what_asks_for_nothing_is_accepted_and_all_else_refused(
    module: Any, kind: type[Strict], request_: tuple[str, dict[str, Any]], http: httpx.Client
):
    path, body = request_
    for name, values in kind.NEUTRAL.items():
        for value in (None, *values):
            assert kind.model_validate({**body, name: value}) == kind.model_validate(body)
    neutral = {name: values[-1] if values else None for name, values in kind.NEUTRAL.items()}
    answer = http.post(path, json=body | neutral)
    assert answer.status_code == 200, answer.text
    for name in kind.NEUTRAL:
        answer = http.post(path, json={**body, name: "something"})
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["param"] == name
        assert error["message"] == f"{name} is not supported here; leave it out"
        assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(("module", "kind", "request_"), KINDS)
def test_null_is_the_same_as_leaving_a_field_out(
    module: Any, kind: type[Strict], request_: tuple[str, dict[str, Any]]
):
    _, body = request_
    names = kind.model_fields.keys() | kind.NEUTRAL.keys()
    assert kind.model_validate(dict.fromkeys(names) | body) == kind.model_validate(body)


LIMITS = {"max_completion_tokens": 2, "max_tokens": 3}
AS_JSON = {"Content-Type": "application/json"}
USER = {"role": "user"}
UNPENALISED = {"presence_penalty": 0, "frequency_penalty": 0}  # as the model's own are not
WRONG: list[tuple[tuple[str, dict[str, Any]], dict[str, Any], str, str]] = [
    (CHAT, {"foo": 1}, "foo", "foo is not supported here; leave it out"),
    (CHAT, {"tools": [{}]}, "tools", "tools is not supported here; leave it out"),
    (CHAT, LIMITS, "max_tokens", "max_tokens and max_completion_tokens differ; give one"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "top_logprobs is given without logprobs"),
    (CHAT, {"stream_options": {}}, "stream_options", "is given without stream; leave it out"),
    (CHAT, {"stop": [""]}, "stop", "a text of at least one character"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": ASKED * 2}, "messages", "message 2 has the role 'user'"),
    (CHAT, {"messages": [{**USER, "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", "Input should be 'text'"),
    (CHAT, {"messages": [{**USER, "content": "a", "name": "b"}]}, "messages[0].name", "not supp"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role", "Input should"),
    (CHAT, {"messages": [{**USER, "content": "a " * 1200}]}, "messages", "context is 1024"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
     "response_format.json_schema.schema", "Field required"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format", "does not match any"),
    (CHAT, {"response_format": {"type": "json_object"}, "regex": "a"}, "response_format",
     "response_format and regex are given; an answer has one format"),
    (TEXT, {"choices": []}, "choices", "at least 1 item"),
    (TEXT, {"stop_token_ids": [4096]}, "stop_token_ids", "stop_token_ids has the token id 4096"),
    (TEXT, {"logit_bias": {"1": 1, "01": 2}}, "logit_bias.01", "match pattern"),
    (TEXT, {"regex": "("}, "regex", "it cannot be followed"),
    (TEXT, {"logit_bias": {"4096": 1}}, "logit_bias", "allowed are ids from 0 to 4095"),
    (TEXT, {"logit_bias": {"one": 1}}, "logit_bias.one", "match pattern"),
    (TEXT, {"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
    (TEXT, {"penalty_window": 4}, "penalty_window", "there is no penalty"),
    (CHAT, {**UNPENALISED, "penalty_window": 4}, "penalty_window", "there is no penalty"),
    (RESPONSE, {**UNPENALISED, "penalty_window": 4}, "penalty_window", "there is no penalty"),
    (CHAT, {"xtc_threshold": 0.2}, "xtc_threshold", "nothing is excluded; give xtc_probability"),
    (TEXT, {"xtc_threshold": 0.2}, "xtc_threshold", "nothing is excluded; give xtc_probability"),
    (TEXT, {"seed": -1}, "seed", "greater than or equal to 0"),
    (TEXT, {"seed": 2**63}, "seed", "less than or equal to"),
    (TEXT, {"n": 129}, "n", "less than or equal to 128"),
    (TEXT, {"prompt": ["a", "b", "c"], "n": 128}, None, "the body asks for 384 answers"),
    (TEXT, {"prompt": []}, "prompt", "at least 1 item"),
    (TEXT, {"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
    (TEXT, {"prompt": [[1], [2, -1]]}, "prompt[1][1]", "greater than or equal to 0"),
    (TEXT, {"prompt": [4096]}, "prompt", "outside the vocabulary of 4096"),
    (TEXT, {"max_tokens": 1025}, "max_tokens", "the context holds 1024 together"),
    (TEXT, {"temperature": "hot"}, "temperature", "valid number"),
    (TEXT, {"temperature": True}, "temperature", "valid number"),
    (RESPONSE, {"input": [{"type": "function_call"}]}, "input[0].role", "Field required"),
    (RESPONSE, {"previous_response_id": "resp_1"}, "previous_response_id", "not supported here"),
    (RESPONSE, {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "a"}}}},
     "text.format", "text.format is '{\"type\": \"a\"}'; it cannot be followed"),
    (RESPONSE, {"store": True}, "store", "not supported here"),
    (RESPONSE, {"instructions": "a", "input": [{"role": "system", "content": "b"}]}, "input",
     "message 2 has the role 'system'"),
    (RESPONSE, {"max_output_tokens": 1024}, "max_output_tokens", "Lower max_output_tokens"),
    (("/tokenize", {}), {}, "prompt", "give either prompt or messages"),
    (("/tokenize", {"messages": ASKED}), {"add_special_tokens": True}, "add_special_tokens",
     "add_special_tokens is for a text; leave it out"),
    (("/tokenize", {"messages": ASKED * 2}), {}, "messages", "message 2 has the role 'user'"),
    (("/detokenize", {"tokens": [4096]}), {}, "tokens", "outside the vocabulary of 4096"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_names_the_field(http: httpx.Client, stream: bool):
    for (path, body), fields, param, message in WRONG:
        flow = {"stream": True} if stream and path.startswith("/v1") else {}
        if stream and "stream_options" in fields:
            continue
        answer = http.post(path, json={**body, **fields, **flow})
        error = checked(answer, schemas.ErrorReply)["error"]
        assert answer.status_code == 400 and message in error["message"], error
        assert error["param"] == param, error
        too_long = "context" in error["message"]
        assert error["code"] == ("context_length_exceeded" if too_long else error["code"])


def test_errors_repeat_little_of_what_was_sent(http: httpx.Client):
    long = "a" * 9000
    for path, body, named in (
        (*CHAT, {"model": long}),
        (*CHAT, {long: 1}),
        (*CHAT, {"regex": f"({long}"}),
        (*TEXT, {"logit_bias": {long: 1}}),
        (*RESPONSE, {"metadata": {long: "a"}}),
    ):
        answer = http.post(path, json=body | named)
        assert answer.status_code in (400, 404) and "aaaa..." in answer.text, answer.text
        assert len(answer.content) < 500
    assert len(http.get(f"/v1/models/{long}").content) < 500
    twice = http.post(TEXT[0], content=f'{{"{long}": 1, "{long}": 2}}', headers=AS_JSON)
    assert twice.status_code == 400 and len(twice.content) < 500


UNREADABLE = {
    b"": "the request has no body",
    b"[]": "the body: Input should be a valid dictionary",
    b'{"prompt": NaN}': "not JSON",
    b'{"prompt": "\xff"}': "not JSON",
    b'{"prompt": "\\ud800"}': "not JSON",
    b'{"prompt": "a", "prompt": "b"}': "an object has the name 'prompt' twice",
    b'{"prompt": "a", "top_p": 1e999}': "the number 1e999 is too large",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "number out of range",
    b'{"prompt": ' + b"[" * 5000: "recursion limit exceeded",
}


def test_a_body_that_is_not_json_is_refused(http: httpx.Client):
    for body, message in UNREADABLE.items():
        answer = http.post("/v1/completions", content=body, headers=AS_JSON)
        assert answer.status_code == 400 and message in answer.json()["error"]["message"], body


MANY = {str(number): "x" for number in range(1000)}


@pytest.mark.parametrize("fields", [MANY, {"logit_bias": MANY}, {"stream_options": MANY}])
def test_of_many_faults_one_is_told_and_no_more_are_looked_for(fields: dict[str, Any]):
    """As each would take its time, in which nobody else is served."""
    for kind, body in ((ChatBody, CHAT[1]), (CompletionBody, TEXT[1]), (ResponseBody, RESPONSE[1])):
        with pytest.raises(ValidationError) as found:
            kind.model_validate({**body, **fields})
        assert found.value.error_count() == 1
    for more in ({"metadata": dict.fromkeys(MANY, 1)}, {"include": list(MANY)}):
        with pytest.raises(ValidationError) as found:
            ResponseBody.model_validate({**RESPONSE[1], **more})
        assert found.value.error_count() == 1


def test_a_name_given_twice_is_found_among_many():
    names, begun = [f'"{number}": 0' for number in range(20_000)], time.process_time()
    with pytest.raises(ValueError, match="an object has the name '19999' twice"):
        parsed(f"{{{', '.join(names + names[-1:])}}}".encode())
    assert time.process_time() - begun < 1  # each with each would take several


def test_what_others_repeat_of_a_body_is_shortened(http: httpx.Client):
    long = "a" * 100_000
    schema = {"name": "a", "schema": {"type": long}}
    for form in ({"type": long}, {"type": "json_schema", "json_schema": schema}):
        answer = http.post(TEXT[0], json={**TEXT[1], "response_format": form})
        assert answer.status_code == 400 and "aaa ... " in answer.text
        assert len(answer.content) < 3000


def test_unknown_models_and_addresses_have_the_envelope(http: httpx.Client):
    no_model, lists = "'none' is not served here; there is openelm-tiny", "/openapi.json lists what"
    for method, path, body, status, message in (
        ("POST", "/v1/completions", {"prompt": "a", "model": "none"}, 404, no_model),
        ("GET", "/v1/models/none", None, 404, no_model),
        ("GET", "/nothing", None, 404, f"there is no GET /nothing here; {lists}"),
        ("GET", "/tokenize", None, 405, f"there is no GET /tokenize here; {lists}"),
    ):
        answer = http.request(method, path, json=body)
        assert message in checked(answer, schemas.ErrorReply)["error"]["message"]
        assert answer.status_code == status


def test_a_monitor_may_ask_for_the_head_of_health_only(http: httpx.Client):
    answer = http.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == http.get("/health").headers["content-length"]


def test_models_are_described(http: httpx.Client):
    listed = checked(http.get("/v1/models"), schemas.ModelsReply)["data"]
    assert [one["id"] for one in listed] == ["openelm-tiny"]
    assert checked(http.get("/v1/models/openelm-tiny"), schemas.ModelReply) == listed[0]


def test_the_openapi_has_every_body_and_fetches_nothing(http: httpx.Client, tiny: Engine):
    said = http.get("/openapi.json").json()
    described = said["components"]["schemas"]
    for kind in (ChatBody, CompletionBody, ResponseBody):
        names = {field.alias or name for name, field in kind.model_fields.items()}
        assert described[kind.__name__]["properties"].keys() == names | kind.NEUTRAL.keys()
        assert described[kind.__name__]["additionalProperties"] is False
    chat, text = (described[name]["properties"] for name in ("ChatBody", "CompletionBody"))
    assert chat["temperature"]["default"] == tiny.chat_sampling.temperature > 0
    assert text["temperature"]["default"] == 0 and "default" not in text["seed"]
    assert "HTTPValidationError" not in json.dumps(said)
    assert http.get("/docs").status_code == http.get("/redoc").status_code == 404
