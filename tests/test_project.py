"""Rules of the project that no linter here knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache, partial
from pathlib import Path

import pytest
import yaml
from optional import OPTIONAL, marker, skipped_line

import openelm_mlx

ROOT = Path(__file__).parents[1]
PRODUCT = [
    path
    for folder in ("openelm_mlx", "convert", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# what a module is called on the package index, where its name does not say so
DISTRIBUTIONS = {"llama_cpp": "llama-cpp-python", "yaml": "pyyaml", "google": "protobuf"}
DISTRIBUTIONS |= {"pydantic_core": "pydantic"}  # which requires one version of it


@cache
def text_of(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def imported(path: Path) -> set[str]:
    """Return the top-level names that lines of a file import, scripts in its texts included."""
    pattern = r"^\s*(?:from (\w+)[\w.]* import\b|import (\w+))"
    return {one or other for one, other in re.findall(pattern, text_of(path), re.MULTILINE)}


def required(requirements: list[str]) -> set[str]:
    """Return the names of requirements as the package index writes them."""
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {name.group().lower().replace("_", "-") for name in names if name}


def test_the_product_does_not_assert():
    found = [path for path in PRODUCT if re.search(r"^\s*assert\b", text_of(path), re.MULTILINE)]
    assert not found, f"{found}: `assert` is for tests; raise a child of OpenELMError"


def test_convert_and_benchmarks_are_imported_as_parts_of_the_package():
    assert not [path for path in PRODUCT + TESTS if imported(path) & {"convert", "benchmarks"}]


def test_what_is_imported_is_required():
    known = {"openelm_mlx"} | sys.stdlib_module_names
    everything = required(PROJECT["dependencies"]).union(*map(required, EXTRAS.values()))
    for path in PRODUCT:
        for name in imported(path) - known:
            distribution = DISTRIBUTIONS.get(name, name.lower().replace("_", "-"))
            assert distribution in everything, f"{path} imports {name}; pyproject.toml lacks it"


def test_an_extra_that_a_message_or_a_page_names_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    named = {
        extra
        for path in [*PRODUCT, *TESTS, *pages, ROOT / "Makefile"]
        for words in re.findall(
            r"(?:openelm-mlx|\.)\[([\w,]+)\]'", path.read_text(encoding="utf-8")
        )
        for extra in words.split(",")
    }
    assert {"plot", "grammar"} <= named <= EXTRAS.keys()


def test_the_version_stands_in_one_place():
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "openelm_mlx.__version__"
    }
    others = ["pyproject.toml", "setup.py", "Makefile", "CITATION.cff"]
    for path in [*(ROOT / other for other in others), *WORKFLOWS]:
        assert openelm_mlx.__version__ not in path.read_text(encoding="utf-8"), path


def test_the_source_distribution_leaves_nothing_out():
    if not (ROOT / ".git").exists():
        pytest.skip("wants a clone")
    words = text_of("MANIFEST.in").split()
    always = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    for name in {path.split("/")[0] for path in tracked} - always:
        assert name in words or (name.endswith(".md") and "*.md" in words), name


def test_the_pythons_that_are_promised_are_those_that_are_tested():
    minors = [
        int(found.group(1))
        for line in PROJECT["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    ]
    oldest, newest = min(minors), max(minors)
    assert minors == list(range(oldest, newest + 1))
    assert PROJECT["requires-python"] == f">=3.{oldest}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{oldest}"
    assert f"sys.version_info >= (3, {oldest})" in text_of("Makefile")
    assert f"Python 3.{oldest}+" in text_of("README.md")
    jobs = yaml.safe_load(text_of(".github/workflows/test.yml"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{oldest}", f"3.{newest}"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_limited_and_pin_their_actions(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] in ({}, {"contents": "read"}) and "concurrency" in workflow
    for name, job in workflow["jobs"].items():
        assert "timeout-minutes" in job or "uses" in job, name
    for action in re.findall(r"uses: (?!\./)(.+)", path.read_text(encoding="utf-8")):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_each_optional_thing_is_a_marker(pytestconfig):
    markers = [line.partition(":")[0] for line in pytestconfig.getini("markers")]
    assert {marker(name) for name in OPTIONAL} <= set(markers)
    assert len({marker(name) for name in OPTIONAL}) == len(OPTIONAL)
    assert (marker("a C++ compiler"), marker("/dev/full")) == ("a_c_compiler", "dev_full")


def test_what_was_skipped_is_said_in_one_line():
    reasons = ["Skipped: wants Chromium", "Skipped: wants Linux", "Skipped: wants Chromium"]
    assert skipped_line(reasons) == "3 skipped: 2 want Chromium, 1 wants Linux"
    assert skipped_line([]) is None


# a Python that makes a virtual environment whose pip says a lot, and fails where a file `broken`
# lies
PYTHON = """#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/activate
fi
if [ "$3" = install ]; then
    seq 100
    [ ! -e broken ] || { echo "no such package" >&2; exit 1; }
fi
if [ "$2" = pip ] && [ "$3" = --version ]; then echo "pip 99"; fi
"""


@pytest.mark.parametrize("folder", ["plain", "with a blank"])
def test_make_installs_in_one_line_and_shows_the_end_of_its_log_when_it_fails(folder, tmp_path):
    work = tmp_path / folder
    work.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, work)
    (work / "python").write_text(PYTHON)
    (work / "python").chmod(0o755)
    (work / "broken").touch()
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith("MAKE")
    }  # this may run under make
    words = ["make", "PYTHON=./python", ".venv/installed"]
    make = partial(subprocess.run, words, cwd=work, env=outside, capture_output=True, text=True)
    failed = make()
    lines = failed.stderr.splitlines()
    assert (
        failed.returncode == 2 and lines[0].startswith("installing ") and "no such package" in lines
    )
    assert "installing failed; the whole log is .venv/install.log" in lines and len(lines) < 25
    assert (
        "no such package" in (work / ".venv/install.log").read_text()
        and not (work / ".venv/installed").exists()
    )
    (work / "broken").unlink()
    done = make()
    assert done.returncode == 0 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert (work / ".venv/install.log").read_text().splitlines()[:2] == ["pip 99", "1"]
    (work / ".venv/installed").unlink()
    (
        work / ".venv/bin/activate"
    ).unlink()  # an interrupt between pip and the last scripts of the environment
    assert make().returncode == 0 and (work / ".venv/bin/activate").exists()
    assert "is up to date" in make().stdout
