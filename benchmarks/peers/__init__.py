"""Other engines that run the same weights: each optional, each behind the `Session` of timing.py.

    mlx_lm.py           mlx-lm, on the same model folder
    llama_cpp.py        llama.cpp, as its Python binding or its server, on a GGUF with the same weights (llama_gguf.py)
    torch_reference.py  OpenELM in PyTorch, written here to be read; on Apple's GPU or the CPU

A peer answers only for its own tokens and times. Whether the tokens are ours, and so whether the
times count, is for the harness to say.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.errors import BenchmarkError, OptionError, reason

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.measure.timing import Session

MODULES = {"mlx-lm": "mlx_lm", "llama.cpp": "llama_cpp", "torch": "torch_reference"}
PEERS = tuple(MODULES)


def why_not(name: str) -> str | None:
    """What keeps the peer `name` from running here, with its remedy, in one line; None where it
    runs.

    Imports no engine. Raises `OptionError` for a name that is no peer.
    """
    if name not in PEERS:
        raise OptionError(f"{name!r} is no peer; known: {', '.join(PEERS)}")
    if name == "llama.cpp":
        from openelm_mlx.benchmarks.peers.llama_server import find_server

        if find_spec("llama_cpp") or find_server():
            return None
        return (
            "neither llama-cpp-python nor llama-server is installed: `pip install llama-cpp-python` or "
            "`brew install llama.cpp`, or name the program in OPENELM_LLAMA_CPP"
        )
    needed = {"mlx-lm": ("mlx_lm",), "torch": ("torch", "safetensors")}[name]
    missing = [module.replace("_", "-") for module in needed if find_spec(module) is None]
    return f"not installed: `pip install {' '.join(missing)}`" if missing else None


def open_peer(name: str, folder: Path, dtype: str | None = None) -> Session:
    """The peer `name` with the model of `folder` loaded, computing in `dtype` (None: what our
    loader would take).

    In place of a folder llama.cpp also takes a GGUF, and then needs a `dtype`.

    `load_seconds` of the session counts from the start of reading the weights until the engine is
    ready (llama.cpp maps its file and reads it as it goes), without the import of the engine and
    without a tokenizer; `notes`, where a session has them, belong beside its figures. Raises
    `OptionError` for an unknown name, `BenchmarkError` where the peer is not usable or cannot load
    the model.
    """
    if obstacle := why_not(name):
        raise BenchmarkError(f"{name} cannot run here: {obstacle}")
    module = import_module(f"openelm_mlx.benchmarks.peers.{MODULES[name]}")
    try:
        given = dtype if dtype is not None and folder.is_file() else dtype_of(folder, dtype)
        session: Session = module.open_session(folder, given)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{name} cannot load {folder}: {reason(error)}") from error
    return session


def prepared(name: str, folder: Path, dtype: str, scratch: Path) -> Path:
    """What `open_peer` opens without converting it first: the folder itself, for llama.cpp a GGUF
    written into `scratch`.

    For those who time the opening. Raises `ConversionError` for a model that the peer cannot
    express.
    """
    if name != "llama.cpp":
        return folder
    from openelm_mlx.benchmarks.peers.llama_cpp import prepare

    return prepare(folder, dtype, scratch)


def dtype_of(folder: Path, asked: str | None) -> str:
    """The type our loader would compute in, by name. Raises what `load` raises for a type that does
    not fit.
    """
    from openelm_mlx.dtypes import name_of
    from openelm_mlx.engine.loading import compute_dtype, read_weights
    from openelm_mlx.model.config import OpenELMConfig

    config = OpenELMConfig.from_file(folder / "config.json")
    return name_of(compute_dtype(config, read_weights(folder), asked))
