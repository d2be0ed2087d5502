"""The log: one line on stderr for each request, written by a thread of its own.

A line has the time, method, path, status, seconds and id of the request, and for an answer its
model and numbers of tokens. Prompts and answers are written only if that was asked for. Characters
that a terminal would obey, and those that end a line, are escaped.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from queue import Empty, Full, Queue
from time import perf_counter
from typing import TYPE_CHECKING, Any

from openelm_mlx.server.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("openelm.serve")
QUIET = ("/health", "/metrics")  # asked every few seconds; only what goes wrong there is written
MOST_LINES = 10_000  # waiting for a terminal or a pipe that takes none; more are dropped
LAST_SECONDS = 1.0  # for the last lines to be written
MOST_WORD = 200  # characters of a path or a user's name that are written


class Logged:
    """Writes a line for each request that `app` answers."""

    def __init__(self, app: ASGIApp, text: bool = False) -> None:
        self.app, self.text = app, text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status, whole = perf_counter(), 0, False

        async def sent(message: Message) -> None:
            nonlocal status, whole
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                whole = not message.get("more_body", False)

        try:
            await self.app(scope, receive, sent)
        finally:
            if status != 200 or not whole or scope["path"] not in QUIET:
                log.info(self.line(scope, status, whole, perf_counter() - started))
            # an idle connection keeps its last scope: with an answer or an error in it, a model too
            scope.get("state", {}).clear()
        return None

    def line(self, scope: Scope, status: int, whole: bool, seconds: float) -> str:
        """Return the line of a request."""
        state = scope.get("state", {})
        words = [scope["method"], scope["path"][:MOST_WORD], str(status), f"{seconds:.3f}s"]
        if (answer := state.get("answer")) is not None:
            prompt, cached, new = answer.counts()
            words += [f"model={answer.model}", f"in={prompt}", f"cached={cached}", f"out={new}"]
            if answer.asked.user is not None:
                words.append(f"user={as_json(answer.asked.user[:MOST_WORD])}")
        if (error := state.get("error")) is not None:
            known = isinstance(error, ApiError)
            words.append(f"error={error.code or error.status if known else type(error).__name__}")
        elif not whole:
            words.append("client left")
        words.append(f"id={state.get('request_id', '-')}")
        if self.text and answer is not None:
            texts = [choice.text for choice in answer.choices]
            words += [f"asked={as_json(answer.asked.prompts)}", f"answered={as_json(texts)}"]
        return escaped(" ".join(words))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def escaped(text: str) -> str:
    r"""Return a text in one line that a terminal prints and does not obey.

    >>> escaped("/a\n\x1b[2J é")
    '/a\\n\\x1b[2J é'
    """
    if text.isprintable():
        return text
    plain = (
        one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text
    )
    return "".join(plain)


class OnStderr(logging.Handler):
    """Prints records on what stderr is at the time: a live line may have taken it over."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):
            print(self.format(record), file=sys.stderr, flush=True)


class Lines(QueueHandler):
    """Takes records from the event loop and never makes it wait."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(Full):
            self.queue.put_nowait(record)


def write(lines: Queue[logging.LogRecord | None]) -> None:
    """Print records as they come, until None comes."""
    printer = OnStderr()
    form = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    form.converter = time.gmtime
    printer.setFormatter(form)
    while (record := lines.get()) is not None:
        printer.handle(record)


@contextmanager
def logging_to_stderr() -> Iterator[threading.Thread]:
    """Write the lines of the server, and the errors of uvicorn, to stderr meanwhile.

    Give the thread that writes. If it is alive afterwards, stderr takes nothing.
    """
    lines: Queue[logging.LogRecord | None] = Queue(MOST_LINES)
    writer = threading.Thread(target=write, args=(lines,), name="openelm-log", daemon=True)
    handler = Lines(lines)
    loggers = {log: logging.INFO, logging.getLogger("uvicorn.error"): logging.ERROR}
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    writer.start()
    try:
        yield writer
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
        with suppress(Empty):
            while lines.full():  # the end must find a place
                lines.get_nowait()
        lines.put(None)
        writer.join(LAST_SECONDS)
