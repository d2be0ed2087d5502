"""The Python shown in README and docs runs as it stands; the commands shown exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from openelm_mlx.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, capsys):
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    parser = build_parser()
    for block in blocks(page, "console"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            line = line.removeprefix("$ ").strip()
            if line.startswith("openelm "):
                words = shlex.split(line.replace("$(cat ", "(cat "), comments=True)
                assert callable(parser.parse_args(words[1:]).run)
