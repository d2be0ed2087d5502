"""More requests than may wait are refused at once."""

from __future__ import annotations

import httpx
from serving import SECONDS, serving

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def test_a_full_queue_answers_429_at_once():
    with (
        serving("openelm-tiny", slots=1, queue=2) as address,
        httpx.Client(base_url=address, timeout=SECONDS) as http,
    ):
        answer = http.post("/v1/completions", json={**LONG, "n": 4})
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "the body asks for 4 answers; 3 may run and wait here. Lower n" in message
        with http.stream("POST", "/v1/completions", json={**LONG, "n": 3, "stream": True}):
            answer = http.post("/v1/completions", json=LONG)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            error = answer.json()["error"]
            assert error["code"] == "queue_full"
            assert "3 requests run or wait, and no more than 3 may" in error["message"]
