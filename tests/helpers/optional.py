"""What a machine may have or lack, and how a test says that it depends on it.

`@pytest.mark.needs("Chromium")` is for a test that means nothing without it: it is skipped, and the
last lines of the run say so. `@pytest.mark.with_or_without("OpenBLAS")` is for a test that holds
either way; `.ci/run` runs both kinds once more on a machine that has none of these things.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest
from browser import find_chromium

from openelm_mlx.device_settings import load_blas


@cache
def compiles() -> bool:
    """Tell whether `mx.compile` does anything: without g++, MLX's CPU backend compiles nothing."""
    load_blas()  # what tests import before this must not decide which BLAS MLX gets
    from openelm_mlx.device import mx

    calls = []
    twice = mx.compile(lambda x: (calls.append(x), x + 1)[1])
    mx.eval(twice(mx.zeros(1)), twice(mx.zeros(1)))
    return len(calls) == 1


def peer(name: str) -> bool:
    from openelm_mlx.benchmarks import peers

    return peers.why_not(name) is None


def writable_home() -> bool:
    """Root is told that it may write anywhere, so a file is made."""
    try:
        with TemporaryFile(dir=Path.home()):
            return True
    except (OSError, RuntimeError):
        return False


def permissions_hold() -> bool:
    """Root may write where nobody may."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        return not os.access(folder, os.W_OK)


OPTIONAL: dict[str, Callable[[], bool]] = {
    "a C++ compiler": compiles,
    "Chromium": lambda: find_chromium() is not None,
    "llama.cpp": lambda: peer("llama.cpp"),
    "torch": lambda: peer("torch"),
    "OpenBLAS": lambda: load_blas().path is not None,
    "a writable home": writable_home,
    "another user than root": permissions_hold,
    "/dev/full": lambda: os.path.exists("/dev/full"),
    "Linux": lambda: sys.platform.startswith("linux"),
    "another system than macOS": lambda: sys.platform != "darwin",
}


def skip_without(item: pytest.Item) -> None:
    """Skip a test that needs what is not here. An unknown name is a mistake of the test."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    both = [name for mark in item.iter_markers("with_or_without") for name in mark.args]
    if unknown := set(names + both) - OPTIONAL.keys():
        pytest.fail(
            f"marked with {sorted(unknown)}; tests/helpers/optional.py knows {list(OPTIONAL)}"
        )
    for name in names:
        if not OPTIONAL[name]():
            pytest.skip(f"wants {name}")


def skipped_line(reasons: Iterable[str]) -> str | None:
    """One line for all that was skipped, as in "15 skipped: 12 want llama.cpp, 3 want Chromium"."""
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    if not counts:
        return None
    said = [
        f"{count} {reason.replace('wants', 'want', 1) if count > 1 else reason}"
        for reason, count in counts.most_common()
    ]
    return f"{sum(counts.values())} skipped: {', '.join(said)}"
