"""Rules of the project that no linter here knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("openelm_mlx", "convert", "benchmarks", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_assert_in_the_package_and_no_import_by_folder_name(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    if "tests" not in path.parts:
        assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    assert not [name for name in names if name.split(".")[0] in ("convert", "benchmarks")]


def test_every_package_is_listed_for_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for init in [*ROOT.glob("openelm_mlx/**/__init__.py"), *ROOT.glob("convert/**/__init__.py"),
                 *ROOT.glob("benchmarks/**/__init__.py")]:
        name = ".".join(init.parent.relative_to(ROOT).parts)
        assert f'"{name if name.startswith("openelm_mlx") else "openelm_mlx." + name}"' in listed
