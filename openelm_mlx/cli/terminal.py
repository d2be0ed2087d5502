"""The dialogue on a terminal: a prompt with history and completion, no echo during answers."""

from __future__ import annotations

import os
import signal
import sys
import termios
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output

from openelm_mlx.cli.chat_commands import COMMANDS, SETTINGS, find, handle
from openelm_mlx.cli.display import moves_cursor, printable
from openelm_mlx.cli.session import Session
from openelm_mlx.errors import OpenELMError

if TYPE_CHECKING:
    from openelm_mlx.engine.conversation import Conversation

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # a bracketed paste keeps its lines together


def dialogue(conversation: Conversation) -> int:
    """Prompt, answer, repeat, until the user leaves; history is kept across sessions."""
    output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
    session = Session(conversation, dialogue=True)
    prompts: PromptSession[str] = PromptSession(
        history=History(str(history_file())),
        key_bindings=key_bindings(),
        multiline=True,
        output=output,
        bottom_toolbar=session.status,
        prompt_continuation="… ",
        completer=Lines(),
        complete_while_typing=False,
        enable_suspend=True,
    )

    def confirm(question: str) -> bool:
        with suppress(KeyboardInterrupt, EOFError):
            asked: PromptSession[str] = PromptSession(output=output)
            return asked.prompt(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
        return False

    session.confirm = confirm
    with SilentKeys() as keys:
        session.greet()
        while True:
            try:
                text = prompts.prompt("› ").strip()
                keys.bracket_pastes()
                if text and not handle(session, text):
                    return 0
            except KeyboardInterrupt:
                if not prompts.default_buffer.text:  # else it took back a line that was begun
                    session.say("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                return 0
            except OpenELMError as error:
                session.say(f"openelm: {error}")
            session.say("")


def key_bindings() -> KeyBindings:
    """Enter sends unless the line ends with a backslash; Alt-Enter always breaks the line."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def newline(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


class Lines(Completer):
    """Completes commands, the paths after those that take a file, and the settings after /set."""

    def __init__(self) -> None:
        self.paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, blank, rest = text.partition(" ")
        command = find(name)
        if not blank:
            for known in COMMANDS:  # each once, by the first of its names that fits
                fitting = [full for full in known.names if full.startswith(name.lower())]
                for full in fitting[:1]:
                    yield Completion(full, -len(name), display_meta=known.help)
        elif command is not None and command.argument.startswith("FILE"):
            yield from self.paths.get_completions(Document(rest.lstrip()), complete_event)
        elif command is not None and command.argument.startswith("[NAME") and " " not in rest:
            for setting, item in SETTINGS.items():
                if setting.startswith(rest.lower()):
                    yield Completion(setting, -len(rest), display_meta=item.metadata["help"])


class History(FileHistory):
    """Keeps earlier messages in a file.

    Lone surrogates, which prompt_toolkit before 3.0.53 cannot write, are replaced.
    """

    def store_string(self, string: str) -> None:
        super().store_string(printable(string))


def history_file() -> Path:
    """Return the file of earlier messages: $XDG_STATE_HOME/openelm-mlx/history."""
    try:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        file = state / "openelm-mlx" / "history"
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))  # private: it has all questions
    except (OSError, RuntimeError):  # without a home that can be written there is no history
        return Path(os.devnull)
    return file


class SilentKeys:
    """Hides what is typed during an answer, and leaves it to the next prompt.

    The terminal is restored on every way out, also by signals that end or suspend the process.
    """

    ENDING = (signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> SilentKeys:
        self.terminal = sys.stdin.fileno()
        self.before = termios.tcgetattr(self.terminal)
        self.handlers = {number: signal.signal(number, self._end) for number in self.ENDING}
        self.handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._suspend)
        self._silence()
        return self

    def bracket_pastes(self) -> None:
        """Keep the lines of a paste together during an answer too; each prompt turns that off."""
        if moves_cursor(sys.stdout):
            print(PASTE_ON, end="", flush=True)

    def __exit__(self, *error: object) -> None:
        self._restore()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _silence(self) -> None:
        """Turn off echo and the terminal's own lines, which end at 4,095 bytes; let Enter be CR."""
        mode = termios.tcgetattr(self.terminal)
        mode[0] &= ~termios.ICRNL
        mode[3] &= ~(termios.ECHO | termios.ICANON)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self.terminal, termios.TCSANOW, mode)

    def _restore(self) -> None:
        with suppress(OSError, termios.error):  # the terminal may be gone
            if moves_cursor(sys.stdout):
                print(PASTE_OFF, end="", flush=True)
            termios.tcsetattr(self.terminal, termios.TCSANOW, self.before)

    def _end(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        os.kill(os.getpid(), signal.SIGSTOP)  # and here it goes on, after fg
        self._silence()
