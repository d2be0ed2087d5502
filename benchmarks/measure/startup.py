"""A new process to its first token: interpreter, imports, weights, prompt. Run as a module it is
that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from openelm_mlx.benchmarks.measure.suites import Point
from openelm_mlx.errors import BenchmarkError, OpenELMError

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.measure.harness import Tick
    from openelm_mlx.benchmarks.measure.loaded import Weights
    from openelm_mlx.benchmarks.measure.timing import Session
    from openelm_mlx.benchmarks.results.document import Row

TIMEOUT = 600


def startup(
    engine: str, folder: Path, dtype: str, prompt: list[int], tokenizer: Path | None = None
) -> tuple[float, int]:
    """Seconds from starting a process until it has printed its first token after `prompt`, and that
    token.

    The clock is this process's. Raises `BenchmarkError` with the child's last line when it fails.
    """
    task = {
        "engine": engine,
        "folder": str(folder),
        "dtype": dtype,
        "prompt": prompt,
        "tokenizer": None if tokenizer is None else str(tokenizer),
    }
    command = [sys.executable, "-m", "openelm_mlx.benchmarks.measure.startup", json.dumps(task)]
    start = perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = child.stdout.readline() if child.stdout else ""
        seconds = perf_counter() - start
        _, errors = child.communicate(timeout=TIMEOUT)
    except BaseException:
        child.kill()
        child.wait()
        raise
    words = line.split()
    if child.returncode or len(words) != 2 or words[0] != "token":
        reason = errors.strip().splitlines()[-1:] or [f"it ended with status {child.returncode}"]
        raise BenchmarkError(f"{engine} did not start up: {reason[0]}")
    return seconds, int(words[1])


def startup_rows(
    rows: list[Row],
    weights: Weights,
    scratch: Path,
    prompt_tokens: int,
    trials: int,
    peers: Sequence[str],
    tick: Tick,
) -> None:
    """Append a row for our engine and each peer: new processes that take turns; at an interrupt
    what is finished.

    What a peer needs converted is written into `scratch` beforehand: that is not its start-up.
    """
    from openelm_mlx.benchmarks.peers import prepared
    from openelm_mlx.benchmarks.peers.openelm import prompt_ids
    from openelm_mlx.benchmarks.results.document import Metric, Row

    prompt, path = prompt_ids(weights.engine, prompt_tokens), weights.engine.tokenizer.path
    tokenizer = path if os.path.exists(path) else None
    seconds: dict[str, list[float]] = {name: [] for name in ("openelm-mlx", *peers)}
    tokens: dict[str, int] = {}
    problems: dict[str, str] = {}
    folder = weights.written(scratch)
    places = {"openelm-mlx": folder}
    for name in peers:
        try:
            places[name] = prepared(name, folder, weights.dtype, scratch)
        except OpenELMError as error:
            problems[name] = f"not timed: {error}"
    try:
        for number in range(trials + 1):  # the first fills the file cache
            for name in [
                name for name in list(seconds)[:: -1 if number % 2 else 1] if name not in problems
            ]:
                try:
                    found, tokens[name] = startup(
                        name, places[name], weights.dtype, prompt, tokenizer
                    )
                except OpenELMError as error:
                    if name == "openelm-mlx":
                        raise
                    problems[name] = f"not timed: {error}"
                    continue
                if tokens[name] != tokens["openelm-mlx"]:
                    problems[name] = (
                        f"not timed: token 0 is {tokens[name]}, in openelm-mlx {tokens['openelm-mlx']}"
                    )
                elif number:
                    seconds[name].append(found)
                    tick(f"{name} start-up", prompt_tokens)
    finally:
        for name, values in seconds.items():
            agrees = None if name == "openelm-mlx" or name not in tokens else name not in problems
            metrics = {"startup_seconds": Metric.of(values, "s")} if values else {}
            notes = (problems[name],) if name in problems else ()
            case = weights.case(Point(prompt_tokens, 1), name)
            rows.append(
                Row(
                    case,
                    metrics,
                    agrees=agrees,
                    parts_at=0 if agrees is False else None,
                    notes=notes,
                )
            )


def open_session(task: dict[str, Any]) -> Session:
    folder = Path(task["folder"])
    if task["engine"] != "openelm-mlx":
        from openelm_mlx.benchmarks.peers import open_peer

        return open_peer(task["engine"], folder, task["dtype"])
    from openelm_mlx.engine.loading import load

    engine = load(folder, task["dtype"], tokenizer=task["tokenizer"])
    from openelm_mlx.benchmarks.peers.openelm import OurSession

    return OurSession(engine)


def main() -> int:
    task = json.loads(sys.argv[1])
    try:
        session = open_session(task)
        timed = session.generate(task["prompt"], 1)
    except OpenELMError as error:
        print(error, file=sys.stderr)
        return 2
    print("token", timed.tokens[0], flush=True)
    session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
