"""The line at the foot of a terminal while requests run."""

from __future__ import annotations

import io
import re
import sys
import time
from contextlib import ExitStack, redirect_stderr

import httpx
import pytest
from fastapi import FastAPI
from serving import SECONDS, server_of, wait_for

from openelm_mlx.server.live import PAUSE, Foot, live_line

ANSWER = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}


class Terminal(io.StringIO):
    """A terminal that keeps what it was sent."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> str:
        """The text that can be read on it, without colours and what was wiped."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.getvalue())
        return re.sub(r"[^\n]*\r\x1b\[2K", "", plain)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


def test_what_is_written_stands_above_the_line(terminal: Terminal):
    foot = Foot(terminal)
    foot.show("one")
    assert terminal.screen == "one"
    print("a log line that is much longer than this terminal is wide", file=foot)
    foot.show("two")
    print("half", end="", file=foot)
    foot.show("three")  # not behind half a line
    written = "a log line that is much longer than this terminal is wide\nhalf"
    assert terminal.screen == written
    print(" a line", file=foot)
    assert terminal.screen == written + " a line\nthree"
    foot.show("x" * 60)
    assert terminal.screen.endswith("\n" + "x" * 38 + "…")
    foot.show("")
    assert terminal.screen == written + " a line\n"


def test_the_line_says_what_runs_and_goes_when_nothing_does(terminal: Terminal):
    with (
        server_of("openelm-tiny", slots=1) as (server, url),
        redirect_stderr(terminal),
        live_line(server.app),
        httpx.Client(base_url=url, timeout=SECONDS) as client,
    ):
        assert sys.stderr is not terminal and terminal.getvalue() == ""
        begun = time.monotonic()
        with client.stream("POST", "/v1/completions", json={**ANSWER, "n": 2}):
            wait_for(lambda: "1 running · 1 waiting" in terminal.screen)
            print("a request", file=sys.stderr)
            wait_for(lambda: re.search(r" [1-9]\d* to", terminal.screen))
            assert re.fullmatch("a request\n1 running · 1 waiting · [^\n]*", terminal.screen)
        wait_for(lambda: terminal.screen == "a request\n")
        looks = (time.monotonic() - begun) / PAUSE
        assert terminal.getvalue().count("\x1b[2K") <= looks + 2
        silent = len(terminal.getvalue())
        assert client.get("/v1/models").status_code == 200
        assert len(terminal.getvalue()) == silent
    assert terminal.screen == "a request\n"


def test_the_line_is_wiped_at_the_end_of_the_server(terminal: Terminal):
    with (
        server_of("openelm-tiny") as (server, url),
        httpx.Client(base_url=url) as client,
        ExitStack() as stack,
    ):
        with redirect_stderr(terminal), live_line(server.app):
            stack.enter_context(client.stream("POST", "/v1/completions", json=ANSWER))
            wait_for(lambda: "1 running" in terminal.screen)
        assert terminal.screen == ""


def test_there_is_no_line_where_stderr_is_no_terminal(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
):
    pipe = io.StringIO()
    with redirect_stderr(pipe), live_line(FastAPI()):
        assert sys.stderr is pipe
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), live_line(FastAPI()):
        assert sys.stderr is terminal
