"""Rules of the project that no linter here knows."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from optional import skipped_line

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("openelm_mlx", "convert", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_in_the_package_and_no_import_by_folder_name(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    if "tests" not in path.parts:
        assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    ]
    assert not [name for name in names if name.split(".")[0] in ("convert", "benchmarks")]


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
