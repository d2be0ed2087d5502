"""Which BLAS is chosen, and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from openelm_mlx.blas import BlasChoice, choose_blas, load_blas
from openelm_mlx.errors import OptionError


@pytest.mark.parametrize(("wish", "platform", "found", "path"), [
    ("auto", "linux", ("a", "b"), "a"), ("auto", "linux", (), None), ("off", "linux", ("a",), None),
    ("/x.so", "linux", ("a",), "/x.so"), ("auto", "darwin", ("a",), None)])
def test_choice(wish: str, platform: str, found: tuple[str, ...], path: str | None) -> None:
    assert choose_blas({"OPENELM_BLAS": wish}, platform, found).path == path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_named_library_that_is_missing_is_refused() -> None:
    code = "from openelm_mlx.blas import load_blas; load_blas({'OPENELM_BLAS': '/no/such.so'})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert OptionError.__name__ in run.stderr and "give auto, off, or the path" in run.stderr


def test_off_loads_nothing() -> None:
    assert isinstance(load_blas({"OPENELM_BLAS": "off"}), BlasChoice)
    assert load_blas({"OPENELM_BLAS": "off"}).path is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_what_was_loaded_before_mlx_is_still_told_after_it() -> None:
    code = """
import sys
from openelm_mlx.blas import load_blas
first = load_blas({})
import mlx.core
print(load_blas({}) == first, load_blas({"OPENELM_BLAS": "off"}).path, load_blas({"OPENELM_BLAS": "/other.so"}).reason)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True None mlx was imported first, too late for another BLAS\n"


def test_a_system_library_is_looked_for_unless_told_otherwise() -> None:
    assert choose_blas({}, "linux", ("a",)).path == "a"
