"""What is set for Metal before MLX starts: decided by pure functions, so testable where there is no
Metal.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest

from openelm_mlx import device_settings
from openelm_mlx.device_settings import (
    LIMITS,
    MetalSettings,
    buffer_limits,
    chip_name,
    set_buffer_limits,
    wired_limit,
)


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M2 Pro", "Apple M3 Ultra", "Apple M4 Max"])
def test_m1_to_m4_get_longer_command_buffers(chip: str) -> None:
    choice = buffer_limits(chip, {})
    assert choice.values == {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}
    assert chip in choice.reason and "4521" in choice.reason


@pytest.mark.parametrize(
    ("chip", "words"),
    [
        ("Apple M5", "stay on Apple M5: others gained nothing on an M5 Max"),
        ("Apple M5 Max", "pull 358"),
        ("Apple M6", "stay on Apple M6: no others were measured on this chip"),
        ("Apple M10", "MLX's own"),
        ("AMD EPYC", "this is AMD EPYC"),
        ("Intel(R) Core(TM) M3-7Y32", "only Apple's"),
        (None, "no Apple chip"),
    ],
)
def test_other_chips_keep_what_mlx_chooses(chip: str | None, words: str) -> None:
    choice = buffer_limits(chip, {})
    assert choice.values == {} and words in choice.reason and str(choice) == "MLX's own"


@pytest.mark.parametrize("name", LIMITS)
def test_what_the_user_has_set_stays_and_is_not_half_replaced(name: str) -> None:
    choice = buffer_limits("Apple M3 Max", {name: "20"})
    assert choice.values == {} and f"you have set {name}" in choice.reason


@pytest.mark.parametrize(
    ("recommended", "system", "expected"),
    [
        (22_906_503_168, "15.0", 22_906_503_168),
        (22_906_503_168, "26.1", 22_906_503_168),
        (22_906_503_168, "14.7", None),
        (None, "15.0", None),
        (0, "15.0", None),
        (1, "", None),
    ],
)
def test_wired_limit_needs_metal_and_macos_15(
    recommended: int | None, system: str, expected: int | None
) -> None:
    assert wired_limit(recommended, system) == expected


def test_limits_go_into_the_environment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_settings, "_applied", None)
    monkeypatch.setattr(device_settings, "chip_name", lambda: "Apple M2 Max")
    monkeypatch.delitem(sys.modules, "mlx.core")
    environ: dict[str, str] = {}
    first = set_buffer_limits(environ)
    assert environ == LIMITS == first.values
    assert set_buffer_limits({"MLX_MAX_OPS_PER_BUFFER": "7"}) is first  # later calls only tell


def test_after_mlx_has_started_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_settings, "_applied", None)
    monkeypatch.setattr(device_settings, "chip_name", lambda: "Apple M2 Max")
    environ: dict[str, str] = {}
    assert "too late" in set_buffer_limits(environ).reason and environ == {}


class Libc:
    """The call of macOS that tells the processor's name: its size first, then the name itself."""

    def __init__(self, failed: int) -> None:
        self.failed = failed

    def sysctlbyname(self, key: bytes, name: Any, size: Any, new: None, length: Any) -> int:
        assert (key, new, length.value) == (b"machdep.cpu.brand_string", None, 0)
        size._obj.value = len("Apple M2 Max") + 1
        if name is not None:
            name.value = b"Apple M2 Max"
        return self.failed


@pytest.mark.parametrize(("failed", "expected"), [(0, "Apple M2 Max"), (-1, None)])
def test_the_chip_as_macos_names_it(
    monkeypatch: pytest.MonkeyPatch, failed: int, expected: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libc(failed))
    assert chip_name() == expected


@pytest.mark.needs("another system than macOS")
def test_no_chip_and_no_setting_off_macos() -> None:
    assert chip_name() is None
    code = "import os; before = dict(os.environ); import openelm_mlx.engine.loading; print(dict(os.environ) == before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_settings_as_doctor_prints_them() -> None:
    assert str(MetalSettings({"A": "1", "B": "2"})) == "A=1 B=2"
