"""README's figures, computed from the result files.

`python tests/tools/readme_table.py` writes them.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

from openelm_mlx.benchmarks.results.document import DECODE, Case, Document, load

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"
BEGIN, END = "<!-- computed from benchmarks/results -->\n", "<!-- end -->\n"
MADE = {  # how to make a folder that was measured
    "openelm-tiny-float32": "openelm convert tests/golden/openelm-tiny/checkpoint.pt "
    "-o openelm-tiny-float32 --tokenizer tests/golden/openelm-nano/tokenizer.model",
}
FIRST = "time_to_first_token_seconds"


def block() -> str:
    """Return the table, a row for each peer of each file, and the commands that measured."""
    files = {path: load(path) for path in (ROOT / RESULTS).glob("*.json")}
    order = sorted(files, key=lambda path: (files[path].rows[0].case.random_weights, path.stem))
    files = {path: files[path] for path in order}
    lines = ["| what ran; BLAS; copy of memory | against | decoding | first token |"]
    lines.append("|---|---|---:|---:|")
    for path, document in files.items():
        for case, peer, decode, first in ratios(document):
            ran = f"[{what(case)}]({RESULTS}/{path.stem}.md); {blas(document)}; {copied(document)}"
            lines.append(f"| {ran} | {peer} | {decode} | {first} |")
    commands: dict[str, None] = {}  # in order, each once
    for document in files.values():
        made = {row.case.model for row in document.rows} & MADE.keys()
        commands |= dict.fromkeys(map(wrapped, [*(MADE[name] for name in made), command(document)]))
    return "\n".join([*lines, "", "```console", *(f"$ {line}" for line in commands), "```", ""])


def ratios(document: Document) -> Iterator[tuple[Case, str, str, str]]:
    """Yield the case, the peer, and how many times as fast as it this engine decodes and begins."""
    for index, row in enumerate(document.rows):
        found = {
            (one.metric, document.rows[one.against].case.engine): (one.ratio, one.low, one.high)
            for one in document.ratios
            if one.row == index
        }
        for peer in dict.fromkeys(name for _, name in found):
            middle, low, high = found[FIRST, peer]  # ours over theirs, of a time
            yield row.case, peer, times(*found[DECODE, peer]), times(1 / middle, 1 / high, 1 / low)


def times(middle: float, low: float, high: float) -> str:
    return f"{middle:.2f} x ({low:.2f}-{high:.2f})"


def what(case: Case) -> str:
    weights = f"{case.bits} bits" if case.bits else case.dtype
    random = ", random weights" if case.random_weights else ""
    tokens = f"{case.prompt_tokens} + {case.generation_tokens} tokens"
    return f"{case.model}{random}, {weights}, {tokens}"


def blas(document: Document) -> str:
    name = str(document.machine.blas)
    return "OpenBLAS" if "openblas" in name else name


def copied(document: Document) -> str:
    return f"{(document.machine.copy_bytes_per_second or 0) / 1e9:.1f} GB/s"


def command(document: Document) -> str:
    """Return the command as typed, without the names of the files it wrote."""
    words = shlex.split(document.command)
    for flag in ("--output", "--markdown"):
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return ("OPENELM_BLAS=off " if blas(document) == "MLX's own" else "") + shlex.join(words)


def wrapped(line: str) -> str:
    """Break a command into lines of at most 100 columns, before a flag, not before its value."""
    held = line.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}--", " --")
    lines = textwrap.wrap(held, 94, break_on_hyphens=False)
    return " \\\n    ".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def filled(readme: str) -> str:
    """Return README with the block replaced by the one computed now."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{block()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
