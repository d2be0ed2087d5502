"""A new process to its first token: interpreter, imports, weights, prompt. Run as a module it is that process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import BenchmarkError, OpenELMError

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.timing import Session

TIMEOUT = 600


def startup(engine: str, folder: Path, dtype: str, prompt: list[int], tokenizer: Path | None = None) -> tuple[float, int]:
    """Seconds from starting a process until it has printed its first token after `prompt`, and that token.

    The clock is this process's. Raises `BenchmarkError` with the child's last line when it fails.
    """
    task = {"engine": engine, "folder": str(folder), "dtype": dtype, "prompt": prompt,
            "tokenizer": None if tokenizer is None else str(tokenizer)}  # fmt: skip
    command = [sys.executable, "-m", "openelm_mlx.benchmarks.startup", json.dumps(task)]
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


def open_session(task: dict[str, Any]) -> Session:
    folder = Path(task["folder"])
    if task["engine"] != "openelm-mlx":
        from openelm_mlx.benchmarks.peers import open_peer

        return open_peer(task["engine"], folder, task["dtype"])
    from openelm_mlx.loading import load

    engine = load(folder, task["dtype"], tokenizer=task["tokenizer"])
    from openelm_mlx.benchmarks.ours import OurSession

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
