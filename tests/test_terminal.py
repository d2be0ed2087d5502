"""The chat on a real pseudo-terminal: a message, an interrupted answer, a command, Ctrl-D."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time

from openelm_mlx import Conversation

KEYS = {"enter": b"\r", "ctrl-c": b"\x03", "ctrl-d": b"\x04"}


class Terminal:
    def __init__(self, *arguments: str, home: str) -> None:
        self.child, self.screen = pty.fork()
        if self.child == 0:
            environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": home, "HOME": home, "COLUMNS": "100", "LINES": "40"}
            os.execve(sys.executable, [sys.executable, "-m", "openelm_mlx", *arguments], environment)
        self.shown = ""

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What was shown up to the first match; it is taken off."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown[-2000:]!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    data = os.read(self.screen, 65536)
                except OSError:  # Linux's way to say that the other side is closed
                    data = b""
                if b"\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
                    os.write(self.screen, b"\x1b[1;1R")
                self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode("utf-8", "replace"))
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str, key: str = "enter") -> None:
        os.write(self.screen, text.encode() + KEYS[key])

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_a_conversation_on_a_terminal(tiny, tmp_path):
    terminal = Terminal("chat", "--max-tokens", "400", "--ignore-eos", home=str(tmp_path))
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for("›")
    wanted = "".join(event.text for event in Conversation(tiny, max_tokens=12).send("Hello!"))
    terminal.type("Hello!")
    terminal.wait_for(re.escape(wanted[:12]))
    terminal.type("", "ctrl-c")  # the answer stops, the conversation stays
    terminal.wait_for("›")
    terminal.type("/stats")
    terminal.wait_for(r"tokens/s|stopped|no answer")
    terminal.type("/nonsense")
    terminal.wait_for("no command")
    terminal.type("", "ctrl-d")
    assert terminal.status() == 0
