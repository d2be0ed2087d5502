"""Runs the commands of a page of the documentation, with stand-ins for what they would download.

    python tests/helpers/documented.py FOLDER < commands.json

A process of its own, because `huggingface_hub` reads its environment once. Every published model is
the golden nano model, served by a hub and a file server on this machine; a published size with
random weights is a small one. Commands that measure are given the least work.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from formats import again
from golden_set import NANO
from hub_server import Hub
from range_server import serving

# Flags that make a command of the documentation short: its first words -> what is added.
SHORT: dict[tuple[str, ...], list[str]] = {
    ("benchmark",): ["--trials", "5", "--processes", "1"]
    + ["--prompt-tokens", "8", "--generation-tokens", "4"],
    ("convert",): ["--calibration-tokens", "300"],
    ("generate",): ["--max-tokens", "4"],
    ("chat",): ["--max-tokens", "4"],
}


def workshop(folder: Path) -> dict[str, Any]:
    """Put the files that the pages speak of into `folder`; return the hub's repositories."""
    model = again(NANO / "checkpoint.pt", folder / "my-model", instruct=True)
    shutil.copy(NANO / "checkpoint.pt", folder)
    shutil.copy(NANO / "config.yaml", folder)
    shutil.copy(NANO / "tokenizer.model", folder)
    again(model, folder / "model.gguf", target_format="gguf")
    for name in ("letter.txt", "role.txt", "code.py", "long.txt", "heldout.txt", "notes.txt"):
        (folder / name).write_text("Once upon a time there was a fox. " * 8, encoding="utf-8")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    sizes = ("270M", "450M", "1_1B", "3B")
    return {f"apple/OpenELM-{size}{kind}": files for size in sizes for kind in ("", "-Instruct")}


def shortened(argv: list[str]) -> list[str]:
    """Add the flags that make the command short, unless it only shows what was measured."""
    if argv[:1] == ["benchmark"] and {"--show", "--compare", "--predict"} & set(argv):
        return argv
    return argv + SHORT.get(tuple(argv[:1]), [])


def run(words: list[str], text: str) -> dict[str, Any]:
    """Run one command of `openelm` in this process.

    `text` is what it reads from stdin, or "<NAME" for the content of a file.
    """
    from openelm_mlx.cli.main import main

    if text.startswith("<"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    argv = [re.sub(r"\$\(cat (\S+)\)", lambda m: Path(m[1]).read_text(), word) for word in words]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    streams = (sys.stdin, sys.stdout, sys.stderr)
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    sys.stdout, sys.stderr = out, err
    try:
        status = main(shortened(argv))
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    for stream in (out, err):
        stream.flush()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return {"argv": words, "status": status, "out": said[0], "err": said[1]}


def stand_in(root: str, tokenizer: Path) -> None:
    """Let published names lead to this machine, and make published sizes small."""
    from openelm_mlx.benchmarks.measure import weights
    from openelm_mlx.convert.fetch import catalog
    from openelm_mlx.engine import hub

    catalog.ROOT = root
    for module in (catalog, hub):
        module.mirrored_tokenizer = lambda: tokenizer  # type: ignore[attr-defined]
    published = weights.OpenELMConfig.from_name

    def small(name: str) -> Any:
        config = published(name)
        return type(config)(model_dim=64, head_dim=32, num_transformer_layers=2, vocab_size=512)

    weights.OpenELMConfig.from_name = small  # type: ignore[method-assign]


def main() -> None:
    folder = Path(sys.argv[1])
    commands = json.load(sys.stdin)
    repositories = workshop(folder)
    checkpoint = (NANO / "checkpoint.pt").read_bytes()
    hub = Hub(repositories)
    with serving({"/pretrained/270M/checkpoint_average.pt": checkpoint}) as server:
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hub"),
            "OPENELM_CACHE": str(folder / "cache"),
        }
        stand_in(server.url + "/", folder / "tokenizer.model")
        os.chdir(folder)
        results = [run(argv, text) for argv, text in commands]
    hub.server.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
