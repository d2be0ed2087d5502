"""The line of a request: what it says, what it never says, and that nobody waits for it."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from serving import SECONDS, server_of

from openelm_mlx.server import log as module
from openelm_mlx.server.log import escaped, log, logging_to_stderr

SECRET = "a secret\n2026 POST /forged 200 \x1b[2J\u202e"
BODY = {"prompt": SECRET, "max_tokens": 4, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, httpx.Client]]:
    """A server and a client of it."""
    with (
        server_of("openelm-tiny", max_body=4096) as (server, address),
        httpx.Client(base_url=address, timeout=SECONDS) as http,
    ):
        yield server, http


@pytest.fixture
def http(served: tuple[Any, httpx.Client], caplog: pytest.LogCaptureFixture) -> httpx.Client:
    caplog.set_level(logging.INFO, log.name)
    lines(served[1], caplog)  # what earlier tests left
    caplog.clear()
    return served[1]


def lines(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was written so far; a line is written after its answer was sent."""
    http.get("/last")
    while not (found := caplog.messages) or "GET /last" not in found[-1]:
        pass
    return found[:-1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_written_with_its_numbers_and_without_its_text(http, caplog, stream: bool):
    body = {**BODY, "stream": stream, "user": "me" * 500}
    answer = http.post("/v1/completions", json=body)
    (line,) = lines(http, caplog)
    found = re.fullmatch(
        r"POST /v1/completions 200 \d+\.\d{3}s model=openelm-tiny in=(\d+) cached=\d+ out=4 "
        rf'user="(?:me){{100}}" '
        rf"id={answer.headers['x-request-id']}",
        line,
    )
    assert found and int(found[1]) > 10 and "secret" not in line
    if not stream:
        assert answer.json()["usage"]["prompt_tokens"] == int(found[1])


def test_texts_are_written_if_asked_and_in_one_line(served, http, caplog):
    server = served[0]
    server.config.app.text = True
    try:
        text = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]
        (line,) = lines(http, caplog)
    finally:
        server.config.app.text = False
    assert r'asked=["a secret\n2026 POST /forged 200 \u001b[2J\u202e"]' in line
    assert line.endswith(f"answered={module.as_json([text])}") and line.isprintable()


def test_errors_are_written_with_their_code(http, caplog):
    refused = [
        http.post("/v1/completions", json={"prompt": "a", "tools": [1]}),
        http.post("/v1/completions", json={"prompt": "a", "model": "other"}),
        http.post("/v1/completions", json={"prompt": "a" * 5000}),
        http.get("/v1/%0a%1b[2J", headers={"Host": "example.org"}),
    ]
    found = [re.sub(r" \d+\.\d+s ", " ", line) for line in lines(http, caplog)]
    ids = [f"id={answer.headers['x-request-id']}" for answer in refused]
    assert [line.rpartition(" ")[2] for line in found] == ids
    assert found[0] == f"POST /v1/completions 400 error=unsupported_parameter {ids[0]}"
    assert found[1] == f"POST /v1/completions 404 error=model_not_found {ids[1]}"
    assert found[2] == f"POST /v1/completions 413 error=body_too_large {ids[2]}"
    assert found[3] == rf"GET /v1/\n\x1b[2J 421 error=unknown_host {ids[3]}"


def test_a_client_that_leaves_is_written(http, caplog):
    body = {**BODY, "max_tokens": 900, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    while "out=" not in str(caplog.messages):
        http.get("/nothing")
    line = next(line for line in caplog.messages if "out=" in line)
    assert " 200 " in line and " client left id=" in line


def test_checks_that_go_well_are_not_written(http, caplog):
    assert http.get("/health").status_code == http.get("/metrics").status_code == 200
    http.get("/health", headers={"Host": "example.org"})
    (line,) = lines(http, caplog)
    assert line.startswith("GET /health 421")


def test_characters_that_a_terminal_obeys_are_escaped():
    assert escaped("é 中 a b") == "é 中 a b"
    assert escaped("a\r\n\x00\x1b\x9b\u202e\u2028\ud800") == (
        r"a\r\n\x00\x1b\x9b\u202e\u2028\ud800"
    )


def test_lines_have_a_time_and_go_to_stderr(capsys):
    with logging_to_stderr():
        log.info("one line")
    found = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ one line\n", found)


def test_a_stderr_that_takes_nothing_makes_nobody_wait(monkeypatch):
    monkeypatch.setattr(module, "MOST_LINES", 100)
    monkeypatch.setattr(module, "LAST_SECONDS", 0.05)
    reading, writing = os.pipe()
    with suppress(BrokenPipeError), os.fdopen(writing, "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with logging_to_stderr() as writer:
            for _ in range(300):
                log.info("x" * 1000)
        assert writer.is_alive()
        os.close(reading)
        writer.join(SECONDS)
        assert not writer.is_alive()
