"""The engines that are timed on the same weights: this one and its peers, each behind a `Session`.

A session answers for its own tokens and times only. Whether the tokens agree, and so whether the
times count, is decided in `measure`, which nothing here may import. Each peer's package is optional
and is imported when it is opened.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from openelm_mlx.benchmarks.results import OURS
from openelm_mlx.errors import BenchmarkError, OpenELMError, OptionError, reason

# the module of each peer, and the packages that it needs; llama.cpp is a package or a program
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mlx-lm": ("on_mlx", ("mlx_lm",)),
    "llama.cpp": ("llama_cpp", ()),
    "torch": ("torch_reference", ("torch", "safetensors")),
}
PEERS = tuple(NEEDS)
START_UP = "import sys; from openelm_mlx.benchmarks import peers; sys.exit(peers.start_up())"


@dataclass(frozen=True)
class Timed:
    """A generation, token by token.

    `tokens` are greedy, and those of the first sequence if a batch has several. `seconds[i]` is
    when token i was known to the host, counted from handing over the prompt.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_memory_bytes: int | None = None
    tokens_per_pass: float | None = None  # of the target model, under speculation

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def decoding(self) -> float:
        """Seconds from the first token to the last, which is `len(tokens) - 1` steps."""
        return self.seconds[-1] - self.seconds[0]

    def prefill_rate(self, prompt_tokens: int, batch_size: int = 1) -> float:
        """Return prompt tokens a second; the first token comes out of the prompt's own pass."""
        return batch_size * prompt_tokens / self.first

    def decode_rate(self, batch_size: int = 1) -> float | None:
        """Return tokens a second after the first, over all sequences; None without a step."""
        steps = len(self.tokens) - 1
        return batch_size * steps / self.decoding if steps and self.decoding > 0 else None


class Session(Protocol):
    """An engine with a model loaded, ready to be timed."""

    engine: str  # OURS or one of PEERS
    version: str
    load_seconds: float
    notes: tuple[str, ...]  # what belongs beside its figures

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Generate exactly `tokens` greedy tokens after `prompt` (ids, at least one).

        The end of text is ignored, and nothing of an earlier call is reused.
        """
        ...

    def close(self) -> None:
        """Free the model. The session cannot be used afterwards."""
        ...


def why_not(name: str) -> str | None:
    """Return why the peer `name` cannot run here, and the remedy, in one line; None if it can.

    This imports no engine. Raises `OptionError` for an unknown peer.
    """
    if name not in PEERS:
        raise OptionError(f"{name!r} is not a peer; known: {', '.join(PEERS)}")
    module, packages = NEEDS[name]
    if not packages:
        obstacle: str | None = module_of(module).why_not()
        return obstacle
    missing = [package.replace("_", "-") for package in packages if find_spec(package) is None]
    return f"not installed: `pip install {' '.join(missing)}`" if missing else None


def open_peer(name: str, folder: Path, dtype: str) -> Session:
    """Open the peer `name` with the model in `folder`, which it computes in `dtype`.

    llama.cpp takes a GGUF too. `load_seconds` counts from reading the weights until the engine is
    ready, without imports and without a tokenizer; llama.cpp maps its file and reads it as it goes.
    Raises `OptionError` for an unknown name, and `BenchmarkError` if the peer cannot run or
    load.
    """
    if obstacle := why_not(name):
        raise BenchmarkError(f"{name} cannot run here: {obstacle}")
    try:
        session: Session = module_of(NEEDS[name][0]).open_session(folder, dtype)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{name} cannot load {folder}: {reason(error)}") from error
    return session


def prepared(name: str, folder: Path, dtype: str, scratch: Path) -> Path:
    """Return what `open_peer` opens without converting it: for llama.cpp a new GGUF in `scratch`.

    Whoever times the opening needs it. Raises `ConversionError` for a model that the peer cannot
    express.
    """
    if name == "llama.cpp":
        written: Path = module_of(NEEDS[name][0]).write_gguf(folder, dtype, scratch)
        return written
    return folder


def module_of(name: str) -> Any:
    return import_module(f"{__name__}.{name}")


def start_up() -> int:
    """Print the first token of the task in argv[1]: what a new process does to be timed.

    `sys.executable -c START_UP TASK` runs it. The task is JSON: engine, folder, dtype, tokenizer
    and prompt.
    """
    task = json.loads(sys.argv[1])
    folder = Path(task["folder"])
    try:
        if task["engine"] == OURS:
            session = module_of("on_mlx").open_ours(folder, task["dtype"], task["tokenizer"])
        else:
            session = open_peer(task["engine"], folder, task["dtype"])
        timed = session.generate(task["prompt"], 1)
    except OpenELMError as error:
        print(error, file=sys.stderr)
        return 2
    print("token", timed.tokens[0], flush=True)
    session.close()
    return 0
