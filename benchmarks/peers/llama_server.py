"""llama.cpp's server program, found, started, asked and stopped: llama.cpp without its Python
binding.

`llama-bench` and `llama-cli` never show token ids, so their times could not be checked; every build
and package of llama.cpp has llama-server beside them, which takes and gives ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.errors import BenchmarkError, reason

VARIABLE = "OPENELM_LLAMA_CPP"
START_SECONDS, ANSWER_SECONDS = 120, 600


def find_server() -> Path | None:
    """llama-server: where OPENELM_LLAMA_CPP points (itself, a program beside it, or their folder),
    else on the PATH.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        found = shutil.which("llama-server")
        return Path(found) if found else None
    path = Path(os.path.expanduser(named))
    folder = path if path.is_dir() else path.parent
    candidates = (
        [path]
        if path.name.startswith("llama-server")
        else [folder / "llama-server", folder / "bin" / "llama-server"]
    )
    return next((p for p in candidates if p.is_file() and os.access(p, os.X_OK)), None)


class LlamaServer:
    """A running llama-server with one model and one slot, on a port of this machine that was
    free.
    """

    engine = "llama.cpp"

    def __init__(self, program: Path, gguf: Path, options: Sequence[str] = ()) -> None:
        """Start, with the model's own context, and wait until it is loaded.

        Raises `BenchmarkError` with the program's last words.
        """
        self.port = free_port()
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")
        command = [
            str(program),
            "-m",
            str(gguf),
            "-c",
            "0",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--parallel",
            "1",
            "-ngl",
            "999",
            "--no-warmup",
            *options,
        ]
        start = perf_counter()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            self.wait(start + START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.load_seconds = perf_counter() - start
        self.version = program_version(program)

    def wait(self, deadline: float) -> None:
        while perf_counter() < deadline:
            if self.process.poll() is not None:
                raise BenchmarkError(
                    f"llama-server ended with status {self.process.returncode}: {self.last_words()}"
                )
            with contextlib.suppress(OSError, HTTPException):
                if self.ask("GET", "/health")[0] == 200:
                    return
            sleep(0.01)
        raise BenchmarkError(
            f"llama-server was not ready after {START_SECONDS} s: {self.last_words()}"
        )

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Times are the server's own clock: to the first token, and from there to the last, spread
        evenly between.

        So the way through HTTP is not held against it. Raises `BenchmarkError` where it fails or
        stops early.
        """
        wish = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "repeat_penalty": 1.0,
            "samplers": ["temperature"],
        }
        try:
            status, answer = self.ask("POST", "/completion", wish)
            found = [int(token) for token in answer["tokens"]]
            first, rest = (
                answer["timings"]["prompt_ms"] / 1000,
                answer["timings"]["predicted_ms"] / 1000,
            )
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(
                f"llama-server gave no tokens with times: {reason(error)}; {self.last_words()}"
            ) from None
        if status != 200 or len(found) != tokens:
            raise BenchmarkError(
                f"llama-server gave {len(found)} tokens of {tokens} (status {status})"
            )
        steps = max(tokens - 1, 1)
        return Timed(tuple(found), tuple(first + rest * number / steps for number in range(tokens)))

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        with contextlib.closing(connection):
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read()[-2000:].splitlines() if line.strip()]
        return " / ".join(lines[-3:]) or "it said nothing"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program_version(program: Path) -> str:
    """`version: 4321 (abcdef0)` -> `4321`."""
    try:
        said = subprocess.run(
            [str(program), "--version"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    match = re.search(r"version:\s*(\S+)", said.stdout + said.stderr)
    return match.group(1) if match else "unknown"
