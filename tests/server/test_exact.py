"""Answers over HTTP are those of a request alone; clients that leave leave nothing behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from formats import random_folder
from hammer import MOMENTS, Complaints, Requests, body_of, leave, leave_often, rest_of, run
from serving import SECONDS, server_of, serving

from openelm_mlx import load
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions

EAGER = EngineOptions(compiled=False)
COUNT = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(tmp_path_factory.mktemp("exact"), seed=3, spread=0.5)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[Any, str]]:
    with server_of(folder, running=EAGER, slots=4, keep_alive=0.1) as both:
        yield both


@pytest.fixture(scope="module")
def requests(folder: Path) -> Requests:
    return Requests(load(folder), COUNT, seed=5, most=8)


def test_random_requests_are_answered_as_alone(server: tuple[Any, str], requests: Requests):
    everyone, before = list(range(COUNT)), requests.found.answers.total()
    asyncio.run(run(server[1], requests, "under load, not cached", everyone, 6))
    asyncio.run(run(server[1], requests, "under load, cached", everyone * 2, 12))
    asyncio.run(run(server[1], requests, "one by one", everyone, 1))
    assert requests.found.answers.total() - before == 4 * COUNT
    assert requests.found.wrong == []


def test_a_difference_that_rounding_does_not_explain_is_found(folder: Path):
    requests = Requests(load(folder), 1, seed=6, most=8)
    one = requests.alone[0]
    requests.compare("as it is", 0, one.text, one.reason)
    assert requests.found.wrong == []
    requests.compare("another", 0, one.text[: len(one.text) // 2] + "~", one.reason)
    assert len(requests.found.wrong + requests.found.ties) == 1


def test_clients_that_leave_at_any_moment_leave_nothing(
    server: tuple[Any, str], requests: Requests
):
    complaints = Complaints()
    logging.getLogger().addHandler(complaints)
    try:
        for moment in MOMENTS:
            body = body_of(requests.all[0]) | {"logprobs": None, "max_tokens": 40}
            asyncio.run(leave(server[1], body, moment, requests.random))
        tried = asyncio.run(leave_often(server[1], requests, 30, 10))
    finally:
        logging.getLogger().removeHandler(complaints)
    assert tried.total() == 30
    assert rest_of(server[0]) == {"tickets": 0, "rows": 0, "users": 0}
    assert complaints.texts == []
    asyncio.run(run(server[1], requests, "afterwards", [0], 1))
    assert requests.found.wrong == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(
    folder: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("openelm_mlx.server.stream.HEADERS_AFTER", 0.0)  # a stream has begun then
    body = {"prompt": [1, 5, 9], "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    with serving(folder, running=EAGER, request_seconds=0.1) as address:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=SECONDS)
    assert answer.status_code == (200 if stream else 504)
    message = "the answer was not complete after 0.1 seconds, the server's limit; ask for fewer"
    assert message in answer.text
    assert not stream or answer.text.count("data: ") > 1


def test_a_shared_system_turn_is_prefilled_once(http: httpx.Client, tiny: Engine):
    tokenizer = tiny.tokenizer
    system = tokenizer.decode(tokenizer.encode("You are a patient teller of tales. " * 70)[:400])
    shared = len(tokenizer.encode(system))
    reused = []
    for question in ("Who are you?", "Tell me of the sea."):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        answer = http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
        assert answer.status_code == 200, answer.text
        reused.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert shared > 380 and reused[0] < 16 and reused[1] >= shared - 16


def test_what_one_key_asked_is_not_reused_for_another(folder: Path):
    prompt = [1, *range(5, 50)]
    with serving(folder, running=EAGER, api_key=("first-key", "second-key")) as address:
        found = []
        for key in ("first-key", "first-key", "second-key"):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": prompt, "max_tokens": 2}
            answer = httpx.post(
                f"{address}/v1/completions", json=body, headers=headers, timeout=SECONDS
            )
            usage = answer.json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, len(prompt) - 1, 0]
