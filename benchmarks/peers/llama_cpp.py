"""llama.cpp, on a GGUF with the very weights of the model folder.

It runs as its Python binding (llama-cpp-python) if that is installed, else as its llama-server;
a program named in OPENELM_LLAMA_CPP wins over both. `llama-bench` and `llama-cli` never show token
ids, so their times could not be checked; every build of llama.cpp has llama-server beside them,
which takes and gives ids. In float32 the cache is float32 too: float16 moves the logits.

An unquantized folder goes through our converter. MLX's affine 4 and 5 bits in groups of 32 or more
are, integer for integer, llama.cpp's Q4_1 and Q5_1 (weight = d * integer + m in blocks of 32, d and
m in float16; ggml/src/ggml-common.h), so such matrices keep their integers. No GGUF type has the
other quantizations, which are expanded to the type of the activations: llama.cpp then reads more
bytes, and its version says so.
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
from functools import cache
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np

from openelm_mlx.benchmarks.peers import Session, Timed
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import BenchmarkError, reason
from openelm_mlx.files import read_json
from openelm_mlx.model.checkpoint import read_headers, read_weights
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec, quantization_of, spec_of

VARIABLE = "OPENELM_LLAMA_CPP"
START_SECONDS, ANSWER_SECONDS = 120, 600
BLOCK = 32
KINDS = {4: "Q4_1", 5: "Q5_1"}  # by bits


def why_not() -> str | None:
    """Return why llama.cpp cannot run here, and the remedy; None if it can."""
    if find_spec("llama_cpp") or find_server():
        return None
    return (
        "neither llama-cpp-python nor llama-server is installed: `pip install llama-cpp-python` "
        f"or `brew install llama.cpp`, or name the program in {VARIABLE}"
    )


def find_server() -> Path | None:
    """Return llama-server: the one OPENELM_LLAMA_CPP points to, else the one on the PATH.

    The variable names the program, another one beside it, or their folder.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        found = shutil.which("llama-server")
        return Path(found) if found else None
    path = Path(os.path.expanduser(named))
    folder = path if path.is_dir() else path.parent
    candidates = [folder / "llama-server", folder / "bin" / "llama-server"]
    if path.name.startswith("llama-server"):
        candidates = [path]
    return next((p for p in candidates if p.is_file() and os.access(p, os.X_OK)), None)


def open_session(source: Path, dtype: str) -> Session:
    """Open a model folder, whose GGUF lives as long as the session, or a GGUF from `write_gguf`."""
    if source.is_file():
        return OnGguf(start(source, dtype), source)
    work = Path(tempfile.mkdtemp(prefix="openelm-gguf-"))
    try:
        gguf = write_gguf(source, dtype, work)
        return OnGguf(start(gguf, dtype), gguf, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def start(gguf: Path, dtype: str) -> LlamaBinding | LlamaServer:
    program = find_server()
    if program and (os.environ.get(VARIABLE) or find_spec("llama_cpp") is None):
        types = ("-ctk", "f32", "-ctv", "f32") if dtype == "float32" else ()
        return LlamaServer(program, gguf, types)
    return LlamaBinding(gguf, dtype)


class OnGguf:
    """A session that tells in what type its weights are, and deletes its file when it closes."""

    engine = "llama.cpp"

    def __init__(
        self, session: LlamaBinding | LlamaServer, gguf: Path, folder: Path | None = None
    ) -> None:
        self.session, self.folder = session, folder
        self.load_seconds, self.generate = session.load_seconds, session.generate
        self.version = f"{session.version}, weights {gguf.stem}"
        expanded = f"llama.cpp has no type for these weights: they run {gguf.stem}"
        self.notes: tuple[str, ...] = (expanded,) if " as " in gguf.stem else ()

    def close(self) -> None:
        self.session.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@cache
def silence() -> Any:
    """Return a log callback that drops what llama.cpp says: the terminal has a progress bar."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaBinding:
    """llama-cpp-python in this process."""

    def __init__(self, gguf: Path, dtype: str) -> None:
        import llama_cpp

        llama_cpp.llama_log_set(silence(), None)
        kind = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        allowed = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1
        settings = {"type_k": kind, "type_v": kind, "n_threads": cores, "n_threads_batch": cores}
        begin = perf_counter()
        self.model: Any = llama_cpp.Llama(
            str(gguf), n_ctx=0, n_gpu_layers=-1, verbose=False, **settings
        )
        self.load_seconds = perf_counter() - begin
        self.version = f"python {llama_cpp.__version__}"

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        found: list[int] = []
        seconds: list[float] = []
        self.model.reset()  # or it would reuse what it has of the prompt
        begin = perf_counter()
        for token in self.model.generate(prompt, temp=0.0):
            seconds.append(perf_counter() - begin)
            found.append(int(token))
            if len(found) == tokens:
                break
        return Timed(tuple(found), tuple(seconds))

    def close(self) -> None:
        self.model.close()


class LlamaServer:
    """A running llama-server with one model and one slot, on a free port of this machine."""

    def __init__(self, program: Path, gguf: Path, options: Sequence[str] = ()) -> None:
        """Start it with the model's own context, and wait until the model is loaded.

        Raises `BenchmarkError` with the last lines that the program printed.
        """
        self.port = free_port()
        self.log = tempfile.TemporaryFile(mode="w+", errors="replace")
        given = f"-c 0 --host 127.0.0.1 --port {self.port} --parallel 1 -ngl 999 --no-warmup"
        command = [str(program), "-m", str(gguf), *given.split(), *options]
        begin = perf_counter()
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            self.wait(begin + START_SECONDS)
        except BaseException:
            self.close()
            raise
        self.load_seconds = perf_counter() - begin
        self.version = program_version(program)

    def wait(self, deadline: float) -> None:
        while perf_counter() < deadline:
            if (status := self.process.poll()) is not None:
                what = f"llama-server ended with status {status}"
                raise BenchmarkError(f"{what}: {self.last_words()}")
            with contextlib.suppress(OSError, HTTPException):
                if self.ask("GET", "/health")[0] == 200:
                    return
            sleep(0.01)
        what = f"llama-server was not ready after {START_SECONDS} s"
        raise BenchmarkError(f"{what}: {self.last_words()}")

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Generate, timed by the server's own clock, so that HTTP does not count against it.

        It gives the time to the first token and from there to the last; those between are spread
        evenly. Raises `BenchmarkError` if it fails or stops early.
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
            times = answer["timings"]
            first, rest = times["prompt_ms"] / 1000, times["predicted_ms"] / 1000
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            what = f"llama-server gave no tokens with times: {reason(error)}"
            raise BenchmarkError(f"{what}; {self.last_words()}") from None
        if status != 200 or len(found) != tokens:
            what = f"{len(found)} tokens of {tokens} (status {status})"
            raise BenchmarkError(f"llama-server gave {what}")
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
        end(self.process)
        self.log.close()


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process to end, and kill it if it has not ended in 10 seconds."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program_version(program: Path) -> str:
    """Return the number of the program's version: `version: 4321 (abcdef0)` -> `4321`."""
    command = [str(program), "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    match = re.search(r"version:\s*(\S+)", done.stdout + done.stderr)
    return match.group(1) if match else "unknown"


# --- the GGUF


def write_gguf(folder: Path, dtype: str, scratch: Path) -> Path:
    """Write a GGUF into `scratch`, named for its matrices: `float32`, `Q4_1`, `8-bit as float32`.

    Raises `ConversionError` for a model that llama.cpp's architecture cannot express.
    """
    from openelm_mlx.convert import ConvertOptions, convert

    work = Path(tempfile.mkdtemp(prefix="gguf-", dir=scratch))
    path, label = work / "model.gguf", dtype
    if quantization_of(read_json(folder / "config.json")) is None:
        convert(ConvertOptions(folder, path, target_format="gguf", dtype=dtype))
    else:
        label = write_quantized(folder, dtype, path)
    return path.rename(work / f"{label}.gguf")


def write_quantized(folder: Path, dtype: str, path: Path) -> str:
    """Write a quantized folder, and return the types of its matrices."""
    from openelm_mlx.convert.targets import gguf
    from openelm_mlx.convert.tokenizers import read_tokenizer

    raw = read_json(folder / "config.json")
    config, quantization = OpenELMConfig.from_hf_dict(raw), quantization_of(raw) or {}
    gguf.check_gguf(config)
    weights, kinds, labels = read_weights(read_headers(folder)), {}, set()
    specs: dict[str, QuantSpec | None] = {}
    for name in expected_tensors(config):
        stem = name.removesuffix(".weight")
        spec = specs[name] = spec_of(quantization, stem) if f"{stem}.scales" in weights else None
        kinds[name] = DTYPES[dtype].gguf if weights[name].ndim == 2 else "F32"
        if spec is not None:
            kinds[name] = same_integers(spec) or kinds[name]
            labels.add(same_integers(spec) or f"{spec.bits}-bit as {dtype}")

    def encoded(name: str, spec: QuantSpec | None) -> np.ndarray:
        array, stem = weights[name], name.removesuffix(".weight")
        if spec is not None:
            parts = array, weights[f"{stem}.scales"], weights.get(f"{stem}.biases")
            if same_integers(spec):
                return blocks(*parts, spec)
            array = mx.dequantize(*parts, **spec.as_config())
        return gguf.encoded(name, array, kinds[name])

    tokenizer = read_tokenizer(folder / "tokenizer.model")
    rows = ((name, encoded(name, spec)) for name, spec in specs.items())
    gguf.write_gguf(path, gguf.Head(folder.name, "F32"), config, tokenizer, kinds, rows)
    return ", ".join(sorted(labels))


def same_integers(spec: QuantSpec) -> str | None:
    """Return the GGUF type that has the same integers, if there is one."""
    return KINDS.get(spec.bits) if spec.mode == "affine" and spec.group_size % BLOCK == 0 else None


def blocks(words: mx.array, scales: mx.array, biases: Any, spec: QuantSpec) -> np.ndarray:
    """Return Q4_1 or Q5_1 blocks, [rows, bytes]: d, m, for 5 bits the 32 high bits, the low ones.

    Byte i of the low bits has the integers i and i + 16 of its block.
    """
    integers = unpacked(np.array(words), spec.bits).reshape(words.shape[0], -1, BLOCK)
    parts: list[np.ndarray] = []
    for array in (scales, biases):
        halves = np.array(array.astype(mx.float16)).repeat(spec.group_size // BLOCK, axis=1)
        parts.append(halves[..., None].view(np.uint8))
    if spec.bits == 5:
        parts.append(np.packbits(integers >> 4, axis=-1, bitorder="little"))
    low = integers & 15
    parts.append(low[..., :16] | low[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(integers.shape[0], -1)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Turn [rows, words] uint32 into [rows, columns] uint8; a row is one stream of bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    columns = stream.reshape(len(words), -1, bits)
    return np.packbits(columns, axis=-1, bitorder="little")[..., 0]
