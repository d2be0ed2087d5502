"""What /metrics says is what the answers' usage says, and every series is documented."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving import SECONDS, server_of, serving

DOCS = Path(__file__).parents[2] / "docs"
ASKED = [{"role": "user", "content": "Tell me a story about a fox and a dog."}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def own() -> Iterator[httpx.Client]:
    """A client of a server that other files ask nothing; each series has got a sample."""
    with serving("openelm-tiny") as url, httpx.Client(base_url=url, timeout=SECONDS) as client:
        for size, status in ((2, 200), (-1, 400)):
            body = {"messages": ASKED, "max_tokens": size}
            assert client.post(CHAT, json=body).status_code == status
        yield client


def families(client: httpx.Client) -> dict[str, Metric]:
    """Return what /metrics says, by name."""
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {one.name: one for one in text_string_to_metric_families(answer.text)}


def values(client: httpx.Client) -> dict[str, float]:
    """Return the value of every sample but those of buckets; labels are part of the name."""
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in families(client).values()
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def grown(client: httpx.Client, before: dict[str, float]) -> dict[str, float]:
    """Return by how much values have grown."""
    after = values(client)
    change = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name.removeprefix("openelm_"): by for name, by in change.items() if by}


def test_numbers_are_those_of_the_answers(own: httpx.Client):
    before = values(own)
    chat: dict[str, Any] = {"messages": ASKED, "n": 2, "seed": 3, "max_tokens": 9}
    usages = [own.post(CHAT, json=chat).json()["usage"] for _ in range(2)]
    again: dict[str, Any] = {
        "prompt": ["a b a b a b", "one two"],
        "prompt_lookup": 1,
        "max_tokens": 24,
    }
    lookup = {**again, "temperature": 0, "presence_penalty": 0, "frequency_penalty": 0}
    usages.append(own.post("/v1/completions", json=lookup).json()["usage"])
    assert own.post(CHAT, json={"messages": ASKED, "foo": 1}).status_code == 400
    found = grown(own, before)

    def total(name: str) -> int:
        return sum(usage[name] for usage in usages)

    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert found["prompt_tokens_total openelm-tiny"] == total("prompt_tokens")
    assert found["generation_tokens_total openelm-tiny"] == total("completion_tokens")
    assert found["cached_prompt_tokens_total openelm-tiny"] == cached > 0
    assert found["requests_total /v1/chat/completions 200"] == 2
    assert found["requests_total /v1/completions 200"] == 1
    assert found["requests_total /v1/chat/completions 400"] == 1
    assert found["errors_total invalid_request_error"] == 1
    assert found["request_duration_seconds_count /v1/chat/completions"] == 3
    for name in ("time_to_first_token", "time_per_output_token", "request_queue_time"):
        assert found[f"{name}_seconds_count openelm-tiny"] == 6  # answers
    drafted = found["draft_tokens_total openelm-tiny"]
    assert drafted >= found.get("accepted_draft_tokens_total openelm-tiny", 0) and drafted > 0
    assert "aborted_requests_total" not in found
    whole = found["request_duration_seconds_sum /v1/completions"]
    assert 0 < found["time_to_first_token_seconds_sum openelm-tiny"] < 6 * whole + 60


def test_gauges_say_what_is_there(own: httpx.Client):
    own.post(CHAT, json={"messages": ASKED, "max_tokens": 4})
    found = values(own)
    assert found["openelm_models_loaded"] == 1
    assert found["openelm_prefix_cache_bytes"] > found["openelm_prefix_cache_entries"] >= 1
    assert found["openelm_mlx_peak_memory_bytes"] >= found["openelm_mlx_active_memory_bytes"] > 0


def test_a_client_that_leaves_is_counted(own: httpx.Client):
    before = values(own)
    assert before["openelm_requests_running openelm-tiny"] == 0
    body = {"messages": ASKED, "stream": True, "max_tokens": 900, "ignore_eos": True}
    with own.stream("POST", CHAT, json=body) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert "role" in next(lines) and "content" in next(lines)
        with httpx.Client(base_url=own.base_url) as other:
            found = values(other)
    assert found["openelm_requests_running openelm-tiny"] == 1
    assert found["openelm_requests_waiting openelm-tiny"] == 0
    for _ in range(int(SECONDS / 0.05)):
        found = grown(own, before)
        if "aborted_requests_total" in found:
            break
    assert found["aborted_requests_total"] == 1
    assert found["requests_total /v1/chat/completions 200"] == 1
    assert found.get("generation_tokens_total openelm-tiny", 0) < 900


def test_they_are_there_while_the_device_is_busy():
    free = threading.Event()
    with server_of("openelm-tiny") as (server, url), httpx.Client(base_url=url) as client:
        long = server.app.state.worker.call(lambda: free.wait(SECONDS))
        done = asyncio.run_coroutine_threadsafe(long, server.loop)
        assert values(client)["openelm_models_loaded"] == 1
        assert not done.done()
        free.set()
        assert done.result(SECONDS)


def test_paths_that_do_not_exist_are_one_series(own: httpx.Client):
    before = values(own)
    for name in ("secret", "other/thing"):
        assert own.get(f"/{name}").status_code == 404
    found = grown(own, before)
    assert found["requests_total other 404"] == found["errors_total not_found_error"] == 2


def test_what_is_refused_or_ends_with_an_error_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("openelm_mlx.server.stream.HEADERS_AFTER", 0.0)  # a stream has begun then
    with (
        serving("openelm-tiny", api_key=("secret",), request_seconds=0.1) as url,
        httpx.Client(base_url=url, timeout=SECONDS) as client,
    ):
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        body = {"messages": ASKED, "stream": True, "max_tokens": 900, "ignore_eos": True}
        with client.stream("POST", CHAT, json=body) as answer:
            assert "error" in [line for line in answer.iter_lines() if line][-1]
        found = grown(client, {})
    assert found["requests_total /v1/models 401"] == found["errors_total authentication_error"] == 1
    assert found[f"requests_total {CHAT} 200"] == found["errors_total server_error"] == 1
    assert "prompt_tokens_total openelm-tiny" not in found


def test_every_series_is_documented(own: httpx.Client):
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(openelm_\w+)(?:\{(\w+(?:, \w+)*)\})?` \| (\w+) \| ", page, re.M)
    labels = {name: tuple(given.split(", ")) if given else () for name, given, _ in rows}
    kinds = {name.removesuffix("_total"): kind for name, _, kind in rows}
    there = families(own)
    assert kinds == {name: family.type for name, family in there.items()}
    for name, family in there.items():
        shown = labels.get(name, labels.get(f"{name}_total"))
        for sample in family.samples:
            assert tuple(key for key in sample.labels if key != "le") == shown


def test_the_dashboard_asks_for_series_that_exist(own: httpx.Client):
    board = json.loads((DOCS / "openelm-dashboard.json").read_text(encoding="utf-8"))
    there = families(own)
    labels = {
        sample.name: {"instance", *sample.labels}
        for family in there.values()
        for sample in family.samples
    }
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    shown = set()
    for query in asked:
        names = re.findall(r"openelm_\w+", query)
        grouped = [
            name for group in re.findall(r"by \((.*?)\)", query) for name in group.split(", ")
        ]
        chosen = re.findall(r"(\w+)=~", query)
        assert names and all({*grouped, *chosen} <= labels[name] for name in names), query
        shown.update(names)
    without = {re.sub(r"_(total|bucket)$", "", name) for name in shown}
    assert without == set(there)
