"""An interrupt at one line of the engine, and what a batch gives all the same."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import openelm_mlx
from openelm_mlx import BatchEngine

ENGINE = Path(openelm_mlx.__file__).parent / "engine"


@cache
def interruptible(file: str) -> bool:
    return Path(file).parent == ENGINE and Path(file).stem != "threads"


class InterruptAt:
    """A trace function that raises KeyboardInterrupt once: at one line of the engine, counted from
    1 among those below `function` (anywhere, if None).

    Left out are the turns that threads take, and the last lines of `step`, which hand the events
    over: those are between two calls, where Python does not look for signals.
    """

    def __init__(self, line, function=None):
        self.left, self.done, self.function = line, False, function

    def __call__(self, frame, event, argument):
        if not interruptible(frame.f_code.co_filename) or frame.f_code is BatchEngine.step.__code__:
            return None
        caller = frame
        while self.function and caller is not None and caller.f_code is not self.function.__code__:
            caller = caller.f_back
        return self.line if caller is not None else None

    def line(self, frame, event, argument):
        self.left -= event == "line"
        if self.left <= 0 and not self.done:
            self.done = True
            raise KeyboardInterrupt
        return self.line


def finished(batch, interrupt=None):
    """The tokens of all requests, whatever a step raises meanwhile."""
    found: dict[int, list] = {}
    while batch.busy:
        if interrupt is not None and not interrupt.done:
            sys.settrace(interrupt)
        try:
            events = batch.step()
        except (KeyboardInterrupt, RuntimeError):
            continue
        finally:
            sys.settrace(None)
        for number, event in events:
            found.setdefault(number, []).append(event.token)
    return list(found.values())
