"""What is set before MLX starts: which BLAS is chosen on Linux, what is set for Metal, and why.

Pure functions decide, so that the choices for Metal are tested where there is no Metal.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest

from openelm_mlx import settings
from openelm_mlx.device import processor_of, wired_limit
from openelm_mlx.errors import OptionError
from openelm_mlx.settings import (
    LIMIT_NAMES,
    LIMITS,
    BlasChoice,
    MetalSettings,
    buffer_limits,
    chip_name,
    choose_blas,
    command_limits,
    gpu_flops,
    load_blas,
    set_buffer_limits,
)


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
    environ = os.environ | {"OPENELM_BLAS": "/no/such.so"}
    code = [sys.executable, "-c", "import openelm_mlx.device"]
    run = subprocess.run(code, env=environ, capture_output=True, text=True, check=False)
    assert OptionError.__name__ in run.stderr and "give auto, off, or the path" in run.stderr


def test_off_loads_nothing() -> None:
    assert isinstance(load_blas({"OPENELM_BLAS": "off"}), BlasChoice)
    assert load_blas({"OPENELM_BLAS": "off"}).path is None


@pytest.mark.needs("Linux")
@pytest.mark.with_or_without("OpenBLAS")
@pytest.mark.parametrize("hidden", [False, True])
def test_what_came_of_it_before_mlx_is_still_told_after_it(hidden: bool) -> None:
    code = f"""
import ctypes, pathlib
real = ctypes.CDLL
def load(name, *mode):
    if {hidden} and "openblas" in name:
        raise OSError("hidden")
    return real(name, *mode)
ctypes.CDLL = load
from openelm_mlx import device, settings
print(
    settings.load_blas({{}}) == device.blas,
    settings.load_blas({{"OPENELM_BLAS": "off"}}).path,
)
print(settings.load_blas({{"OPENELM_BLAS": "/other.so"}}).reason)
loaded = "openblas" in pathlib.Path("/proc/self/maps").read_text()
print(device.blas.path, loaded, device.blas.reason)
"""
    environ = {name: value for name, value in os.environ.items() if name != "OPENELM_BLAS"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    told, late, found = run.stdout.splitlines()
    assert told == "True None" and late == "mlx was imported first, too late for another BLAS"
    missing = "None False no OpenBLAS found; install libopenblas0-pthread"
    assert found in [missing, *(f"{name} True found on this system" for name in settings.NAMES)]
    assert not hidden or found == missing


def test_a_system_library_is_looked_for_unless_told_otherwise() -> None:
    assert choose_blas({}, "linux", ("a",)).path == "a"


@pytest.mark.parametrize("chip", ["Apple M1", "Apple M2 Pro", "Apple M3 Ultra", "Apple M4 Max"])
def test_m1_to_m4_get_longer_command_buffers(chip: str) -> None:
    choice = buffer_limits(chip, {})
    assert choice.values == {"MLX_MAX_OPS_PER_BUFFER": "1000"}  # elements bound memory in prefill
    assert chip in choice.reason and "pull 360" in choice.reason


@pytest.mark.parametrize(
    ("chip", "words"),
    [
        ("Apple M5", "stay on Apple M5: others gained nothing on an M5 Max"),
        ("Apple M5 Max", "pull 358"),
        ("Apple M6", "stay on Apple M6: no others were measured on this chip"),
        ("Apple M10", "MLX's own"),
        ("AMD EPYC", "this is AMD EPYC"),
        ("Intel(R) Core(TM) M3-7Y32", "only Apple's"),
        (None, "this is not an Apple chip"),
    ],
)
def test_other_chips_keep_what_mlx_chooses(chip: str | None, words: str) -> None:
    choice = buffer_limits(chip, {})
    assert choice.values == {} and words in choice.reason and str(choice) == "MLX's own"


@pytest.mark.parametrize("name", LIMIT_NAMES)
@pytest.mark.parametrize("chip", ["Apple M3 Max", "Apple M5"])
def test_what_the_user_has_set_stays_and_is_not_half_replaced(name: str, chip: str) -> None:
    choice = buffer_limits(chip, {name: "20"})
    assert choice.values == {} and f"you have set {name}" in choice.reason


@pytest.mark.parametrize(
    ("chip", "environ", "limits"),
    [
        ("Apple M1", {}, (40, 40 << 20)),
        ("Apple M2 Pro", LIMITS, (1000, 40 << 20)),
        ("Apple M3 Max", LIMITS, (1000, 50 << 20)),
        ("Apple M5 Ultra", {"MLX_MAX_MB_PER_BUFFER": "400"}, (50, 400 << 20)),
        (None, {"MLX_MAX_OPS_PER_BUFFER": "many"}, (40, 40 << 20)),
    ],
)
def test_limits_of_a_command_buffer(
    chip: str | None, environ: dict[str, str], limits: tuple[int, int]
) -> None:
    assert command_limits(chip, environ) == limits


def test_larger_chips_are_assumed_faster_and_others_unknown() -> None:
    names = ("Apple M1", "Apple M4 Pro", "Apple M2 Max", "Apple M3 Ultra")
    speeds = [gpu_flops(name) or 0 for name in names]
    assert speeds[0] == 2 * 6.74e9 * 107.8 and speeds == sorted(speeds)
    assert gpu_flops("Apple A17 Pro") is gpu_flops("Apple M1 pro") is gpu_flops(None) is None


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
    monkeypatch.setattr(settings, "_applied", None)
    monkeypatch.setattr(settings, "chip_name", lambda: "Apple M2 Max")
    monkeypatch.delitem(sys.modules, "mlx.core")
    environ: dict[str, str] = {}
    first = set_buffer_limits(environ)
    assert environ == LIMITS == first.values
    assert set_buffer_limits({"MLX_MAX_OPS_PER_BUFFER": "7"}) is first  # later calls only tell


def test_after_mlx_has_started_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_applied", None)
    monkeypatch.setattr(settings, "chip_name", lambda: "Apple M2 Max")
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
    code = "import os; before = dict(os.environ); import openelm_mlx.engine.loading; "
    code += "print(dict(os.environ) == before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_settings_as_doctor_prints_them() -> None:
    assert str(MetalSettings({"A": "1", "B": "2"})) == "A=1 B=2"


def test_processors_of_one_name_are_told_apart() -> None:
    names = ("vendor_id", "cpu family", "model", "model name", "stepping")
    values = ("AuthenticAMD", "25", "17", "AMD EPYC", "1")
    lines = "\n".join(f"{name}\t: {value}" for name, value in zip(names, values, strict=True))
    assert processor_of(f"{lines}\n\n{lines}") == "AuthenticAMD family 25 model 17 stepping 1"
    assert processor_of("") is None
