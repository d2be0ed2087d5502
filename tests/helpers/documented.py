"""Runs the commands of the documentation, with stand-ins for what they would download.

    python tests/helpers/documented.py FOLDER < commands_of_pages.json

A process of its own, because `huggingface_hub` reads its environment once, and one for all pages,
because most of a short command is imports. Every published model is a small golden one, served by a
hub and a file server on this machine; a published size with random weights is a small one. Commands
that measure are given the least work.
"""

from __future__ import annotations

import gc
import io
import json
import os
import re
import runpy
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from adapter_folders import mlx_lm_folder
from formats import again, long_context
from hub_server import Hub
from range_server import serving

from openelm_mlx.model.config import OpenELMConfig

ROOT = Path(__file__).parents[2]
# Flags that make a command short: they are added to all commands that begin with these words.
SHORT: dict[str, list[str]] = {
    "openelm benchmark": ["--trials", "5", "--processes", "1", "--prompt-tokens", "8"]
    + ["--generation-tokens", "4"],
    "openelm evaluate": ["--limit", "1"],
    "openelm finetune": ["--epochs", "0.1", "--batch", "1", "--length", "128"],
    "openelm generate": ["--max-tokens", "4"],
    "openelm chat": ["--max-tokens", "4"],
    "openelm models": ["--yes"],
}
SHOWN = {"--show", "--compare", "--predict"}  # options of the benchmark that measure nothing
WRITING = {"-o", "--output", "--report", "--plot", "--markdown", "--cache-file", "remove"}
# Scripts that take minutes or need a peer: their arguments are read, and no work is done. Each has
# a test of its own.
READ_ONLY = ("openelm_mlx.benchmarks.scripts.", "openelm_mlx.benchmarks.checks.", "tests/tools/")


def workshop(folder: Path) -> dict[str, Any]:
    """Put the files that the pages speak of into `folder`; return the hub's repositories."""
    model = again(long_context(folder), folder / "my-model", instruct=True)
    again(model, folder / "model.gguf", target_format="gguf")
    mlx_lm_folder(folder / "my-adapter", OpenELMConfig.from_file(model / "config.json"))
    (folder / "tests").symlink_to(ROOT / "tests")
    requests = (ROOT / "examples" / "requests.jsonl").read_text(encoding="utf-8")
    assert (few := requests.replace('"max_tokens": 24', '"max_tokens": 2')) != requests
    (folder / "examples").mkdir()
    (folder / "examples" / "requests.jsonl").write_text(few, encoding="utf-8")
    (folder / "examples" / "questions").symlink_to(ROOT / "examples" / "questions")
    shutil.copytree(ROOT / "examples" / "island", folder / "examples" / "island")
    for path in (folder / "examples" / "island").glob("*.jsonl"):  # two examples are enough
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(True)[:2]))
    pair = {"prompt": "Hi", "completion": "Ho"}
    (folder / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n", encoding="utf-8")
    (folder / "story-folder").mkdir()
    (folder / "keys.txt").write_text("a-key\n", encoding="ascii")
    (folder / "keys.txt").chmod(0o600)
    shutil.copy(
        next((ROOT / "benchmarks" / "results").glob("*-quick.json")), folder / "theirs.json"
    )
    for name in ("letter.txt", "role.txt", "code.py", "long.txt", "heldout.txt", "notes.txt"):
        (folder / name).write_text("once upon a time there was a fox " * 4, encoding="utf-8")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    sizes = ("270M", "450M", "1_1B", "3B")
    return {f"apple/OpenELM-{size}{kind}": files for size in sizes for kind in ("", "-Instruct")}


def shortened(command: list[str]) -> list[str]:
    """Add the flags that make a command short."""
    name = " ".join(command[:2])
    if name == "openelm benchmark" and SHOWN & set(command):
        return command
    if name == "openelm models" and len(command) == 2:
        return command
    if "--full" in command:
        return [*command, "--quick"]
    calibration = ["--calibration-tokens", "257"] if "--calibrate" in command else []
    return command + SHORT.get(name, []) + calibration


def run(command: list[str], text: str) -> dict[str, Any]:
    """Run `openelm ...`, `python -m ...` or `python FILE ...` in this process.

    `text` is what it reads from stdin, or "<NAME" for the content of a file.
    """
    if text.startswith("<"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    words = [re.sub(r"\$\(cat (\S+)\)", lambda m: Path(m[1]).read_text(), word) for word in command]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.argv)
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    sys.stdout, sys.stderr = out, err
    gc.freeze()  # a benchmark collects garbage: it need not look at all modules each time
    try:
        status = called(shortened(words))
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdin, sys.stdout, sys.stderr, sys.argv = streams
    for stream in (out, err):
        stream.flush()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return {"command": command, "status": status, "out": said[0], "err": said[1]}


def called(words: list[str]) -> Any:
    """Call what a command names, and return its exit status."""
    if words[0] == "openelm":
        from openelm_mlx.cli import main

        return main(words[1:])
    name, *arguments = words[1 + (words[1] == "-m") :]
    if name.startswith(READ_ONLY):
        arguments.append("--help")
    sys.argv = [name, *arguments]
    if words[1] == "-m":
        runpy.run_module(name, run_name="__main__")
    else:
        sys.path.insert(0, str(Path(name).parent))  # as Python does for a script
        runpy.run_path(name, run_name="__main__")
    return 0


def stand_in(root: str, tokenizer: Path) -> None:
    """Let published names lead to this machine, and make published sizes small.

    A server is made, and does not start.
    """
    from openelm_mlx.benchmarks.doctor import paths, self_test, steps
    from openelm_mlx.benchmarks.measure import machine, suites, weights
    from openelm_mlx.convert import activations, verify
    from openelm_mlx.convert import fetch as catalog
    from openelm_mlx.convert.quantize import calibrate, losses
    from openelm_mlx.engine import hub
    from openelm_mlx.evaluate import perplexity
    from openelm_mlx.evaluate.suites import SUITES
    from openelm_mlx.server import run as server

    def made(*given: Any) -> int:
        """Make a server, which refuses what it cannot do, and start nothing."""
        return int(server.make_server(*given) is None)

    server.serve = made
    catalog.ROOT = root
    yaml = tokenizer.with_name("config.yaml").read_text(encoding="utf-8")
    for name, entry in catalog.CATALOG.items():
        if entry.yaml is not None:
            catalog.CATALOG[name] = replace(entry, yaml=yaml)
    for module in (catalog, hub):
        module.mirrored_tokenizer = lambda: tokenizer  # type: ignore[attr-defined]
    published = weights.OpenELMConfig.from_name

    def small(name: str) -> Any:
        config = published(name)
        return type(config)(model_dim=64, head_dim=32, num_transformer_layers=2, vocab_size=512)

    weights.OpenELMConfig.from_name = small  # type: ignore[method-assign]
    calibrate.MEASURE_TOKENS, calibrate.ROW = 32, 33
    activations.TOKENS = 16
    losses.ROWS = 16  # of a matrix, whose rounding errors are taken
    losses.NEAR = 0.5  # bits from the target that are measured
    for name, suite in SUITES.items():
        SUITES[name] = replace(suite, shots={"fairy_tales_two": 0})  # type: ignore[index]
    verify.TEXT = perplexity.TEXT = tokenizer.with_name("notes.txt")
    suites.Suite.trials_of_a_process = 2  # type: ignore[method-assign, assignment]
    machine.COPIED = 2**22  # bytes whose copy tells the bandwidth
    # of doctor, which tests run whole
    steps.SHORT, steps.LONG, steps.SLOTS, self_test.WAYS = 8, 16, (256,), ()
    cases, rates = paths.cases, steps.gemv_rates
    paths.cases = lambda quick: islice(cases(quick), 3)
    steps.gemv_rates = lambda rows: rates(8)


def main() -> None:
    folder = Path(sys.argv[1])
    pages = json.load(sys.stdin)
    things = folder / "things"
    things.mkdir()
    repositories = workshop(things)
    checkpoint = (things / "checkpoint.pt").read_bytes()
    hub = Hub(repositories)
    results, known = {}, {}
    with serving({"/pretrained/270M/checkpoint_average.pt": checkpoint}) as server:
        os.environ |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hub"),
            "OPENELM_CACHE": str(folder / "cache"),
        }
        stand_in(server.url + "/", things / "tokenizer.model")
        from openelm_mlx.engine import hub as hub_module

        for number, (page, commands) in enumerate(pages.items()):
            os.chdir(shutil.copytree(things, folder / str(number), symlinks=True))
            hub_module.resolve_model("270m")  # so that there is a model to remove
            results[page] = []
            for command, text in commands:
                if WRITING & set(command):
                    results[page].append(run(command, text))
                    continue
                words = (*command, text)  # several pages show it: it is run once
                if words not in known:
                    known[words] = run(command, text)
                results[page].append(known[words])
    hub.server.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
