"""Does an evaluation that is killed, or shared, give exactly the numbers of one run?

    python tests/tools/evaluate_kills.py FOLDER [--kills 50] [--requests 600]
    python tests/tools/evaluate_kills.py FOLDER -- openelm evaluate openelm-tiny --tasks fairy_tales

It is run to its end by one process and by two of `mlx.launch`, and again by each of these with
kills (SIGKILL, of one process or of all) when so many random numbers of passes have been stored.
The results must be equal in every byte. Without a command these are log-likelihoods of random
requests and greedy texts; a command gets `-o` and a folder, and what differs between two runs that
nobody killed (times, for example) is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openelm_mlx import load
from openelm_mlx.engine.ranks import launched
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.plan import Request
from openelm_mlx.evaluate.run import answers, texts
from openelm_mlx.evaluate.store import Store
from openelm_mlx.files import write_json

TOKENS = 128  # of a pass: many short ones
LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2"]


def some_requests(count: int, longest: int = 20, seed: int = 1) -> list[Request]:
    """Return random requests of two choices and more over each context."""
    rng = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 4000) for _ in range(rng.randint(1, most)))

    contexts = [ids(longest) for _ in range(max(1, count // 3))]
    return [Request(rng.choice(contexts), ids(8)) for _ in range(count)]


def answer(count: int, target: Path, most: int = 1 << 30) -> None:
    """Do in this process what is killed: answer, write the results, and remove what was stored.

    The last process kills itself after `most` passes.
    """
    engine, ranks, requests = load("openelm-tiny"), launched(), some_requests(count)
    prompts = [request.context for request in requests[: count // 20]]
    limits = [1 + number % 9 for number in range(len(prompts))]
    passes = itertools.count()

    def report(*_: int) -> None:
        if next(passes) == most and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with Store(engine, TOKENS) as store:
        shared: Any = {"batch_tokens": TOKENS, "store": store, "ranks": ranks, "progress": report}
        found = answers(engine, requests, **shared)
        told = texts(engine, prompts, [["."]] * len(prompts), limits, **shared)
        if ranks.rank == 0:
            write_json(target, {"answers": found, "texts": told})
        ranks.gather("written")
        store.finish()


def stored(cache: Path) -> int:
    """Return how many passes are stored."""
    passes = 0
    for path in (cache / "answers").glob("*.sqlite"):
        with contextlib.suppress(sqlite3.Error):
            file = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
            passes += file.execute("SELECT count(*) FROM passes").fetchone()[0]
            file.close()
    return passes


class Runs:
    """Runs of one command, whose results are in `target` and whose cache is their own."""

    def __init__(self, words: list[str], target: Path, processes: int = 1) -> None:
        self.words, self.target, self.shared = words, target, processes > 1
        self.cache = target.with_name(f"{target.name}-cache")

    def begin(self, *more: str) -> subprocess.Popen[str]:
        if (self.target / "report.json").exists():  # a run was killed when it had written all
            shutil.rmtree(self.target)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        own = {**os.environ, "OPENELM_CACHE": str(self.cache), "PATH": path}
        how: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        # processes of two commands would meet on mlx.launch's usual port
        port = str(random.SystemRandom().randrange(20000, 30000, 4))
        launch = [*LAUNCH, "--starting-port", port, "--"] if self.shared else []
        return subprocess.Popen([*launch, *self.words, *more], env=own, **how)

    def whole(self) -> int:
        """Run to the end, and return how many passes were stored at most."""
        process, most = self.begin(), 0
        while process.poll() is None:
            most = max(most, stored(self.cache))
            time.sleep(0.02)
        said = process.stderr.read() if process.stderr else ""
        if not self.target.exists() or "Traceback" in said:
            raise SystemExit(f"{' '.join(self.words)}: {said}")
        if left := list((self.cache / "answers").iterdir()):
            raise SystemExit(f"{left} is left")
        return most

    def killed(self, count: int, most: int, rng: random.Random) -> int:
        """Kill so often, at random numbers of stored passes; return how many runs that took.

        They rise, so that a run goes on from the one before; it begins anew after one that ended.
        """
        kills, places = 0, sorted((rng.randrange(most) for _ in range(count)), reverse=True)
        for runs in itertools.count():
            if kills == count:
                return runs
            place = places.pop() if places else rng.randrange(most)
            process = self.begin()
            while process.poll() is None and stored(self.cache) < place:
                time.sleep(0.002)
            time.sleep(rng.random() / 50)  # anywhere in a pass, or before the first
            kills += process.poll() is None
            ranks = list(children(process.pid)) if self.shared else [process.pid]
            for rank in ranks if rng.random() < 0.5 else ranks[-1:]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, signal.SIGKILL)
            said = process.communicate()[1]  # mlx.launch ends the others, and itself
            if "Traceback" in said:
                raise SystemExit(said)
        raise AssertionError("there is no end to counting")


def children(parent: int) -> Iterator[int]:
    """Yield the processes that one has started."""
    table = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True)
    for line in table.stdout.splitlines():
        pid, above = map(int, line.split())
        if above == parent:
            yield pid


def results(target: Path) -> dict[str, Any]:
    """Return all numbers and texts of a result by their place in it."""
    paths = [target] if target.is_file() else sorted(target.rglob("*.json*"))
    found: dict[str, Any] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for name, one in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{place}/{name}", one)
        else:
            found[place] = value

    for number, path in enumerate(paths):  # a name may have a time in it
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        walk(str(number), list(map(json.loads, lines)))
    return found


def compared(first: Path, again: Path, others: dict[str, Path]) -> dict[str, Any]:
    """Compare results, where two runs that nobody killed agree."""
    expected, repeated = results(first), results(again)
    noise = {name for name in {**expected, **repeated} if expected.get(name) != repeated.get(name)}
    summary: dict[str, Any] = {"values": len(expected), "left out": sorted(noise)[:20]}
    for way, path in others.items():
        found = results(path)
        names = {**expected, **found}.keys() - noise
        summary[way] = {
            "differing": sorted(n for n in names if expected.get(n) != found.get(n))[:20]
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=1 << 30, help=argparse.SUPPRESS)
    words, command = sys.argv[1:], list[str]()
    if "--" in words:
        words, command = words[: words.index("--")], words[words.index("--") + 1 :]
    args = parser.parse_args(words)
    if args.answer:
        try:
            answer(args.requests, args.answer, args.most)
        except OpenELMError as error:  # the other process was killed
            sys.exit(str(error))
        return
    args.folder.mkdir(parents=True, exist_ok=True)

    def runs(name: str, processes: int) -> Runs:
        target, words = args.folder / name, [*command, "-o", str(args.folder / name)]
        if not command:
            words = [sys.executable, __file__, str(args.folder), "--answer", str(target)]
            words += ["--requests", str(args.requests)]
        return Runs(words, target, processes)

    rng = random.Random(args.seed)
    whole, again = runs("whole", 1), runs("again", 1)
    most, others = whole.whole(), {"mlx.launch -n 2": runs("shared", 2).target}
    again.whole()
    runs("shared", 2).whole()
    counts = {}
    for way, processes in (("killed", 1), ("mlx.launch -n 2, killed", 2)):
        one = runs(way.replace(" ", "-"), processes)
        counts[way], others[way] = one.killed(args.kills, most, rng), one.target
        one.whole()
    print(
        json.dumps(
            {"kills": args.kills, "runs": counts, **compared(whole.target, again.target, others)},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
