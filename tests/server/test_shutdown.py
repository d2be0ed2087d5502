"""The server ends: after what runs, within its grace, or at once; and it does not start in vain.

`OPENELM_LOAD=1` runs the test of SIGTERM under load 100 times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from serving import SECONDS, server_of

from openelm_mlx.cli import main
from openelm_mlx.errors import OptionError
from openelm_mlx.server.run import listen, unsent, why_not

TIMES = 100 if os.environ.get("OPENELM_LOAD") else 1
LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


class Process(NamedTuple):
    """A server of its own, and its address."""

    it: subprocess.Popen[str]
    address: str

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit status and what was written to stderr."""
        _, errors = self.it.communicate(timeout=SECONDS)
        return self.it.returncode, errors


@contextmanager
def process(*words: str) -> Iterator[Process]:
    """Run `openelm serve` until its address is printed, and kill it at last."""
    command = [sys.executable, "-m", "openelm_mlx", "serve", "--port", "0", *words]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as it:
        try:
            line = it.stdout.readline()
            assert line.startswith("openelm serve: http://127.0.0.1:"), it.stderr.read()
            assert line.endswith("  (page, API at /v1)\n")
            yield Process(it, line.split()[2])
        finally:
            it.kill()


class Client(threading.Thread):
    """Asks for one streamed answer after another until it gets none."""

    def __init__(self, address: str, number: int) -> None:
        super().__init__(daemon=True)
        self.address, self.number = address, number
        self.begun, self.whole, self.last = threading.Event(), 0, ""

    def run(self) -> None:
        sizes = random.Random(self.number)
        try:
            with httpx.Client(base_url=self.address, timeout=SECONDS) as http:
                while not self.last:
                    self.ask(http, sizes.randrange(1, 20))
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError) as error:
            self.last = type(error).__name__

    def ask(self, http: httpx.Client, size: int) -> None:
        body = {**LONG, "max_tokens": size, "stream": True, "seed": self.number}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                self.last = json.loads(answer.read())["error"]["code"]
                assert answer.headers["retry-after"] == "1"
                return
            try:
                lines = []
                for line in answer.iter_lines():
                    self.begun.set()
                    lines.append(line)
            except httpx.HTTPError as error:
                self.last = f"cut: {error}"
                return
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        complete = chunks[-1]["choices"][0]["finish_reason"] == "length"
        self.last = "" if complete and "data: [DONE]" in lines else f"cut: {lines[-4:]}"
        self.whole += complete


@pytest.mark.parametrize("time_of", range(TIMES))
def test_sigterm_under_load_cuts_no_answer(time_of: int):
    with process("--grace", "60") as server:
        clients = [Client(server.address, number) for number in range(4)]
        for client in clients:
            client.start()
        for client in clients:
            assert client.begun.wait(SECONDS)
        threading.Event().wait(random.Random(time_of).random() * 0.2)
        server.it.send_signal(signal.SIGTERM)
        for client in clients:
            client.join(SECONDS)
        status, errors = server.ended()
    ends = [client.last for client in clients]
    assert not [end for end in ends if end.startswith("cut")], ends
    assert status == 0 and "Traceback" not in errors
    assert sum(client.whole for client in clients) >= len(clients)
    assert "ending after what runs (" in errors


def test_a_second_signal_ends_at_once():
    with process("--grace", "60") as server, httpx.Client(timeout=SECONDS) as http:
        body = {**LONG, "stream": True}
        with http.stream("POST", f"{server.address}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.it.send_signal(signal.SIGINT)
            health = httpx.get(f"{server.address}/health", timeout=SECONDS)
            assert health.status_code == 503 and health.headers["connection"] == "close"
            assert server.it.poll() is None
            server.it.send_signal(signal.SIGINT)
            assert server.it.wait(SECONDS) == 128 + signal.SIGINT


def finish(server: Any) -> None:
    """Do what a signal does: signals reach the main thread only."""
    server.loop.call_soon_threadsafe(server.end, signal.SIGTERM)


def test_what_is_not_done_within_the_grace_is_ended_with_a_word():
    found: dict[str, Any] = {}

    def ask_whole(address: str) -> None:
        found["whole"] = httpx.post(f"{address}/v1/completions", json=LONG, timeout=SECONDS)

    with server_of("openelm-tiny", grace=0.1) as (server, address):
        whole = threading.Thread(target=ask_whole, args=(address,))
        whole.start()
        body = {**LONG, "stream": True, "n": 2}
        with httpx.stream("POST", f"{address}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            while server.guard.running < 2:
                next(lines)
            finish(server)
            *_, last = (line for line in lines if line)
        whole.join(SECONDS)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "shutting_down" and error["type"] == "service_unavailable_error"
        assert found["whole"].status_code == 503 and found["whole"].json()["error"] == error
        assert not server.app.state.worker.tickets


def test_a_client_that_does_not_read_cannot_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("openelm_mlx.server.run.LAST_SECONDS", 0.2)
    with server_of("openelm-tiny", grace=0.1) as (server, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), SECONDS) as connection:
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
            while not any(map(unsent, server.connections)):
                threading.Event().wait(0.01)
            finish(server)
            started = time.monotonic()
            while not server.should_exit:
                assert time.monotonic() - started < SECONDS
                threading.Event().wait(0.01)


def test_a_signal_while_a_model_is_loaded_ends_too(tmp_path: Path):
    with listen("127.0.0.1", 0) as hub, listen("127.0.0.1", 0) as free:
        places = [f"http://127.0.0.1:{one.getsockname()[1]}" for one in (hub, free)]
        free.close()
        command = [sys.executable, "-m", "openelm_mlx", "serve", "some-one/some-model"]
        command += ["--port", places[1].rpartition(":")[2]]
        outside = {**os.environ, "HF_ENDPOINT": places[0], "HF_HOME": str(tmp_path)}
        with subprocess.Popen(command, env=outside, stderr=subprocess.PIPE) as it:
            try:
                hub.settimeout(SECONDS)
                asked, _ = hub.accept()  # and it never gets an answer
                health = httpx.get(f"{places[1]}/health", timeout=SECONDS)
                assert health.status_code == 503 and health.json() == {"status": "loading"}
                it.terminate()
                assert it.wait(5) == 0
                asked.close()
            finally:
                it.kill()


def test_a_signal_before_the_server_takes_it_ends_with_status_0():
    """The handler is there before anything large is imported."""
    late = "import sys; from openelm_mlx.cli import main, serve"
    kill = "import os, signal; serve.from_args = lambda *_: os.kill(os.getpid(), signal.SIGTERM)"
    code = f"{late}; {kill}; main(['serve']); sys.exit(3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=SECONDS).returncode == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line by which `openelm serve` says that it does not start."""
    assert main(["serve", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    return shown.err


def test_an_address_that_cannot_be_had_is_refused_before_a_model_is_loaded(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        line = refused(capsys, "no-such-model", "--port", str(port))
        start = f"openelm: port {port} of 127.0.0.1 is in use"
        assert line == f"{start}; give another --port, or 0 for any that is free\n"
    line = refused(capsys, "no-such-model", "--host", "192.0.2.1", "--api-key", "k")
    assert "host '192.0.2.1' is no address of this machine; give 127.0.0.1" in line
    line = refused(capsys, "no-such-model", "--host", "0.0.0.0")
    assert "which other machines can reach; give --api-key-file or --api-key too" in line
    line = refused(capsys, "no-such-model", "--api-key-file", "/nowhere")
    assert "api_key_file /nowhere cannot be read: No such file" in line


def test_a_model_that_cannot_be_loaded_ends_the_server(capsys, tmp_path: Path):
    assert str(tmp_path) in refused(capsys, str(tmp_path), "--port", "0")


def test_addresses_that_cannot_be_had():
    with pytest.raises(OptionError, match=r"host 'a\.invalid' is no address of this machine"):
        listen("a.invalid", 0)
    low = why_not("127.0.0.1", 80, PermissionError(13, "Permission denied"))
    assert low == "port 80 is reserved for the system; give a --port from 1024 up"
    other = why_not("::1", 80, OSError(97, "Address family not supported by protocol"))
    assert other == "cannot listen on ::1, port 80: Address family not supported by protocol"
