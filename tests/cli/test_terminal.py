"""The chat on a real pseudo-terminal: what only a terminal shows, and how it is left."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing

import pytest

from openelm_mlx import Conversation
from openelm_mlx.cli.display import Display

KEYS = {"enter": b"\r", "ctrl-c": b"\x03", "ctrl-d": b"\x04", "tab": b"\t"}


GREEDY = ("--temperature", "0")
STATUS = re.compile(r"\x1b\[J|\x1bD\x1b\[A\x1b7.*?\x1b8", re.DOTALL)  # the line below an answer
BACK = re.compile(r"\x1b\[(\d+)D\x1b\[K")
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    def __init__(self, *arguments: str, home: str) -> None:
        self.screen, self.side = pty.openpty()
        self.resize(100)
        self.before = termios.tcgetattr(self.side)
        environment = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": home, "HOME": home}
        self.child = subprocess.Popen(
            [sys.executable, "-m", "openelm_mlx", *arguments],
            stdin=self.side,
            stdout=self.side,
            stderr=self.side,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.raw, self.taken = "", 0

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def wait_for(self, pattern: str, seconds: float = 30, of: str = "text") -> str:
        """Return what was shown up to the first match, and take it off. `of="raw"` looks at the
        status line as well.
        """
        end = time.monotonic() + seconds
        while True:
            shown = self.raw if of == "raw" else seen(self.raw)[self.taken :]
            if match := re.search(pattern, shown):
                self.taken += match.end() if of == "text" else 0
                return shown[: match.end()]
            assert time.monotonic() < end, f"no {pattern!r} in {shown[-2000:]!r}"
            self.read()

    def read(self) -> None:
        if not select.select([self.screen], [], [], 0.2)[0]:
            return
        try:
            data = os.read(self.screen, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            return
        if b"\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
            os.write(self.screen, b"\x1b[1;1R")
        self.raw += data.decode("utf-8", "replace")

    def restored(self) -> bool:
        """Tell whether the terminal echoes and makes lines as before the chat."""
        return termios.tcgetattr(self.side) == self.before

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
        os.close(self.side)


@pytest.fixture
def terminal(tmp_path):
    """A chat whose answers go on until they are cut."""
    with closing(
        Terminal("chat", *GREEDY, "--max-tokens", "400", "--ignore-eos", home=str(tmp_path))
    ) as terminal:
        shown = terminal.wait_for("leaves")
        assert "million parameters" in shown and "context 1024" in shown and "greedy" in shown
        terminal.wait_for("›")
        yield terminal


def seen(raw: str) -> str:
    """The text without the status line; what the chat goes back over, to write it on the next line,
    is gone.
    """
    raw = STATUS.sub("", raw)
    while back := BACK.search(raw):
        raw = raw[: back.start() - int(back[1])] + raw[back.end() :]
    return ESCAPES.sub("", raw).replace("\r", "")


def test_a_conversation_on_a_terminal(tiny, terminal, tmp_path):
    # an answer is stopped; the conversation goes on, and the cost of what there was is told
    wanted = "".join(
        event.text for event in Conversation(tiny, max_tokens=12, temperature=0).send("Hello!")
    )
    terminal.type("Hello!")
    terminal.wait_for(re.escape(wanted[:8]))
    terminal.type("", "ctrl-c")
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for("›")
    terminal.type("/sta", "tab")
    terminal.wait_for("ts")  # the prompt draws what is new only
    terminal.type("")
    terminal.wait_for("stopped after [0-9]+ tokens")
    terminal.wait_for("›")
    # Ctrl-C with nothing to stop says how to leave; a table keeps its columns
    terminal.type("", "ctrl-c")
    terminal.wait_for("Ctrl-D or /exit leaves")
    terminal.wait_for("›")
    terminal.type("/set")
    terminal.wait_for(r"prompt_lookup +0 .*\n {30,}\w")
    terminal.wait_for("›")
    # what is typed while an answer runs is not shown amid it and waits for the prompt
    terminal.type("/set max_t", "tab")
    terminal.wait_for("okens")
    terminal.type(" 60")
    terminal.wait_for("max_tokens: 60")
    terminal.wait_for("›")
    terminal.type("Hello!")
    terminal.wait_for(r"› Hello!\s+\w+")
    terminal.type("/show")
    assert "/show" not in terminal.wait_for("the answer was cut at 60 tokens")
    assert " 60 tokens at " in terminal.raw  # in the line below the answer
    terminal.wait_for("model .* parameters")
    terminal.wait_for("›")
    # what is not UTF-8 is refused in one line, and is no reason to leave
    os.write(terminal.screen, b"caf\xe9 au lait\r")
    terminal.wait_for("openelm: .*UTF-8")
    terminal.wait_for("›")
    # nothing is overwritten unasked
    terminal.type("/sav ~/talk.json")
    terminal.wait_for("did you mean /save")
    (tmp_path / "talk.json").write_text("old")
    terminal.wait_for("›")
    terminal.type("/save ~/talk.json")
    terminal.wait_for("replace it")
    terminal.type("")  # no is what Enter alone says
    terminal.wait_for("not saved")
    assert (tmp_path / "talk.json").read_text() == "old"
    terminal.wait_for("›")
    terminal.type("/save ~/ta", "tab")
    terminal.wait_for("lk.json")
    terminal.type("")
    terminal.wait_for("replace it")
    terminal.type("y")
    terminal.wait_for("saved 2 exchanges")
    terminal.wait_for("›")
    terminal.type("", "ctrl-d")  # before the prompt is there it would be nobody's
    assert terminal.status() == 0 and terminal.restored()
    history = tmp_path / "openelm-mlx" / "history"
    assert "+Hello!\n" in history.read_text("utf-8", "replace")
    assert history.stat().st_mode & 0o777 == 0o600


def test_a_killed_chat_leaves_the_terminal_as_it_was(terminal):
    terminal.resize(30)
    terminal.type("Hello!")
    terminal.wait_for("Ctrl-C stops", of="raw")
    assert not terminal.restored()
    shown = terminal.wait_for(r"› Hello!\n+([^\n]+\n){3}")
    lines = shown.splitlines()[
        -3:
    ]  # of a narrow window: the terminal has to break none of them by itself
    assert all(len(line) < 30 for line in lines) and max(map(len, lines)) > 20, lines
    os.kill(terminal.child.pid, signal.SIGTERM)
    assert terminal.status() == 128 + signal.SIGTERM and terminal.restored()


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_status_line_tells_how_far_the_prompt_is(monkeypatch):
    screen = Tty()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with Display(live=True) as display:
        display.progress(64, 200)
    assert "prompt: 64 of 200 tokens" in screen.getvalue()
