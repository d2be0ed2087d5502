"""llama.cpp behind the `Session` of timing.py, on a GGUF with the very weights of the model folder.

Its Python binding (llama-cpp-python) where that is installed, else its llama-server; a program
named in OPENELM_LLAMA_CPP wins over both. In float32 its cache is float32 too: the default float16
cache moves the logits.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from openelm_mlx.benchmarks.measure.timing import Session, Timed
from openelm_mlx.benchmarks.peers.llama_gguf import write_gguf
from openelm_mlx.benchmarks.peers.llama_server import VARIABLE, LlamaServer, find_server


@cache
def silence() -> Any:
    """A log callback that drops what llama.cpp says while it works: the terminal belongs to the
    progress bar.
    """
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """llama-cpp-python in this process."""

    engine = "llama.cpp"

    def __init__(self, gguf: Path, dtype: str) -> None:
        import llama_cpp

        llama_cpp.llama_log_set(silence(), None)
        kind = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        start = perf_counter()
        self.model: Any = llama_cpp.Llama(
            str(gguf),
            n_ctx=0,
            n_gpu_layers=-1,
            type_k=kind,
            type_v=kind,
            verbose=False,
            n_threads=cores,
            n_threads_batch=cores,
        )
        self.load_seconds = perf_counter() - start
        self.version = f"python {llama_cpp.__version__}"

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        found: list[int] = []
        seconds: list[float] = []
        self.model.reset()  # or it would reuse what it holds of the prompt
        start = perf_counter()
        for token in self.model.generate(prompt, temp=0.0):
            seconds.append(perf_counter() - start)
            found.append(int(token))
            if len(found) == tokens:
                break
        return Timed(tuple(found), tuple(seconds))

    def close(self) -> None:
        self.model.close()


class Owned:
    """A session that takes its folder of files with it when it closes; its version tells the
    weights' form.
    """

    def __init__(self, session: Session, form: str, folder: Path | None) -> None:
        self.session, self.folder = session, folder
        self.engine, self.load_seconds = session.engine, session.load_seconds
        self.version = f"{session.version}, weights {form}"
        self.notes = (
            (f"llama.cpp has no type for these weights: they run {form}",) if " as " in form else ()
        )

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        return self.session.generate(prompt, tokens)

    def close(self) -> None:
        self.session.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def prepare(folder: Path, dtype: str, scratch: Path) -> Path:
    """The folder's GGUF in `scratch`, named for the form of its weights."""
    work = Path(tempfile.mkdtemp(prefix="gguf-", dir=scratch))
    path = work / "model.gguf"
    return path.rename(work / f"{write_gguf(folder, dtype, path)}.gguf")


def open_session(source: Path, dtype: str) -> Session:
    """Of a model folder, whose GGUF lives as long as the session; or of a GGUF that `prepare`
    wrote.
    """
    if source.is_file():
        return Owned(start(source, dtype), source.stem, None)
    work = Path(tempfile.mkdtemp(prefix="openelm-gguf-"))
    try:
        gguf = prepare(source, dtype, work)
        return Owned(start(gguf, dtype), gguf.stem, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def start(gguf: Path, dtype: str) -> Session:
    program = find_server()
    if program and (os.environ.get(VARIABLE) or find_spec("llama_cpp") is None):
        return LlamaServer(
            program, gguf, ("-ctk", "f32", "-ctv", "f32") if dtype == "float32" else ()
        )
    return LlamaCpp(gguf, dtype)
