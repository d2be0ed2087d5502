"""`openelm doctor --full` runs to its end, says what is wrong, and writes nobody's names down."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from openelm_mlx.benchmarks import doctor
from openelm_mlx.benchmarks.doctor import Sections, impersonal, self_test, steps
from openelm_mlx.benchmarks.doctor.paths import LIMITS, Case, Maker, cases, compared, on_cpu
from openelm_mlx.benchmarks.results.document import load
from openelm_mlx.cli import main
from openelm_mlx.device import kind, mx
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.kernels.kernel import ALL, NAMES, Choice, running
from openelm_mlx.model.kernels.self_check import forget

pytestmark = pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")

SMALL = OpenELMConfig(num_transformer_layers=2, model_dim=64, head_dim=64, vocab_size=64)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave little of each section, so that the test of all of them is short."""
    monkeypatch.setattr(self_test, "WAYS", self_test.WAYS[3:4])
    monkeypatch.setattr(steps, "LONG", 600)
    monkeypatch.setattr(steps, "SHORT", 8)
    monkeypatch.setattr(steps, "SLOTS", (256,))
    monkeypatch.setattr(steps, "timed_config", lambda: ("a small model", SMALL))
    few = list(cases(quick=True))[::4]
    monkeypatch.setattr("openelm_mlx.benchmarks.doctor.paths.cases", lambda quick: few)


def personal(text: str) -> list[str]:
    """Return what of this person, machine and its folders stands in a text."""
    names = {os.path.basename(os.path.expanduser("~")), platform.node(), str(Path.cwd())}
    folders = re.findall(r"(?<![\w.])/[a-z]+/[^\"\s]*", text)
    return [name for name in names - {"root", ""} if name in text] + folders


def test_all_sections_run_and_become_one_file(short, tmp_path, capsys, monkeypatch):
    (tmp_path / "of-jane").mkdir()
    monkeypatch.chdir(tmp_path)
    file = Path("of-jane/mine.json")
    arguments = ["doctor", "--full", "--quick", "--output", str(file)]
    monkeypatch.setattr("sys.argv", ["openelm", *arguments])
    status = main(arguments)
    printed, said = capsys.readouterr()
    document = load(file)
    assert document.command == "openelm doctor --full --quick"
    found = document.first_run
    assert found is not None and not document.partial and found.quick
    assert status == 1 - found.ok and (found.ok or kind() != "cpu")
    assert found.paths and found.ways and found.decoded and found.read and found.buffers
    assert found.costs.dispatch_seconds is not None and found.costs.dispatch_seconds < 0.1
    assert {*found.costs.gemv_bytes_per_second} > {"8 bits", "4 bits"}
    assert all(0 <= share <= 1 for one in found.decoded for share in one.in_place)
    assert personal(file.read_text(encoding="utf-8")) == []
    assert "written to" in said and f" of {len(found.paths)} paths" in printed
    assert "the CPU itself: there is no GPU here" in printed or kind() != "cpu"
    assert main(["benchmark", "--show", str(file)]) == 0
    assert capsys.readouterr().out == printed
    assert main(["doctor", "--full", "--output", str(file)]) == 2
    assert "mine.json exists already" in capsys.readouterr().err


def test_what_was_measured_before_a_fault_is_in_a_file_of_its_own(short, tmp_path, monkeypatch):
    """A fault of the GPU ends the process; here a section ends the command."""

    def fault(sections: Sections) -> None:
        raise SystemExit(9)

    monkeypatch.setattr(Sections, "kernels", fault)
    file, part = tmp_path / "mine.json", tmp_path / "mine.json.part"
    with pytest.raises(SystemExit, match="9"):
        main(["doctor", "--full", "--quick", "--output", str(file)])
    kept = load(part)
    assert kept.partial and kept.first_run is not None and kept.first_run.ways
    assert not file.exists()
    assert main(["doctor", "--full", "--output", str(file)]) == 2


def test_what_fails_is_written_down_and_ctrl_c_keeps_the_rest(tmp_path, capsys, monkeypatch):
    def fails(run: Any) -> Iterator[Any]:
        here = f"{os.path.expanduser('~')}/secret/kernel.metal"
        raise RuntimeError(f"cannot build {here} on {platform.node()}")
        yield

    def one_way(run: Any) -> Iterator[Any]:
        yield compared(Case("a way", lambda x: x, [mx.ones(3)], 0))

    def interrupted(run: Any) -> Iterator[Any]:
        yield "dispatch_seconds", 2e-6
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "SECTIONS", {"paths": 1, "ways": 1, "costs": 1, "read": 1})
    for name, section in (("paths", fails), ("ways", one_way), ("costs", interrupted)):
        monkeypatch.setattr(doctor.Sections, name, section)
    monkeypatch.setattr(doctor.Sections, "__getattr__", lambda run, name: [], raising=False)
    file = tmp_path / "mine.json"
    assert main(["doctor", "--full", "--output", str(file), "--json"]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text(encoding="utf-8")) and found["partial"]
    failures = found["first_run"]["failures"]
    assert re.fullmatch(r"RuntimeError: cannot build kernel.metal on \S+", failures["paths"])
    assert failures["costs"].startswith("interrupted") and "read" not in failures
    assert personal(json.dumps(found)) == []
    assert found["first_run"]["costs"]["dispatch_seconds"] == 2e-6
    assert [one["name"] for one in found["first_run"]["ways"]] == ["a way"]


def test_what_was_measured_is_printed_where_another_has_made_the_file(
    tmp_path, capsys, monkeypatch
):
    file = tmp_path / "mine.json"

    def another(run: Any) -> Iterator[Any]:
        file.write_text("another's")
        yield "dispatch_seconds", 3e-6

    monkeypatch.setattr(doctor, "SECTIONS", {"costs": 1})
    monkeypatch.setattr(doctor.Sections, "costs", another)
    assert main(["doctor", "--full", "--output", str(file)]) == 2
    printed, said = capsys.readouterr()
    assert "the one before it 3.00 us" in printed and file.read_text() == "another's"
    assert "mine.json exists already" in said and "written to" not in said


def once(other: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return a function that is `other` the first time, on the device, and then the identity."""
    calls: list[int] = []

    def run(x: mx.array) -> mx.array:
        calls.append(1)
        return other(x) if len(calls) == 1 else x

    return run


@pytest.mark.parametrize(
    ("other", "off"),
    [
        (lambda x: x, 0),
        (lambda x: x + 0.25 * (mx.arange(4) == 1), 0.125),
        (lambda x: mx.where(mx.arange(4) == 1, mx.nan, x), 1e30),
    ],
)
def test_a_path_is_judged_by_the_largest_difference(other, off):
    found = compared(Case("here", once(other), [mx.array([0.5, -2.0, 1.0, 0.0])], 1e-3))
    assert found.off == off and found.ok == (off == 0) and found.first_seconds is not None


def test_other_results_of_a_path():
    ids = compared(Case("ids", once(lambda x: x + (x == 3)), [mx.array([1, 2, 3, 4])], 0))
    assert ids.off == 0.25 and not ids.ok
    broken = compared(Case("broken", lambda x: x @ x, [mx.ones((2, 3))], 0))
    assert broken.off is None and not broken.ok and "ValueError" in (broken.error or "")


def test_what_is_compared_with_runs_no_kernel_of_ours():
    def launched(*launch: Any) -> Any:
        raise AssertionError("a processor cannot launch a kernel")

    drawn = [case for case in cases(quick=True) if case.name.startswith("draw")]
    _, exact = self_test.models(None, 4)
    with running(launched):
        assert len(self_test.reference(exact, [1, 2, 3], 2, 100)) == 2
        assert len(on_cpu(drawn[-1].run.args[0], drawn[-1].arrays)) == 1  # the draw itself


def test_every_path_has_a_name_of_its_own():
    names = []
    for dtype, limit in LIMITS.items():
        make = Maker(dtype, limit, quick=False)
        made = [*make.heads(64, 12, 3), *make.attention(128, 24, 6), *make.products(64, 32)]
        names += [case.name for case in made]
    assert len(names) == len(set(names)) > 60


def test_steps_are_not_timed_with_kernels_that_failed_their_check(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path))
    monkeypatch.setattr(steps, "choice", lambda: Choice(frozenset(NAMES)))
    wrong = {"attend"}
    monkeypatch.setattr(steps, "check_of", lambda name: "differs" if name in wrong else "")
    assert steps.kernel_sets()["all"] == {*ALL} - wrong
    wrong |= {"store_and_attend"}
    forget()
    assert steps.kernel_sets() == {"in use": frozenset(NAMES), "none": frozenset()}


def test_a_buffer_that_was_copied_is_seen():
    one = steps.Stepper(steps.random_model(SMALL, None), 256, ahead=False)
    seen = []
    for _ in range(6):  # a thread of MLX may still hold what it has just read
        seen.append(steps.addresses(one.state))
        one.run(1)
    assert any(a == b for a, b in pairwise(seen))
    held = one.state
    one.run(1)
    assert not set(steps.addresses(one.state)) & set(steps.addresses(held))


def test_names_and_folders_are_taken_out():
    home = os.path.expanduser("~")
    assert impersonal(f"cannot open {home}/models/a.json: gone") == "cannot open a.json: gone"
    assert impersonal("'/private/var/x/y.metal', line 3") == "'y.metal', line 3"
    assert impersonal("2 tokens/s and 1/2") == "2 tokens/s and 1/2"
    host = platform.node().split(".")[0]
    assert host in ("", "localhost") or host not in impersonal(f"on {host}: no")


@pytest.mark.parametrize("flag", ["--quick", "--output"])
def test_flags_of_full_are_refused_without_it(flag, capsys):
    values = ["x.json"] if flag == "--output" else []
    assert main(["doctor", flag, *values]) == 2
    assert f"{flag} changes what --full does; give --full too" in capsys.readouterr().err
