"""Models that many tests use, and what is said of tests that were skipped."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from formats import again
from golden_set import NANO
from kernel_header import precompile
from optional import OPTIONAL, mark_each, marker, skip_without, skipped_line

from openelm_mlx import device, load
from openelm_mlx.convert import activations
from openelm_mlx.engine import loading
from openelm_mlx.engine.hub import resolve_model
from openelm_mlx.engine.loading import Engine

# MLX reads it when it multiplies first; a GPU would multiply float32 in 3 digits
os.environ.setdefault("MLX_ENABLE_TF32", "0")

gpu = device.kind()
if gpu != "cpu":  # the types that a processor computes in: tests ask for equal tokens
    chosen = loading.compute_dtype

    def as_on_a_processor(config, stored, asked, kind, *more):
        return chosen(config, stored, asked, "cpu" if kind == gpu else kind, *more)

    loading.compute_dtype = as_on_a_processor


def pytest_configure(config: pytest.Config) -> None:
    # a shell ignores Ctrl-C for what it starts in the background, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if gpu == "cpu" and not hasattr(config, "workerinput"):
        precompile()
    config.addinivalue_line(
        "markers",
        "needs(*names): skipped where one of these is missing; see tests/helpers/optional.py",
    )
    config.addinivalue_line(
        "markers",
        "with_or_without(*names): holds with and without these; see tests/helpers/optional.py",
    )
    for name in OPTIONAL:
        config.addinivalue_line("markers", f"{marker(name)}: names {name}")


def pytest_itemcollected(item: pytest.Item) -> None:
    mark_each(item)


# files that take longest: they come first, in this order, so that two processes end at about the
# same time
LONGEST = (
    "test_docs.py",
    "test_benchmark_processes.py",
    "test_benchmark_run.py",
    "test_benchmark_cli.py",
    "test_soak.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # no collection of garbage looks at the modules and the tests again


def pytest_runtest_setup(item: pytest.Item) -> None:
    skip_without(item)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    if line := skipped_line(
        report.longrepr[2] for report in reports if isinstance(report.longrepr, tuple)
    ):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def little_to_measure() -> Iterator[None]:
    """Let conversions measure activations on few tokens: hundreds of them are made here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "TOKENS", 16)
        yield


@pytest.fixture(scope="session")
def tiny() -> Engine:
    """The bundled model."""
    return load("openelm-tiny")


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model as a folder whose context holds 64 tokens only."""
    bundled, folder = (
        resolve_model("openelm-tiny").folder,
        tmp_path_factory.mktemp("short") / "short",
    )
    folder.mkdir()
    for path in bundled.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(config | {"max_context_length": 64}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden nano model as a folder of this project."""
    return again(NANO / "checkpoint.pt", tmp_path_factory.mktemp("nano") / "nano")


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Give bytes to the next command as its standard input."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1", newline="\n")
        )

    return give
