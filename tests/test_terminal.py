"""The chat on a real pseudo-terminal: a message, an interrupted answer, a command, Ctrl-D."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from contextlib import closing

from openelm_mlx import Conversation

KEYS = {"enter": b"\r", "ctrl-c": b"\x03", "ctrl-d": b"\x04"}


class Terminal:
    def __init__(self, *arguments: str, home: str) -> None:
        self.screen, side = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": home, "HOME": home, "COLUMNS": "100", "LINES": "40"}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "openelm_mlx", *arguments], stdin=side, stdout=side, stderr=side, env=environment,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(side)
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to the first match; it is taken off."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            self.read()
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def read(self) -> None:
        if not select.select([self.screen], [], [], 0.2)[0]:
            return
        try:
            data = os.read(self.screen, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            return
        if b"\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
            os.write(self.screen, b"\x1b[1;1R")
        self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode("utf-8", "replace"))

    def type(self, text: str, key: str = "enter") -> None:
        os.write(self.screen, text.encode() + KEYS[key])

    def status(self, seconds: float = 60) -> int | None:
        """The exit status; what is still shown is read meanwhile, or the child could not end."""
        end = time.monotonic() + seconds
        while self.child.poll() is None and time.monotonic() < end:
            self.read()
        return self.child.poll()

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self.screen)


def test_a_conversation_on_a_terminal(tiny, tmp_path):
    greedy = ("--temperature", "0", "--repetition-penalty", "1")
    with closing(Terminal("chat", "--max-tokens", "400", "--ignore-eos", *greedy, home=str(tmp_path))) as terminal:
        talk(tiny, terminal)


def talk(tiny, terminal):
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("›")
    events = Conversation(tiny, max_tokens=12, temperature=0.0, repetition_penalty=1.0).send("Hello!")
    wanted = "".join(event.text for event in events)
    terminal.type("Hello!")
    terminal.wait_for(re.escape(wanted[:12]))
    terminal.type("", "ctrl-c")  # the answer stops, the conversation stays
    terminal.wait_for("›")
    terminal.type("/help")
    terminal.wait_for("stops an answer")  # the end of the list
    terminal.wait_for("›")
    terminal.type("/nonsense")
    terminal.wait_for("no command")
    terminal.wait_for("›")  # before the prompt is there, Ctrl-D would be nobody's
    terminal.type("", "ctrl-d")
    assert terminal.status() == 0
