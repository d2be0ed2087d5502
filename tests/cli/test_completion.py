"""What is generated from the parsers: completion scripts and the manual page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from openelm_mlx.cli import COMMANDS, SHELLS, actions, build_parser, main

ROOT = Path(__file__).parents[2]
PARSER = build_parser()
OPTIONS = sorted({name for action in actions(PARSER) for name in action.option_strings})


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    # fish has "-l max-tokens" for --max-tokens
    missing = [name for name in OPTIONS if name.lstrip("-") not in script]
    assert missing == []


def test_bash_offers_the_commands_and_the_options_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    main(["completion", "bash"])
    (tmp_path / "openelm.bash").write_text(capsys.readouterr().out, encoding="utf-8")

    def offered(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f"source {tmp_path / 'openelm.bash'}\n"
            f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}\n"
            "$(complete -p openelm | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
            "printf '%s\\n' \"${COMPREPLY[@]}\""
        )
        command = [bash, "-c", script]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return run.stdout.split()

    assert offered("openelm", "ch") == ["chat"]
    assert set(offered("openelm", "inspect", "--")) == {"--help", "--json", "--adapter"}
    assert offered("openelm", "generate", "--max-t") == ["--max-tokens"]
    # what is a file's name is completed by those that are there
    for words in (["chat"], ["chat", "--system-file"], ["finetune", "a"], ["convert", "a", "-o"]):
        assert offered("openelm", *words, "openelm.b") == ["openelm.bash"], words


def test_the_manual_page_says_what_help_says() -> None:
    """The words are compared, not the bytes: versions of Python lay usage lines out differently."""
    page = (ROOT / "packaging" / "openelm.1").read_text(encoding="utf-8")
    for code in (r"\fB", r"\fR", r"\fI"):
        page = page.replace(code, "")
    plain = " ".join(page.replace("\\-", "-").replace("\\\\", "\\").split())
    wrong = "run `python packaging/manual.py`"
    in_page = set(re.findall(r"(?<![\w-])--[a-z][a-z\d-]*[a-z\d]", plain))
    assert in_page == {name for name in OPTIONS if name.startswith("--")} - {"--help"}, wrong
    assert page.count("\n.nf\nusage: ") == page.count("\nusage: ") > len(COMMANDS)
    for action in actions(PARSER):
        if action.help and action.option_strings and action.dest != "help":
            assert " ".join(action.help.split()) in plain, f"{action.option_strings}: {wrong}"
