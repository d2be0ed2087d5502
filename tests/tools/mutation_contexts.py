"""A pytest plugin for mutation.py: it tells coverage what test runs and what fixture is made."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import coverage
import pytest

contexts = [""]  # the innermost last
tests: dict[str, dict[str, Any]] = {}


def switch(context: str) -> None:
    if (measuring := coverage.Coverage.current()) is not None:
        measuring.switch_context(context)


def within(context: str) -> Generator[None, Any, Any]:
    contexts.append(context)
    switch(context)
    try:
        return (yield)
    finally:
        contexts.pop()
        switch(contexts[-1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    used = getattr(item, "fixturenames", [])
    tests[item.nodeid] = {"fixtures": used, "seconds": 0.0, "passed": True}
    return (yield from within(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, Any]:
    """Count what one test makes for many as executed by all of them."""
    shared = fixturedef.scope != "function"
    return (yield from within(f"fixture {fixturedef.argname}" if shared else contexts[-1]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = tests[report.nodeid]
    test["seconds"] += report.duration
    test["passed"] = test["passed"] and report.passed


def pytest_sessionfinish() -> None:
    (Path(os.environ["MUTATION_FOLDER"]) / "tests.part").write_text(json.dumps(tests))
