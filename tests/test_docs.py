"""The Python in README and docs runs as it stands, commands exist, figures are the measured
ones.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from readme_table import RESULTS, filled

from openelm_mlx.cli.main import build_parser
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


def commands(line: str) -> Iterator[list[str]]:
    """The commands of a line of shell, without variables before them and files after `<` and
    `>`.
    """
    words = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    words.whitespace_split = True
    command: list[str] = []
    for word in words:
        if word in ("|", ";", "&&"):
            yield command
            command = []
        elif word in ("<", ">"):
            next(words)
        elif command or not re.fullmatch(r"[A-Z_]+=\S*", word):
            command.append(word)
    yield command


PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", PYTHON, ids=named)
def test_python_runs(page, capsys):
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page):
    parser = build_parser()
    for block in blocks(page, "(?:console|text)?"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if not re.match(r" *(\$ |openelm |python -m |printf )", line):
                continue
            for command in commands(line.strip()):
                if command[:1] == ["openelm"]:
                    assert callable(parser.parse_args(command[1:]).run), line
                elif command[:2] == ["python", "-m"]:
                    assert find_spec(command[2]), line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_page_is_in_the_index():
    for page in PAGES[1:]:
        assert f"]({page.relative_to(ROOT)})" in README, page.name


def test_the_figures_are_those_of_the_result_files():
    assert filled(README) == README, "`python tests/helpers/readme_table.py` writes what is right"


def test_result_files_read_as_they_say():
    from openelm_mlx.benchmarks.results.document import load
    from openelm_mlx.benchmarks.results.tables import markdown

    for file in (ROOT / RESULTS).glob("*.json"):
        assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(load(file)), (
            f"run `openelm benchmark --show {file.name} --markdown {file.stem}.md`"
        )


def test_the_gain_of_calibration_is_that_of_the_table():
    table = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    left = re.findall(r"^\| \S+ \| `--target-bpw --calibrate .* (\S+) \|$", table, re.MULTILINE)
    shares = sorted(map(float, left))
    assert len(shares) == 6
    assert f"{shares[0]:.2f} to {shares[-1]:.2f} of the loss of uniform quantization" in PROSE


def test_kernels_are_those_of_the_ledger_shown():
    ledger = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    counts = dict.fromkeys(re.findall(r"^all +(\d+) +(\d+)$", ledger, re.MULTILINE))
    (ours, theirs), (ours_4_bits, theirs_4_bits) = counts
    assert f"{ours} against {theirs}, and {ours_4_bits} against {theirs_4_bits} at 4 bits" in PROSE


def test_kernels_of_four_rows_are_those_of_the_ledger():
    from openelm_mlx.benchmarks.ledger.count import ledger
    from openelm_mlx.benchmarks.ledger.steps import WeightSpec, trace_ours

    spec = WeightSpec("bfloat16", {"group_size": 64, "bits": 4})
    four = ledger(trace_ours(OpenELMConfig.from_name("270m"), spec, rows=4))
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"With 4 of them that is {four.kernels} kernels at 4 bits" in text


def test_sizes_are_those_of_the_configurations():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for name in PUBLISHED:
        config = OpenELMConfig.from_name(name)
        layers, context = config.num_transformer_layers, config.max_context_length
        assert f"| `{name}` | {config.num_parameters:,} | {layers} | {context} |" in text


def test_the_defaults_of_the_bundled_models_chat_are_those_of_its_folder():
    from openelm_mlx.cli.session import settings
    from openelm_mlx.engine.chat_defaults import chat_sampling
    from openelm_mlx.engine.hub import BUNDLED

    defaults, _, _ = settings(chat_sampling(BUNDLED)).partition(", seed")
    assert f"\n{defaults}, seed " in README
    for page in ("docs/chat.md", "CHANGELOG.md"):
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert f"`{defaults}`" in text, page
