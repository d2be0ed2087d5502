"""The servers of one machine that are compared, and the scheduler of this project without one.

Each is a process of its own, on 127.0.0.1, that is ended with its context. All of them compute with
the BLAS that this project finds: mlx_lm.server is started by its own `main` after that library.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from openelm_mlx.benchmarks.peers.llama_cpp import end, free_port
from openelm_mlx.benchmarks.scripts.streams import HOST, Answer, Event, ask
from openelm_mlx.errors import BenchmarkError

OURS, PEER, ALONE = "openelm", "mlx_lm.server", "scheduler"  # the last is in process
PEER_MAIN = (
    "import sys, openelm_mlx.device; from mlx_lm.server import main; sys.argv[0] = 'server'; main()"
)
SCHEDULER_MAIN = "from openelm_mlx.benchmarks.scripts.servers import scheduler; scheduler()"
# a model's own defaults of sampling may have penalties, which mlx_lm.server does not read
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
START_LIMIT = 60.0  # seconds until a server must be ready
PAUSE = 0.005  # seconds between two attempts to reach it


class Process:
    """A process whose processor time can be read; it is ended at the exit of its context."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        self.begun = perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tempfile.gettempdir(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if name == ALONE else self.log,
            stderr=self.log,
            start_new_session=True,  # Ctrl-C ends the run, which ends its processes
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self.process)
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            if pipe is not None:
                pipe.close()

    def processor_seconds(self) -> float:
        """Return the time that all threads of the process have computed, ended ones included."""
        if sys.platform == "linux":  # the clock of another process; clock_getcpuclockid(3)
            return time.clock_gettime((~self.process.pid << 3) | 2)
        words = ["ps", "-o", "time=", "-p", str(self.process.pid)]  # hundredths of a second
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        parts = [float(part) for part in text.strip().replace("-", ":").split(":")]
        return sum(
            part * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False)
        )

    def uses_openblas(self) -> bool | None:
        maps = Path(f"/proc/{self.process.pid}/maps")
        return "libopenblas" in maps.read_text(encoding="utf-8") if maps.exists() else None

    def failure(self) -> BenchmarkError:
        self.log.seek(0)
        return BenchmarkError(f"{self.name} has ended: {self.log.read()[-2000:].strip()}")


class Server(Process):
    """A server of completions on a free port; `common` is what each request to it holds."""

    def __init__(self, name: str, model: str, *flags: str) -> None:
        self.port, self.common = free_port(), dict[str, Any]()
        where = ["--host", HOST, "--port", str(self.port), *flags]
        if name == OURS:
            super().__init__(name, ["-m", "openelm_mlx", "serve", model, *where])
        else:
            super().__init__(name, ["-c", PEER_MAIN, "--model", model, *where])

    async def ready(self) -> None:
        """Wait until the server says that it can be used. Raises `BenchmarkError`."""
        await self.first_answer("/health")
        if self.name == OURS:
            models = (await ask(self.port, "/v1/models")).json
            self.common = {"model": models["data"][0]["id"], **NEUTRAL}

    async def first_answer(self, path: str, body: Event | None = None) -> Answer:
        """Ask until there is an answer with status 200. Raises `BenchmarkError` if none comes."""
        while self.process.poll() is None:
            answer = None
            with suppress(BenchmarkError):  # it does not listen yet
                answer = await ask(self.port, path, body)
            if answer is not None and answer.parsed[0] not in (0, 503):  # 503: it loads
                answer.check()
                return answer
            if perf_counter() - self.begun > START_LIMIT:
                raise BenchmarkError(f"{self.name} is not ready after {START_LIMIT:g} seconds")
            await asyncio.sleep(PAUSE)
        raise self.failure()


class Scheduler(Process):
    """A `BatchEngine` in a fresh process, which runs requests that come by a pipe."""

    def __init__(self, model: str, slots: int) -> None:
        super().__init__(ALONE, ["-c", SCHEDULER_MAIN])
        self.ask(model=model, slots=slots)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return what `scheduler` prints. Raises `BenchmarkError` if it has died."""
        if self.process.stdin is None or self.process.stdout is None:
            raise self.failure()
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise self.failure() from None
        line = self.process.stdout.readline()
        if not line:
            raise self.failure()
        return dict(json.loads(line))


def scheduler() -> None:
    """Run the requests of each line of standard input at once, in this process."""
    from openelm_mlx import load
    from openelm_mlx.engine.generation import BatchEngine

    first = json.loads(sys.stdin.readline())
    engine = load(first["model"])
    print(json.dumps({"pid": os.getpid()}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        batch = BatchEngine(engine, first["slots"])
        begun, used = perf_counter(), time.process_time()
        order = [batch.submit(text, max_tokens=asked["tokens"]) for text in asked["prompts"]]
        found: dict[int, dict[str, Any]] = {
            number: {"tokens": 0, "text": "", "first": None} for number in order
        }
        while batch.busy:
            events = batch.step()
            now = perf_counter() - begun
            for number, event in events:
                one = found[number]
                one["tokens"] += 1
                one["text"] += event.text
                if event.text and one["first"] is None:
                    one["first"] = now
        took = {"seconds": perf_counter() - begun, "processor_seconds": time.process_time() - used}
        batch.close()
        print(json.dumps({**took, "answers": list(found.values())}), flush=True)
