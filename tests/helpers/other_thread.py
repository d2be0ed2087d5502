"""Calls in threads that end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from openelm_mlx.engine.threads import on_device

T = TypeVar("T")


def elsewhere(call: Callable[[], T]) -> T:
    """Call in a thread that ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def settle() -> None:
    """Wait for what an event loop that has ended left to the worker."""
    elsewhere(lambda: on_device(int))
