"""Several plain servers behind HAProxy, which runs docs/haproxy.cfg as it stands.

`OPENELM_SERVERS=3` takes three servers, the most that the file names, in place of two.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from optional import find_haproxy
from prometheus_client.parser import text_string_to_metric_families
from serving import SECONDS, wait_for, wait_until_ready

from openelm_mlx import generate
from openelm_mlx.engine.loading import Engine

CONFIG = Path(__file__).parents[2] / "docs" / "haproxy.cfg"
SERVERS = int(os.environ.get("OPENELM_SERVERS", "2"))
CHAT = "/v1/chat/completions"
TURNS = [
    {"role": "system", "content": "You are a storyteller. " * 12},
    {"role": "user", "content": "Tell me of a fox."},
    {"role": "assistant", "content": "Once upon a time there was a fox."},
    {"role": "user", "content": "And a dog."},
]
pytestmark = pytest.mark.needs("HAProxy")


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


@dataclass
class Server:
    """A process of `openelm serve`, which can end and start again."""

    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "openelm_mlx", "serve", "--no-compiled", "--port"]
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, str(self.port)], **quiet)

    def end(self) -> int:
        """End it as an operator does; return the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)

    def number(self, name: str, **labels: str) -> float:
        """Return the sum of a series of /metrics over the labels that are not given."""
        families = text_string_to_metric_families(httpx.get(f"{self.address}/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_until_checked(self) -> None:
        """Wait until it is ready and HAProxy has asked for its health."""
        wait_until_ready(self.address)
        before = self.number("openelm_requests_total", endpoint="/health", status="200")
        wait_for(
            lambda: self.number("openelm_requests_total", endpoint="/health", status="200") > before
        )


@contextmanager
def balanced(servers: list[Server]) -> Iterator[str]:
    """Run HAProxy before these servers, and give its address."""
    port, *others = free_ports(4 - len(servers))
    ports = [one.port for one in servers] + others
    names = {f"OPENELM_{name}": f"127.0.0.1:{at}" for name, at in zip("ABC", ports, strict=True)}
    where = {**os.environ, **names, "OPENELM_BIND": f"127.0.0.1:{port}"}
    haproxy = subprocess.Popen([find_haproxy(), "-db", "-q", "-f", CONFIG], env=where)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        haproxy.kill()
        haproxy.wait(SECONDS)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    found = [Server(port) for port in free_ports(SERVERS)]
    try:
        for one in found:
            one.start()
        for one in found:
            wait_until_ready(one.address)
        yield found
    finally:
        for one in found:
            if one.process is not None:
                one.process.kill()
                one.process.wait(SECONDS)


@pytest.fixture(scope="module")
def client(servers: list[Server]) -> Iterator[httpx.Client]:
    """A client of the balancer."""
    with balanced(servers) as address, httpx.Client(base_url=address, timeout=SECONDS) as client:
        for one in servers:
            one.wait_until_checked()
        yield client


def named(way: str, number: int) -> dict[str, Any]:
    """Return how a request says which conversation it belongs to: headers and fields."""
    header = {"X-Conversation-Id": f"talk-{number}"} if way == "header" else {}
    field = {"user": f"reader-{number}"} if way == "user" else {}
    turns = [{**TURNS[0], "content": f"{number}. " + TURNS[0]["content"]}, *TURNS[1:]]
    return {"headers": header, "fields": {**field, "max_tokens": 2}, "turns": turns}


@pytest.mark.parametrize("way", ["header", "user", "messages"])
def test_a_conversation_goes_where_its_prefix_is_cached(
    client: httpx.Client, servers: list[Server], way: str
):
    name: Any = {"name": "openelm_requests_total", "endpoint": CHAT}
    before = [one.number(**name) for one in servers]
    for number in range(4):
        about = named(way, number)
        usages = []
        for count in (2, 4):
            body = {"messages": about["turns"][:count], **about["fields"]}
            answer = client.post(CHAT, json=body, headers=about["headers"])
            usages.append(answer.raise_for_status().json()["usage"])
        cached = usages[1]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= usages[0]["prompt_tokens"] - 8  # what follows the first question differs
    grown = [one.number(**name) - was for one, was in zip(servers, before, strict=True)]
    assert sum(grown) == 8 and sum(map(bool, grown)) > 1


def test_a_token_arrives_while_others_are_made(client: httpx.Client, servers: list[Server]):
    body = {"messages": TURNS, "max_tokens": 600, "ignore_eos": True, "stream": True}
    with client.stream("POST", CHAT, json=body) as answer:
        lines = (line for line in answer.iter_lines() if re.search(r'"content": "[^"]', line))
        assert next(lines)  # the generator is kept, as its end would close the connection
        assert sum(one.number("openelm_requests_running") for one in servers) == 1


def test_series_of_a_server_are_not_behind_the_balancer(client: httpx.Client):
    assert client.get("/metrics").status_code == 404


def test_all_servers_restart_without_a_failed_request(
    client: httpx.Client, servers: list[Server], tiny: Engine
):
    """Clients stream all the time, and every answer is the one that this process gives."""
    asked: dict[str, Any] = {"seed": 5, "temperature": 0.8, "max_tokens": 24}
    expected = generate(tiny, TURNS[:2], tiny.chat_sampling, **asked)
    over, wrong, right = threading.Event(), [], []

    def talk(number: int) -> None:
        headers = {"X-Conversation-Id": f"restart-{number}"}
        body = {"messages": TURNS[:2], "stream": True, **asked}
        with httpx.Client(base_url=client.base_url, timeout=SECONDS, headers=headers) as own:
            while not over.is_set() and not wrong:
                try:
                    found = streamed(own, body)
                except Exception as error:
                    found = repr(error)
                (right if found == expected else wrong).append(found)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for one in servers:
            wait_for(lambda one=one: wrong or one.number("openelm_requests_running") > 0)
            assert one.end() == 0
            one.start()
            one.wait_until_checked()
    finally:
        over.set()
        for thread in threads:
            thread.join(SECONDS)
    assert wrong == [] and len(right) > len(threads)


def streamed(client: httpx.Client, body: dict[str, Any]) -> str:
    """Return the text of a streamed chat."""
    with client.stream("POST", CHAT, json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    chunks = [json.loads(line) for line in lines[:-1] if not line.startswith(":")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
