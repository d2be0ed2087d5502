"""Ctrl-C as a request that is met between two pieces of work."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopKey:
    """Turns Ctrl-C into a request to stop at the next place that asks, such as a token's end.

    No pass is interrupted. A second Ctrl-C before the end is a `KeyboardInterrupt`. Python gives
    signals to the main thread, so in another one this changes nothing.
    """

    def __init__(self) -> None:
        self.asked, self.over = False, False
        self.before: Any = None
        self.main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> StopKey:
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.over:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if the key was pressed."""
        if self.asked:
            self.over = True  # what cleans up now is not to be interrupted again
            raise KeyboardInterrupt

    def __exit__(self, *error: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)
