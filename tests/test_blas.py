"""Which BLAS is chosen, and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from openelm_mlx import device_settings
from openelm_mlx.device_settings import BlasChoice, choose_blas, load_blas
from openelm_mlx.errors import OptionError


@pytest.mark.parametrize(
    ("wish", "platform", "found", "path"),
    [
        ("auto", "linux", ("a", "b"), "a"),
        ("auto", "linux", (), None),
        ("off", "linux", ("a",), None),
        ("/x.so", "linux", ("a",), "/x.so"),
        ("auto", "darwin", ("a",), None),
    ],
)
def test_choice(wish: str, platform: str, found: tuple[str, ...], path: str | None) -> None:
    assert choose_blas({"OPENELM_BLAS": wish}, platform, found).path == path


@pytest.mark.needs("Linux")
def test_named_library_that_is_missing_is_refused() -> None:
    code = "from openelm_mlx.device_settings import load_blas; load_blas({'OPENELM_BLAS': '/no/such.so'})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert OptionError.__name__ in run.stderr and "give auto, off, or the path" in run.stderr


def test_off_loads_nothing() -> None:
    assert isinstance(load_blas({"OPENELM_BLAS": "off"}), BlasChoice)
    assert load_blas({"OPENELM_BLAS": "off"}).path is None


@pytest.mark.needs("Linux")
@pytest.mark.with_or_without("OpenBLAS")
@pytest.mark.parametrize(
    "names", [device_settings.NAMES, ("libnothing.so",)], ids=["system", "none"]
)
def test_what_came_of_it_before_mlx_is_still_told_after_it(names: tuple[str, ...]) -> None:
    code = f"""
import pathlib
from openelm_mlx import device_settings
device_settings.NAMES = {names}
first = device_settings.load_blas({{}})
import mlx.core
print(device_settings.load_blas({{}}) == first, device_settings.load_blas({{"OPENELM_BLAS": "off"}}).path)
print(device_settings.load_blas({{"OPENELM_BLAS": "/other.so"}}).reason)
print(first.path, "openblas" in pathlib.Path("/proc/self/maps").read_text(), first.reason)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, late, found = run.stdout.splitlines()
    assert told == "True None" and late == "mlx was imported first, too late for another BLAS"
    assert found in (
        f"{names[0]} True found on this system",
        f"{names[-1]} True found on this system",
        "None False no OpenBLAS found; install libopenblas0-pthread",
    )
    assert names == device_settings.NAMES or found.startswith("None")


def test_a_system_library_is_looked_for_unless_told_otherwise() -> None:
    assert choose_blas({}, "linux", ("a",)).path == "a"
