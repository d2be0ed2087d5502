"""Runs a conversation line by line: a line is a message or a command, answers are streamed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TextIO

from openelm_mlx.cli.display import (
    Display,
    Meter,
    WordWrap,
    columns,
    moves_cursor,
    printable,
)
from openelm_mlx.cli.generate import context_full
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.stopping import StopKey

if TYPE_CHECKING:
    from openelm_mlx.engine.conversation import Conversation
    from openelm_mlx.engine.request import Event, GenerationStats

    # takes progress(done, total), and returns the events of an answer
    Ask = Callable[[Callable[[int, int], None]], Generator[Event, None, None]]

NARROWEST = 20  # columns that a text needs to be wrapped beside another


class Session:
    """Runs the lines of a conversation, and shows its answers and everything else.

    A `dialogue` is at a terminal: Ctrl-C stops an answer only, an unknown command is not sent as a
    message, and `confirm` asks a question for yes or no. Otherwise answers go to stdout and
    everything else to stderr. `stats` are those of the last answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        dialogue: bool = False,
        confirm: Callable[[str], bool] | None = None,
    ) -> None:
        self.conversation, self.dialogue, self.confirm = conversation, dialogue, confirm
        self.stats: GenerationStats | None = None
        self.meter = Meter()

    @property
    def out(self) -> TextIO:
        """Return the stream for everything but answers."""
        return sys.stdout if self.dialogue and sys.stdout.isatty() else sys.stderr

    def greet(self) -> None:
        """Say what the answers depend on, the seed that was drawn included."""
        talk = self.conversation
        if not self.dialogue:
            return self.say(f"{talk.engine.name}: {settings(talk.sampling)}")
        return self.say(
            f"{facts(talk.engine)}\n{settings(talk.sampling)}\n"
            f"at most {talk.options.max_tokens} tokens per answer; "
            "/help lists commands, /exit or Ctrl-D leaves"
        )

    def say(self, text: str) -> None:
        """Show a text that is not an answer, wrapped on a terminal."""
        out = self.out
        text = WordWrap(lambda: columns(out)).push(text) if moves_cursor(out) else printable(text)
        print(text, file=out, flush=True)

    def say_table(self, rows: Iterable[tuple[str, ...]]) -> None:
        """Say rows of columns; on a terminal the last column is wrapped within itself."""
        rows, out = list(rows), self.out
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)][:-1]
        free = columns(out) - 1 - sum(widths) if moves_cursor(out) else 0
        indent = "\n" + " " * sum(widths)
        lines = []
        for *first, last in rows:
            left = "".join(f"{text:<{width}}" for text, width in zip(first, widths, strict=True))
            parts = last.split("\n")
            if free >= NARROWEST:
                parts = [part for text in parts for part in textwrap.wrap(text, free) or [""]]
            lines.append(left + indent.join(parts))
        self.say("\n".join(lines))

    def send(self, text: str) -> None:
        """Send a message and show its answer."""
        self.answer(lambda progress: self.conversation.send(text, progress))

    def answer(self, ask: Ask) -> None:
        """Show an answer as it comes. Ctrl-C in a dialogue ends the answer, not the chat."""
        display, stop, meter = Display(self.dialogue), StopKey(), Meter()

        def progress(done: int, total: int) -> None:
            stop.check()
            display.progress(done, total)

        events = ask(progress)
        for notice in self.conversation.notices:
            self.say(f"[{notice}]")
        last: Event | None = None
        with stop if self.dialogue else nullcontext(), display:
            try:
                with closing(events):
                    for event in events:
                        meter.token()
                        display.write(event.text, str(meter))
                        last = event
                        if event.finish_reason is None:
                            stop.check()
            except KeyboardInterrupt:
                if not self.dialogue:
                    raise
                before = "[stopped before the answer began; the conversation is as before]"
                display.write(" [stopped]" if last else before)
        self.stats, self.meter = None if last is None else last.stats, meter
        if last is not None and last.finish_reason == "length":
            self._tell_of_the_cut(last)

    def _tell_of_the_cut(self, last: Event) -> None:
        options = self.conversation.options
        if context_full(last, options):
            self.say("[the context is full; the next message drops the oldest turns]")
        elif self.dialogue:
            tokens = options.max_tokens
            self.say(f"[the answer was cut at {tokens} tokens; /set max_tokens N allows more]")

    def status(self) -> str:
        """Return the line below the prompt: the last answer's speed, and the context in use."""
        talk = self.conversation
        speed = f"{self.stats.generation_tokens_per_second:.1f} tokens/s | " if self.stats else ""
        context = f"context {talk.context_used} of {talk.context_length}"
        return f" {printable(talk.engine.name)} | {speed}{context}"


def facts(engine: Any) -> str:
    """Describe a model in one line: its size, its precision and its context."""
    parameters = engine.num_parameters
    return (
        f"{engine.name}: {parameters / 1e6:,.1f} million parameters, "
        f"{8 * engine.nbytes / parameters:.1f} bits per weight, "
        f"context {engine.config.max_context_length} tokens"
    )


def written(value: Any) -> str:
    """Write the value of a setting as /set takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, ()):
        return "none"
    if isinstance(value, tuple):
        pairs = (f"{one[0]}={one[1]:g}" if isinstance(one, tuple) else str(one) for one in value)
        return " ".join(pairs)
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings(sampling: SamplingOptions) -> str:
    """List the settings that differ from greedy decoding, by their names in /set, and the seed."""
    first = "greedy" if sampling.greedy else f"temperature {sampling.temperature:g}"
    others = [
        f"{item.name} {written(getattr(sampling, item.name))}"
        for item in fields(sampling)
        if item.name not in ("temperature", "seed", *sampling.idle)
        and "help" in item.metadata
        and getattr(sampling, item.name) != item.default
    ]
    return ", ".join([first, *others, f"seed {sampling.seed}"])
