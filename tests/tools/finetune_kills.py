"""Does a fine-tuning that is killed give exactly the numbers of another? Is its memory flat?

    python tests/tools/finetune_kills.py FOLDER [--kills 100] [--ways lora full ...]
    python tests/tools/finetune_kills.py FOLDER --memory 10000

Each way trains a tiny random model to its end, and again with kills (SIGKILL) at random moments:
before the first step, within a step, an evaluation or a checkpoint. metrics.jsonl without its times
and the weights must then be equal in every byte. With --memory one run is watched instead: the
memory of MLX and of the process, and what of the latter is Python's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers")]

from small import random_engine  # noqa: E402
from training import curve, options, write_pairs  # noqa: E402

from openelm_mlx import load  # noqa: E402
from openelm_mlx.device import mx  # noqa: E402
from openelm_mlx.errors import OptionError  # noqa: E402
from openelm_mlx.finetune import FinetuneOptions, finetune, result  # noqa: E402
from openelm_mlx.finetune.state import METRICS, REPORT  # noqa: E402

DPO = {"preference": "sigmoid", "learning_rate": 0.01}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.2},
    "accumulated": {"accumulate": 2, "packing": True},
    "dora": {"method": "dora"},
    "full": {"method": "full", "learning_rate": 1e-3},
    "dpo": DPO,
    "adafactor": {"optimizer": "adafactor"},
}
WEIGHTS = "adapters.safetensors", "model.safetensors"


def options_of(way: str, steps: int, often: int = 1) -> FinetuneOptions:
    how: dict[str, Any] = {"save_every": 3 * often, "evaluate_every": 4 * often, **WAYS[way]}
    return options(steps=steps, **how)


def data_of(folder: Path, way: str) -> Path:
    """Return the data of a way, which are written if they are not there."""
    path = folder / ("preferences.jsonl" if way == "dpo" else "pairs.jsonl")
    if not path.exists() and way == "dpo":
        rows = [{"prompt": f"{n}?", "chosen": f"{n}.", "rejected": f"No {n}."} for n in range(24)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return path if path.exists() else write_pairs(path, 24)


def train(folder: Path, target: Path, way: str, asked: FinetuneOptions, look: Any = None) -> None:
    """Do in this process what is killed: go on with the run in `target`, or begin it."""
    result.write_picture = lambda folder: False  # matplotlib takes longer than all the rest
    like = load("openelm-tiny")
    engine = random_engine(like, 3, like.config.vocab_size, 32, 2)
    with contextlib.suppress(OptionError):  # it was finished, and killed at the very end
        finetune(engine, data_of(folder, way), target, asked, resume=True, progress=look)


def begun(folder: Path, target: Path, way: str, steps: int) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, str(folder), "--train", str(target)]
    words += ["--ways", way, "--steps", str(steps)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def rows_in(target: Path) -> int:
    with contextlib.suppress(OSError):
        return (target / METRICS).read_bytes().count(b"\n")
    return 0


def ended(process: subprocess.Popen[str]) -> None:
    """Wait for a run; stop if it failed by itself."""
    said = process.communicate()[1]
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(said)


def outcome(target: Path) -> tuple[list[dict[str, Any]], bytes]:
    weights = next(target / name for name in WEIGHTS if (target / name).exists())
    return curve(target), weights.read_bytes()


def killed(folder: Path, way: str, steps: int, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs of one way so often, and compare each that reaches its end."""
    target, whole = folder / f"{way}-killed", folder / f"{way}-whole"
    for path in (target, whole):
        shutil.rmtree(path, ignore_errors=True)
    train(folder, whole, way, options_of(way, steps))
    expected = outcome(whole)
    rows, done, runs, differing = len(expected[0]), 0, 0, 0
    while done < kills or not (target / REPORT).exists():
        process = begun(folder, target, way, steps)
        if done < kills:
            place = rows_in(target) + rng.randint(-3, max(1, 3 * rows // kills))
            while process.poll() is None and rows_in(target) < place:
                time.sleep(0.002)
            time.sleep(rng.random() * rng.choice([0.01, 0.1, 1.0]))
            done += process.poll() is None
            process.kill()
        ended(process)
        if (target / REPORT).exists():
            runs += 1
            differing += outcome(target) != expected
            if done < kills:
                shutil.rmtree(target)
    return {"kills": done, "runs": runs, "differing": differing, "rows": rows}


def watched(folder: Path, way: str, steps: int) -> list[dict[str, Any]]:
    """Train so many steps, and return what the memory was at some of them."""
    found: list[dict[str, Any]] = []
    every = max(1, steps // 20)

    def look(row: dict[str, Any], _: int) -> None:
        if "loss" in row and row["step"] % every == 0:
            now = {"step": row["step"], "active": mx.get_active_memory()}
            now |= {"cache": mx.get_cache_memory(), "peak": row["peak_bytes"], "rss": resident()}
            found.append(now)
            print(json.dumps(now), file=sys.stderr, flush=True)

    shutil.rmtree(folder / "watched", ignore_errors=True)
    train(folder, folder / "watched", way, options_of(way, steps, 100), look)
    return found


def resident() -> int:
    """Return the bytes of this process in memory; where Linux's file is missing the most so far."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--memory", type=int, metavar="STEPS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        way = args.ways[0]
        return train(args.folder, args.train, way, options_of(way, args.steps))
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.memory:
        found: Any = {way: watched(args.folder, way, args.memory) for way in args.ways}
    else:
        rng = random.Random(args.seed)
        found = {way: killed(args.folder, way, args.steps, args.kills, rng) for way in args.ways}
    print(json.dumps(found, indent=2))
    return None


if __name__ == "__main__":
    main()
