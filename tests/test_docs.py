"""The Python in README and docs runs as it stands, commands exist, figures are the measured
ones.
"""

from __future__ import annotations

import codecs
import json
import plistlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from readme_table import RESULTS, filled

from openelm_mlx.benchmarks.measure import machine, suites
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / RESULTS / "README.md"])
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


# Commands that are run elsewhere: by make and CI, or by nobody but the user.
ELSEWHERE = ("make", "pip", ".venv/bin/pip", "uv", "uvx", "pipx", "brew", "apt", ".", "man")
ELSEWHERE += ("haproxy", "curl")


def console_lines(page: Path) -> list[str]:
    """The command lines of a page: what follows `$ ` in a console block, or all lines of one
    without any.
    """
    found = []
    for block in blocks(page, "console"):
        lines = re.sub(r"\\\n", " ", block).splitlines()
        prompts = [line for line in lines if line.lstrip().startswith("$ ")]
        found += [line.strip().removeprefix("$ ") for line in prompts or lines if line.strip()]
    return found


def parsed(line: str) -> list[tuple[list[str], str]]:
    """The commands of a line of shell, each with its standard input.

    That is a text, or "<NAME" for a file; variables before a command are left out.
    """
    words = shlex.shlex(line, posix=True, punctuation_chars=True)
    words.whitespace_split = True
    commands: list[tuple[list[str], str]] = [([], "")]
    for word in words:
        command, text = commands[-1]
        if word == "|":
            fed = codecs.decode(command[1], "unicode_escape") if command[0] == "printf" else ""
            commands[-1:] = [([], fed)] if command[0] == "printf" else [commands[-1], ([], "")]
        elif word in (";", "&&"):
            commands.append(([], ""))
        elif word == "<":
            commands[-1] = command, "<" + next(words)
        elif word in (">", ">>"):
            next(words)
        elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):
            command.append(word)
    return [one for one in commands if one[0]]


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=named)
def test_python_runs(page, capsys):
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.strip()


def good(command: list[str]) -> tuple[int | None, ...]:
    """The statuses of a command that did its work; a comparison may find the second run slower."""
    return (0, None, 1) if "--compare" in command else (0, None)


CONSOLE = [page for page in PAGES if console_lines(page)]


def commands_of(page: Path) -> list[tuple[list[str], str]]:
    """Return the commands of a page that are run here, each with its standard input."""
    commands = []
    for command, text in (one for line in console_lines(page) for one in parsed(line)):
        if command[0] in ("openelm", "python"):
            commands.append((command, text or "Hello!\n"))
        else:
            assert command[0] in ELSEWHERE, command
    return commands


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What became of every command of the pages that are asked about, run in one process."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [spec.params["page"] for spec in callspecs if spec and "page" in spec.params]
    pages = {named(page): commands_of(page) for page in CONSOLE if page in asked}
    folder = tmp_path_factory.mktemp("documented")
    runner = [sys.executable, ROOT / "tests" / "helpers" / "documented.py", folder]
    done = subprocess.run(runner, input=json.dumps(pages), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("page", CONSOLE, ids=named)
def test_commands_run(page, outcomes):
    """Every command of a page, in its order, with stand-ins for what it would download."""
    failed = [one for one in outcomes[named(page)] if one["status"] not in good(one["command"])]
    assert not failed, "\n".join(f"{' '.join(one['command'])}: {one['err']}" for one in failed)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_launchd_starts_a_server_and_lets_it_end():
    from openelm_mlx.cli import build_parser
    from openelm_mlx.server.options import ServerOptions

    (text,) = blocks(ROOT / "docs" / "serving.md", "xml")
    job = plistlib.loads(text.encode())
    program, *words = job["ProgramArguments"]
    assert Path(program).is_absolute() and build_parser().parse_args(words).models
    assert job["ExitTimeOut"] > ServerOptions.grace and job["RunAtLoad"]


def test_files_that_a_page_names_exist():
    folders = [ROOT, ROOT / "openelm_mlx"]
    tops = "openelm_mlx|convert|benchmarks|tests|packaging|docs|engine|model|evaluate|finetune|cli"
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(rf"(?<![\w./-])(?:{tops})/[\w./-]*\w", text):
            assert any((folder / path).exists() for folder in folders), f"{page.name}: {path}"


def test_modules_have_moved_to_where_the_changelog_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  \| `.*? \| (.*) \|$", text.split("\n## [")[1], re.MULTILINE)
    moved = re.findall(r"`(openelm_mlx[\w.]*)`((?:, `\.\w+`)*)", "\n".join(rows))
    for module, others in moved:
        package = module.rpartition(".")[0]
        for name in [module, *(package + other for other in re.findall(r"\.\w+", others))]:
            assert find_spec(name), name
    assert len(moved) > 5


def test_messages_of_the_page_on_troubleshooting_are_those_of_the_program():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    heads = re.findall(r"^\| [^|]*?`([^`|]+)`[^|]* \|", page.partition("## ")[0], re.MULTILINE)
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("openelm_mlx", "convert")
        for path in (ROOT / folder).rglob("*.py")
    )
    parts = [part.strip() for head in heads for part in head.split("...") if len(part.strip()) > 3]
    assert len(parts) > 7
    assert [part for part in parts if part not in source] == []


def test_every_page_is_in_the_site():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r"[\w.-]+\.md", nav)) == sorted(
        p.name for p in (ROOT / "docs").glob("*.md")
    )


@pytest.mark.needs("zensical")
def test_the_site_builds_without_a_warning_and_names_no_other_host(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("packaging", "openelm_mlx", "convert", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    run = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    index = (tmp_path / "build/site/index.html").read_text(encoding="utf-8")
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", index)
    assert loaded == []


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example, capsys, monkeypatch):
    monkeypatch.setattr(machine, "COPIED", 2**22)  # bytes whose copy tells the bandwidth
    monkeypatch.setattr(suites.Suite, "trials_of_a_process", 2)
    if example.stem == "constrain":
        pytest.importorskip("llguidance")
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_figures_are_those_of_the_result_files():
    assert filled(README) == README, "`python tests/tools/readme_table.py` writes what is right"


def test_result_files_read_as_they_say():
    from openelm_mlx.benchmarks.results.document import load
    from openelm_mlx.benchmarks.results.tables import markdown

    for file in (ROOT / RESULTS).glob("*.json"):
        assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(load(file)), (
            f"run `openelm benchmark --show {file.name} --markdown {file.stem}.md`"
        )


def test_every_column_of_a_result_is_explained():
    from openelm_mlx.benchmarks.results.tables import COLUMNS

    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    explained = re.findall(r"\*\*([^*]+?)\.?\*\*", text.partition("## Read")[2])
    for head, _ in COLUMNS.values():
        assert re.sub(r" (t/s|ms|s|MB|nats)$", "", head) in explained, head


def test_the_gain_of_calibration_is_that_of_the_table():
    table = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    table = table.partition("## What it gained")[2].partition("On OpenELM Nano")[0]
    left = re.findall(r"^\| \S+ \| `--target-bpw --calibrate .* (\S+) \|$", table, re.MULTILINE)
    shares = sorted(map(float, left))
    assert len(shares) == 6
    assert f"{shares[0]:.2f} to {shares[-1]:.2f} of the loss of uniform quantization" in PROSE


def test_kernels_are_those_of_the_ledger_shown():
    ledger = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    counts = dict.fromkeys(re.findall(r"^all +(\d+) +(\d+) +(\d+)$", ledger, re.MULTILINE))
    (ours, _, theirs), (ours_4_bits, twins_4_bits, theirs_4_bits) = counts
    text = " ".join(ledger.split())
    assert f"{twins_4_bits} kernels, as MLX's own operations take" in text
    assert f"(`openelm_mlx/model/kernels`), with which it is {ours_4_bits}." in text
    assert f"{ours} against {theirs}, and {ours_4_bits} against {theirs_4_bits} at 4 bits" in PROSE


def test_kernels_of_four_rows_are_those_of_the_ledger():
    from openelm_mlx.benchmarks.ledger.count import ledger
    from openelm_mlx.benchmarks.ledger.steps import WeightSpec, trace_ours

    spec = WeightSpec("bfloat16", {"group_size": 64, "bits": 4})
    config = OpenELMConfig.from_name("270m")
    ours, twins = (ledger(trace_ours(config, spec, rows=4, kernels=on)) for on in (True, False))
    text = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    assert f"4 of them that is {ours.kernels} kernels at 4 bits, {twins.kernels} without" in text


def test_sizes_are_those_of_the_configurations():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in PUBLISHED:
        config = OpenELMConfig.from_name(name)
        layers, context = config.num_transformer_layers, config.max_context_length
        assert f"| `{name}` | {config.num_parameters:,} | {layers} | {context} |" in text


def test_the_defaults_of_the_bundled_models_chat_are_those_of_its_folder():
    from openelm_mlx.cli.session import settings
    from openelm_mlx.engine.hub import BUNDLED
    from openelm_mlx.engine.loading import chat_sampling

    defaults, _, _ = settings(chat_sampling(BUNDLED)).partition(", seed")
    assert f"\n{defaults}, seed " in README
    for page in ("docs/chat.md", "CHANGELOG.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"`{defaults}`" in text, page
