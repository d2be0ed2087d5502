"""Kernels are compared with their twins on first use, and the verdicts are remembered."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import mlx.core as mx
import pytest
from metal_emulator import Emulator

from openelm_mlx.model.kernels import kernel as kernels
from openelm_mlx.model.kernels.kernel import (
    ALL,
    Kernel,
    check_of,
    in_use,
    running,
    twins,
)
from openelm_mlx.model.kernels.self_check import (
    ATTEMPTS,
    UNFINISHED,
    difference,
    forget,
    memory_path,
    noise,
    remember,
    remembered,
    subject,
    wrong_kernels,
)

SOURCE = "uint i = thread_position_in_grid.x; y[i] = x[i] + x[i];"
DOUBLE = Kernel("double", ("x",), ("y",), SOURCE)


def doubled(kernel: Kernel, x: mx.array) -> mx.array:
    if not in_use(kernel):
        return x + x
    size = (x.size, 1, 1)
    return kernel(x, grid=size, threadgroup=size, shapes=[x.shape], dtypes=[x.dtype])[0]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    yield


@pytest.fixture
def kernel_file(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a kernel of this source where the files of kernels are."""

    def put(source: str) -> None:
        def check() -> str:
            x, kernel = noise(0, (32,), mx.float32), replace(DOUBLE, source=source)
            mine = doubled(kernel, x)
            with twins():
                return difference([mine], [doubled(kernel, x)])

        module = ModuleType("double")
        module.check = check  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "openelm_mlx.model.kernels.double", module)

    return put


@pytest.mark.needs("emulated kernels")
def test_a_right_kernel_passes_and_a_broken_one_is_told_by_what_differs(kernel_file) -> None:
    with running(Emulator(), frozenset()):
        kernel_file(SOURCE)
        assert wrong_kernels(["double"], check_of) == {}
        forget()
        kernel_file(SOURCE.replace("x[i] + x[i]", "x[i] + x[0]"))
        found = wrong_kernels(["double"], check_of)
        assert "its output differs from its twin's by" in found["double"]
        forget()
        kernel_file(SOURCE.replace("y[i]", "y[i + 1]"))
        assert "access outside a buffer" in wrong_kernels(["double"], check_of)["double"]
        assert not in_use(DOUBLE)  # what the block had before


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("name", ALL)
def test_each_kernel_passes_its_own_check(name: str) -> None:
    with running(Emulator()):
        assert check_of(name) == ""


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        (
            "add_rms_norm",
            "total / float(D)",
            "total",
            "bfloat16: output 1 differs from its twin's by",
        ),
        (
            "store_and_attend",
            "head % sharing == 0",
            "head % sharing > 0 && head > 1",
            "output 1 differs from its twin's",
        ),
    ],
)
def test_a_check_tells_a_broken_kernel(name: str, right: str, wrong: str, said: str) -> None:
    emulator = Emulator()

    def run(kernel, inputs, launch):
        source = kernel.source.replace(right, wrong)
        assert source != kernel.source
        return emulator(replace(kernel, source=source), inputs, launch)

    with running(run):
        assert said in check_of(name)


@pytest.mark.parametrize("name", ALL)
def test_each_kernels_check_sees_one_that_computes_nothing(name: str) -> None:
    def nothing(kernel, inputs, launch):
        pairs = zip(launch.shapes, launch.dtypes, strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in pairs]

    with running(nothing, frozenset()):
        assert "differs" in wrong_kernels([name], check_of)[name]


def test_a_kernel_that_cannot_be_launched_is_left_to_its_twin(kernel_file) -> None:
    def fail(kernel, inputs, launch):
        raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: ...")

    kernel_file(SOURCE)
    with running(fail, frozenset()):
        why = "its check failed: [metal::Device] Unable to build metal library from source"
        assert wrong_kernels(["double"], check_of) == {"double": why}


def test_verdicts_are_remembered_until_what_they_are_about_changes() -> None:
    asked = []

    def check(name: str) -> str:
        asked.append(name)
        left = remembered(subject())[name]  # if the process ended now
        assert left == f"{UNFINISHED} (process {os.getpid()}, attempt 1)"
        return "differs" if name == "b" else ""

    for _ in range(2):
        assert wrong_kernels(["a", "b"], check) == {"b": "differs"}
        assert asked == ["a", "b"]
    newer = {**subject(), "kernels": "another"}
    remember(newer, "a", "")
    remember(newer, "b", UNFINISHED)
    assert wrong_kernels(["a", "b"], check, newer) == {"b": UNFINISHED} and len(asked) == 2
    assert wrong_kernels(["a"], check) == {} and len(asked) == 3
    forget()
    assert not memory_path(subject()).exists()


def test_who_interrupts_a_check_does_not_lose_the_kernel() -> None:
    def interrupted(name: str) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrong_kernels(["a"], interrupted)
    assert wrong_kernels(["a"], lambda name: "differs") == {"a": "differs"}


def test_what_another_process_is_checking_is_checked_here_too() -> None:
    """Else this process would be without the kernel to its end; two that died are believed."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for process, runs in ((os.getppid(), True), (1, True), (ended.pid, False), (1 << 70, False)):
        left = f"{UNFINISHED} (process {process}, attempt {ATTEMPTS})"
        remember(subject(), "a", left)
        assert wrong_kernels(["a"], lambda name: "") == ({} if runs else {"a": left})


def test_a_check_that_ended_the_process_is_made_once_more_and_then_never() -> None:
    tries = []

    def killed(name: str) -> str:
        tries.append(remembered(subject())[name])
        raise SystemExit  # which takes the mark back; a process that is killed leaves it

    for _ in range(ATTEMPTS + 1):
        with contextlib.suppress(SystemExit):
            wrong_kernels(["a"], killed)
        if tries:
            remember(subject(), "a", tries[-1].replace(str(os.getpid()), str(1 << 70)))
    assert [text[-2] for text in tries] == ["1", "2"]
    forget()
    assert wrong_kernels(["a"], killed)["a"].startswith(UNFINISHED) and len(tries) == ATTEMPTS


def test_a_check_that_never_ended_survives_what_doctor_forgets() -> None:
    gone = f"{UNFINISHED} (process {1 << 70}, attempt {ATTEMPTS})"
    for name, verdict in (("a", "differs"), ("b", gone), ("c", "")):
        remember(subject(), name, verdict)
    forget()
    asked: list[str] = []

    def check(name: str) -> str:
        asked.append(name)
        return ""

    assert wrong_kernels("abc", check) == {"b": gone} and asked == ["a", "c"]


def test_a_process_leaves_what_another_one_has_found_meanwhile() -> None:
    def check(name: str) -> str:
        remember(subject(), "b", "")  # by the process that was checking it
        return ""

    remember(subject(), "b", UNFINISHED)
    assert wrong_kernels(["a", "b"], check) == {"b": UNFINISHED}
    assert remembered(subject()) == {"a": "", "b": ""}


def test_a_damaged_or_unwritable_memory_only_costs_another_check(monkeypatch, tmp_path) -> None:
    assert wrong_kernels(["a"], lambda name: "") == {}
    for content in ("{", '{"about": 3, "verdicts": []}', '{"verdicts": {"a": "old"}}'):
        memory_path(subject()).write_text(content)
        assert wrong_kernels(["a"], lambda name: "differs") == {"a": "differs"}
        forget()
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "file"))
    assert wrong_kernels(["a"], lambda name: "") == {}
    assert wrong_kernels(["a"], lambda name: "differs") == {"a": "differs"}
    forget()


def test_the_first_use_checks_even_inside_a_trace(monkeypatch) -> None:
    """A GPU is pretended; what its kernels do is not asked here."""
    checked = []

    def check(name: str) -> str:
        checked.append(name)
        return difference([noise(1, (4,), mx.float16)], [noise(1, (4,), mx.float16)])

    monkeypatch.setattr(kernels, "kind", lambda: "metal")
    monkeypatch.setattr(kernels, "check_of", check)
    kernels.choice.cache_clear()
    mine = Kernel("sample", (), (), "")
    with mx.stream(mx.cpu):  # where a check would fail, and be remembered
        assert not in_use(mine) and not checked
    monkeypatch.setattr(kernels, "on_processor", lambda: False)
    try:
        step = mx.compile(lambda x: x + 1 if in_use(mine) else x)
        assert step(mx.array(1)).item() == 2
        assert sorted(checked) == sorted(kernels.NAMES)
        kernels.choice.cache_clear()
        monkeypatch.setenv("OPENELM_KERNELS", "off")
        assert not in_use(mine) and len(checked) == len(kernels.NAMES)
    finally:
        kernels.choice.cache_clear()


def test_a_difference_is_told_in_units_of_the_type() -> None:
    one = mx.ones((8,), mx.bfloat16)
    assert difference([one], [one + 2 * mx.finfo(mx.bfloat16).eps]) == ""
    assert "by 0.031, the largest value is 1" in difference([one + 0.03125], [one])
    assert "infinite or not a number" in difference([one * mx.nan], [one])
    assert difference([one * -mx.inf], [one * -mx.inf]) == ""
    assert "output 1 differs from its twin's at 1 of 2 places" in difference(
        [one, mx.array([1, 2])], [one, mx.array([1, 3])]
    )
    assert "float16 (8,), its twin's" in difference([one.astype(mx.float16)], [one])
