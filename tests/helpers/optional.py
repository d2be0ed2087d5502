"""What a machine may have or lack, and how a test says that it depends on it.

`@pytest.mark.needs("Chromium")` is for a test that means nothing without it: it is skipped, and the
last lines of the run say so. `@pytest.mark.with_or_without("OpenBLAS")` is for a test that holds
either way; `.ci/run` runs both kinds once more on a machine that has none of these things.

Each thing is a marker of its own too, so that `pytest -m metal` or `pytest -m "not chromium"`
selects the tests that name it: "a C++ compiler" is `a_c_compiler`.
"""

from __future__ import annotations

import builtins
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import pytest
from browser import find_chromium
from nvrtc import compiles_for_cuda

from openelm_mlx.device import blas, mx


@cache
def compiles() -> bool:
    """Tell whether `mx.compile` does anything: without g++, MLX's CPU backend compiles nothing."""
    calls = []
    twice = mx.compile(lambda x: (calls.append(x), x + 1)[1])
    mx.eval(twice(mx.zeros(1)), twice(mx.zeros(1)))
    return len(calls) == 1


def metal() -> bool:
    """Tell whether MLX computes on the GPU of a Mac."""
    from openelm_mlx import device

    return device.kind() == "metal"


def cuda() -> bool:
    """Tell whether MLX computes on an NVIDIA GPU."""
    from openelm_mlx import device

    return device.kind() == "cuda"


def emulates() -> bool:
    """Tell whether kernels can be emulated: by g++, and in memory that is the processor's."""
    return sys.platform == "linux" and shutil.which("g++") is not None and not cuda()


def peer(name: str) -> bool:
    """Tell whether a benchmark could measure this peer here."""
    from openelm_mlx.benchmarks import peers

    return peers.why_not(name) is None


def find_haproxy() -> str | None:
    """Return where HAProxy is. Debian has it where only root looks."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


def writable_home() -> bool:
    """Tell whether the home takes a file. It is tried, as root is told so of any folder."""
    try:
        with TemporaryFile(dir=Path.home()):
            return True
    except (OSError, RuntimeError):
        return False


def permissions_hold() -> bool:
    """Tell whether a folder without write permission refuses a file. For root it does not."""
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        return not os.access(folder, os.W_OK)


OPTIONAL: dict[str, Callable[[], bool]] = {
    "Metal": metal,
    "CUDA": cuda,
    "NVRTC": compiles_for_cuda,
    "a C++ compiler": compiles,
    "emulated kernels": emulates,
    "libclang": lambda: find_spec("clang") is not None,
    "Chromium": lambda: find_chromium() is not None,
    "langchain-openai": lambda: find_spec("langchain_openai") is not None,
    "llm": lambda: find_spec("llm") is not None,
    "schemathesis": lambda: find_spec("schemathesis") is not None,
    "playwright": lambda: find_spec("playwright") is not None,
    "axe-core": lambda: find_spec("axe_playwright_python") is not None,
    "curl": lambda: shutil.which("curl") is not None,
    "HAProxy": lambda: find_haproxy() is not None,
    "matplotlib": lambda: find_spec("matplotlib") is not None,
    "TensorBoard": lambda: find_spec("tensorboardX") is not None,
    "wandb": lambda: find_spec("wandb") is not None,
    "llguidance": lambda: find_spec("llguidance") is not None,
    "datasets": lambda: find_spec("datasets") is not None,
    "lm-eval": lambda: find_spec("lm_eval") is not None,
    "llama.cpp": lambda: peer("llama.cpp"),
    "cyllama": lambda: find_spec("cyllama") is not None,
    "torch": lambda: peer("torch"),
    "peft": lambda: find_spec("peft") is not None and find_spec("torch") is not None,
    "OpenBLAS": lambda: blas.path is not None,
    "a writable home": writable_home,
    "another user than root": permissions_hold,
    "zensical": lambda: find_spec("zensical") is not None,
    "/dev/full": lambda: os.path.exists("/dev/full"),
    "Linux": lambda: sys.platform.startswith("linux"),
    "another system than macOS": lambda: sys.platform != "darwin",
}


def marker(name: str) -> str:
    """Return the marker that selects the tests which name this thing.

    >>> marker("another user than root")
    'another_user_than_root'
    """
    return re.sub(r"\W+", "_", name).strip("_").lower()


def names_of(item: pytest.Item) -> tuple[list[str], list[str]]:
    """Return what a test needs, and what it holds with and without."""
    needs, both = (
        [name for mark in item.iter_markers(kind) for name in mark.args]
        for kind in ("needs", "with_or_without")
    )
    return needs, both


def mark_each(item: pytest.Item) -> None:
    """Give a test the marker of each thing that it names."""
    for name in {name for names in names_of(item) for name in names} & OPTIONAL.keys():
        item.add_marker(marker(name))


def skip_without(item: pytest.Item) -> None:
    """Skip a test that needs what is not here. An unknown name is a mistake of the test."""
    needs, both = names_of(item)
    if unknown := set(needs + both) - OPTIONAL.keys():
        pytest.fail(
            f"marked with {sorted(unknown)}; tests/helpers/optional.py knows {list(OPTIONAL)}"
        )
    for name in needs:
        if not OPTIONAL[name]():
            pytest.skip(f"wants {name}")


def skipped_line(reasons: Iterable[str]) -> str | None:
    """Return one line for all that was skipped, or None.

    >>> skipped_line(["Skipped: wants Chromium", "Skipped: wants Linux", "Skipped: wants Chromium"])
    '3 skipped: 2 want Chromium, 1 wants Linux'
    """
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    if not counts:
        return None
    said = [
        f"{count} {reason.replace('wants', 'want', 1) if count > 1 else reason}"
        for reason, count in counts.most_common()
    ]
    return f"{sum(counts.values())} skipped: {', '.join(said)}"


def hide(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Let every import of a library fail, as if it were not installed."""
    real = builtins.__import__

    def guarded(name: str, *more: Any) -> Any:
        if name.split(".")[0] == library:
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", guarded)
