"""Does a batch that is killed, or shared, give the answers of one run, and what does it cost?

    python tests/tools/batch_kills.py FOLDER [--model MODEL] [--lines 2000] [--kills 50]

The batch is run once to its end, once killed (SIGKILL) when its part has reached each of so many
random sizes, and once by two processes of `mlx.launch`. Each must give every line once, with the
same answer; those that differ are listed, as two tokens may change places where they are equal
within rounding. Then processor time per token is compared with that of the scheduler alone with the
same requests, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from batch_lines import read, some, stable, write  # noqa: E402

from openelm_mlx import BatchEngine, PromptCache, load  # noqa: E402
from openelm_mlx.server.batch_file import Input, Output, part_of  # noqa: E402
from openelm_mlx.server.batch_run import AHEAD, Batch  # noqa: E402

SLOTS = 16


def command(source: Path, target: Path, model: str) -> list[str]:
    batch = [sys.executable, "-m", "openelm_mlx", "batch", str(source), "-o", str(target)]
    return [*batch, "--model", model, "--slots", str(SLOTS)]


def killed(source: Path, target: Path, model: str, sizes: list[int]) -> int:
    """Kill the batch when its part has each of these sizes, then let it end; return the kills."""
    kills = 0
    for size in sizes:
        process = subprocess.Popen(command(source, target, model), stderr=subprocess.DEVNULL)
        part = part_of(target, 0)
        while process.poll() is None and not (part.exists() and part.stat().st_size >= size):
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait()
    run(command(source, target, model))
    return kills


def run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    print(done.stderr.strip(), flush=True)


def compared(way: str, source: Path, one: Path, other: Path) -> dict[str, Any]:
    """Compare the answers of two runs."""
    names = [json.loads(text)["custom_id"] for text in source.read_text().splitlines()]
    ours, theirs = read(one), read(other)
    once = [answer["custom_id"] for answer in theirs] == names
    pairs = zip(ours, theirs, strict=False)
    differing = [a["custom_id"] for a, b in pairs if stable(a) != stable(b)]
    return {"way": way, "each line once": once, "lines": len(theirs), "differing": differing}


def cost_of_batch(engine: Any, source: Input, target: Path) -> float:
    """Return the processor seconds per new token of a batch."""
    begun, tokens = time.process_time(), 0
    again = Input(source.path)
    output = Output(target, again, {}, 0)
    for results in Batch(engine, "tiny", scheduler_of(engine)).results(lines_of(again)):
        output.add([result.text for result in results])
        tokens += sum(result.new_tokens for result in results)
    output.join()
    spent = time.process_time() - begun
    os.unlink(target)
    return spent / tokens


def cost_of_scheduler(engine: Any, source: Input) -> float:
    """Return the processor seconds per new token of the scheduler, given ids and options."""
    asked = Batch(engine, "tiny", scheduler_of(engine))._asked(lines_of(source))
    requests = [request for _, _, request in asked if request is not None]
    begun, tokens = time.process_time(), 0
    scheduler, running = scheduler_of(engine), 0
    while requests or scheduler.busy:
        while requests and running < AHEAD * SLOTS:
            scheduler.submit(*requests.pop(0))
            running += 1
        for _, event in scheduler.step():
            tokens += 1
            running -= event.finish_reason is not None
    return (time.process_time() - begun) / tokens


def scheduler_of(engine: Any) -> BatchEngine:
    cache = PromptCache(512 << 20)
    return BatchEngine(engine, SLOTS, prompt_cache=cache, max_waiting=AHEAD * SLOTS)


def lines_of(source: Input) -> Any:
    return map(source.line, range(len(source)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="openelm-tiny")
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5, help="of the comparison of cost")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    names = ("in", "whole", "killed", "shared", "cost")
    source, whole, cut, shared, cost = (args.folder / f"{name}.jsonl" for name in names)
    write(source, some(args.lines, 4))
    found: dict[str, Any] = {"model": args.model, "lines": args.lines}
    if not whole.exists():
        run(command(source, whole, args.model))
    if args.kills:
        most, rng = whole.stat().st_size, random.Random(1)
        sizes = sorted(rng.randrange(most) for _ in range(args.kills))
        found["kills"] = killed(source, cut, args.model, sizes)
        launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--"]
        run([*launch, *command(source, shared, args.model)])
        found["killed"] = compared("killed", source, whole, cut)
        found["shared"] = compared("mlx.launch -n 2", source, whole, shared)
    if args.turns:
        engine, lines = load(args.model), Input(source)
        pairs = []
        for _ in range(args.turns + 1):  # the first one traces the steps
            pairs.append((cost_of_batch(engine, lines, cost), cost_of_scheduler(engine, lines)))
        ratios = [ours / theirs for ours, theirs in pairs[1:]]
        found["processor time against the scheduler"] = statistics.median(ratios)
        found["ratios"] = [round(ratio, 3) for ratio in ratios]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
