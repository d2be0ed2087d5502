"""The form of a kernel, the place where it runs, and the choice of those in use.

A kernel's source is the body of a function in Metal's language, as `mx.fast.metal_kernel` takes it;
`cuda` runs it on an NVIDIA GPU, too. None of them has run on a Mac. A processor has no kernels:
there the twins run, and in tests an emulator runs the kernels (tests/helpers/metal_emulator.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from openelm_mlx.device import kind, mx, on_processor
from openelm_mlx.errors import OptionError
from openelm_mlx.model.kernels.self_check import wrong_kernels

Size = tuple[int, int, int]

SIMD = 32  # threads of a SIMD group
MOST_ROWS = 65535  # of CUDA's grids, in y and z
TYPES = (mx.bfloat16, mx.float16, mx.float32)  # of activations

_in_place: set[str] = set()  # the names of kernels that write to an input


@dataclass(frozen=True)
class Kernel:
    """The source of a kernel and the names of what it reads and writes.

    `in_place` names the inputs that it writes to, which MLX does not know of. The caller makes sure
    of four things: every reader of what was written depends on an output of the kernel, nothing
    else needs the old content, the array is row contiguous and has at least 8 elements, and the
    graph is evaluated once. docs/architecture.md ("Keys and values") says how caches see to it.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    header: str = ""
    in_place: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.in_place:
            _in_place.add(self.name)

    def __call__(self, *inputs: mx.array, **launch: Any) -> list[mx.array]:
        """Return the outputs; the keywords are those of `Launch`."""
        return runner()(self, list(inputs), Launch(**launch))


@dataclass(frozen=True)
class Launch:
    """The grid, the outputs and the template of one launch.

    `grid` counts threads and is a multiple of `threadgroup`, and that of a SIMD group: Metal cuts
    the last one short, and CUDA runs all of it.
    """

    grid: Size
    threadgroup: Size
    shapes: list[tuple[int, ...]]  # of the outputs
    dtypes: list[mx.Dtype]
    template: tuple[tuple[str, Any], ...] = ()  # types, integers and booleans by name


Runner = Callable[[Kernel, list[mx.array], Launch], list[mx.array]]


def on_metal(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
    """Launch a kernel on the GPU of a Mac."""
    outputs: list[mx.array] = made_for_metal(kernel)(
        inputs=inputs,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=launch.shapes,
        output_dtypes=launch.dtypes,
    )
    return outputs


@cache
def made_for_metal(kernel: Kernel) -> Any:
    return mx.fast.metal_kernel(
        kernel.name, list(kernel.inputs), list(kernel.outputs), kernel.source, kernel.header
    )


# --- inputs that kernels share, constants of compiled steps


@lru_cache
def scalar(value: float) -> mx.array:
    """Return a number as an array without dimensions."""
    return mx.array(value, mx.float32)


@lru_cache(maxsize=1024)
def integers(*values: int) -> mx.array:
    """Return integers as an array."""
    return mx.array(values, mx.int32)


# --- the choice of those in use

# the files of kernels, by whose names they are chosen and checked
NAMES = ("norm_rope_store", "add_rms_norm", "sample")  # in use on every GPU
# MLX's attention for Metal is tuned for its chips, and nobody has compared ours with it there; for
# CUDA, MLX has none that is fused and takes a mask.
ATTENTION = ("attend", "store_and_attend")
ALL = (*NAMES, *ATTENTION)
NAMES_BY_BACKEND = {"metal": NAMES, "cuda": ALL}


@dataclass(frozen=True)
class Choice:
    """The kernels in use, by name, and why not all of them are."""

    names: frozenset[str]
    reason: str = ""

    def __str__(self) -> str:
        """Return "add_rms_norm, sample (norm_rope_store: its output is ...)"."""
        names = ", ".join(sorted(self.names)) or "none of ours"
        return names + (f" ({self.reason})" if self.reason else "")


def choose(backend: str, environ: Mapping[str, str], wrong: Mapping[str, str]) -> Choice:
    """Choose the kernels of a backend; `wrong` has those that failed their check, with the reason.

    OPENELM_KERNELS=all adds those of attention where they are not used otherwise. Raises
    `OptionError` for a value of it other than on, off and all.
    """
    wish = environ.get("OPENELM_KERNELS") or "on"
    if wish not in ("on", "off", "all"):
        raise OptionError(f"OPENELM_KERNELS is {wish!r}; allowed: on, off, all")
    if backend == "cpu":
        return Choice(frozenset(), "only GPUs run them")
    if wish == "off":
        return Choice(frozenset(), "OPENELM_KERNELS is off")
    reason = "; ".join(f"{name}: {why}" for name, why in wrong.items())
    names = ALL if wish == "all" else NAMES_BY_BACKEND[backend]
    return Choice(frozenset(names) - wrong.keys(), reason)


_overridden: list[tuple[frozenset[str], Runner]] = []  # the latest one counts


@cache
def choice() -> Choice:
    """Return what is chosen for this process; kernels that were not checked here yet are now."""
    chosen = choose(kind(), os.environ, {})
    if chosen.names:
        chosen = choose(kind(), os.environ, wrong_kernels(sorted(chosen.names), check_of))
    return chosen


def check_of(name: str) -> str:
    """Return how the kernel of a file differs from its twin, "" if it does not.

    `check()` of that file compares the two on inputs small enough to add little to the compiling.
    Its kernel is in use meanwhile, and no other; inside `twins()` none is.
    """
    with running(runner(), frozenset({name})):
        # by name, and only now: the files of kernels import this one
        text: str = import_module(f"openelm_mlx.model.kernels.{name}").check()
        return text


def in_use(kernel: Kernel) -> bool:
    """Return whether this kernel runs here, rather than its twin."""
    return kernel.name in names_in_use()


def writes_in_place() -> bool:
    """Return whether a kernel that is in use writes to arrays of which MLX believes otherwise."""
    return not _in_place.isdisjoint(names_in_use())


def names_in_use() -> frozenset[str]:
    if _overridden:
        return _overridden[-1][0]
    return frozenset() if on_processor() else choice().names


def runner() -> Runner:
    if _overridden:
        return _overridden[-1][1]
    if kind() != "cuda":
        return on_metal
    from openelm_mlx.model.kernels.cuda import on_cuda  # elsewhere it would only cost start-up

    return on_cuda


@contextmanager
def running(run: Runner, names: frozenset[str] = frozenset(NAMES)) -> Iterator[None]:
    """Let `run` launch the kernels of these names inside the block, and twins the others.

    A function that was compiled before keeps what it was traced with.
    """
    _overridden.append((names, run))
    try:
        yield
    finally:
        _overridden.pop()


def twins() -> AbstractContextManager[None]:
    """Let no kernel run inside the block."""
    return running(runner(), frozenset())
