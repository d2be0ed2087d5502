"""The memory that a model needs while it generates, and the means to stay within it.

What a model needs, the chunk of a prompt that fits, and whether a model can be loaded are pure
functions of shapes and of the bytes that Metal recommends at most. None of it was measured on
Metal. Two things change the process: memory is kept wired only while something generates or
trains, and freed memory goes back to the system where MLX has kept much of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from openelm_mlx import device
from openelm_mlx.device import mx
from openelm_mlx.engine.options import KV_BITS, EngineOptions
from openelm_mlx.errors import CacheError, OptionError
from openelm_mlx.model.cache_kinds import CacheKind, Quantized
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.model.footprint import activations

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

CHUNKS = (512, 256, 128, 64)  # prompt tokens of one pass, the largest first
# Memory that MLX has freed and keeps to use again. On Metal its own limit is 1.5 times what Metal
# recommends (mlx/backend/metal/allocator.cpp), so a long prompt's activations would stay for good.
# A limit set with mx.set_cache_limit would also hold within a prompt, and make each layer ask the
# system for new memory; so it is given back once a prompt has been read (mlx-lm: after each chunk).
KEPT = 512 << 20
SHARE = 10  # where a device has more memory, MLX may keep this part of what is recommended

# Scores of attention, masked and as weights, in two layers: more are not in flight at once, because
# MLX commits by elements and runs ten command buffers ahead. Assumed, not measured.
SCORES = 3 * 2


class Needs(NamedTuple):
    """The bytes that a model takes while it generates, by what takes them."""

    weights: int
    cache: int  # keys and values of a full context
    activations: int  # of one pass over a prompt, if none are freed before its end
    other: int = KEPT  # what MLX keeps, and a step's own arrays: assumed

    @property
    def total(self) -> int:
        return sum(self)


def needs(
    config: OpenELMConfig, weights: int, kind: CacheKind, chunk: int, itemsize: int = 2
) -> Needs:
    """Return what one sequence needs; `itemsize` is the bytes of an activation."""
    slots = kind.layout.slots_for(config.max_context_length, 1)
    numbers = activations(config)
    if isinstance(kind.store, Quantized):  # MLX's attention is in parts for these
        numbers += SCORES * slots * max(shape.q_heads for shape in layer_shapes(config))
    cache = slots * kind.bytes_per_token(config, itemsize)
    return Needs(weights, cache, chunk * numbers * itemsize)


def prefill_chunk(
    config: OpenELMConfig, weights: int, kind: CacheKind, itemsize: int, available: int
) -> int:
    """Return how many prompt tokens one pass should read, of `CHUNKS`.

    Their activations take at most half of what the rest leaves of `available` bytes.
    """
    room = (available - needs(config, weights, kind, 0, itemsize).total) // 2
    passes = (needs(config, weights, kind, chunk, itemsize).activations for chunk in CHUNKS)
    fitting = (chunk for chunk, size in zip(CHUNKS, passes, strict=True) if size <= room)
    return next(fitting, CHUNKS[-1])


def chunk_for(engine: Engine, kind: CacheKind) -> int:
    """Return `prefill_chunk` for a loaded model on this machine: only Metal limits it."""
    if device.kind() != "metal":
        return CHUNKS[0]
    available = device.recommended_bytes()
    return prefill_chunk(engine.config, engine.nbytes, kind, itemsize_of(engine), available)


def itemsize_of(engine: Engine) -> int:
    """Return the bytes of an activation, and of a key or value that is not quantized."""
    return engine.model.transformer.norm.weight.dtype.size


def check_fits(
    name: str, config: OpenELMConfig, weights: int, quantized: bool, memory: int, available: int
) -> str | None:
    """Return a warning if a model needs more than the `available` bytes, and None if it does not.

    Raises `OptionError` if its weights alone are larger than `memory`.
    """
    least = config.num_parameters * 9 // 16  # at 4 bits, with the scales of groups of 64
    fewer = "fewer bits" if quantized else f"--bits 4 (about {least / 1e9:.1f} GB)"
    remedy = f"use {fewer} or a smaller model"
    if weights > memory:
        what = f"the weights of {name} take {weights / 1e9:.1f} GB"
        raise OptionError(f"{what}, and there are {memory / 1e9:.1f} GB of memory; {remedy}")
    needed = needs(config, weights, CacheKind(), CHUNKS[-1]).total
    if needed <= available:
        return None
    what = f"{name} needs about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are recommended"
    return f"{what} on this device; the system may swap: {remedy}"


def check_memory(name: str, config: OpenELMConfig, weights: int, quantized: bool) -> None:
    """Raise the error of `check_fits` for this machine, or log its warning."""
    kind = device.kind()
    most = device.recommended_bytes() if kind != "cpu" else 0
    memory = most if kind == "cuda" else device.memory_bytes()
    warning = check_fits(name, config, weights, quantized, memory, most or memory)
    if warning is not None:
        from logging import getLogger  # rarely needed

        getLogger("openelm.load").warning("%s", warning)


# --- the process


class Wired:
    """Memory that macOS does not page out while anything generates or trains.

    Each generator, and each training, holds what it needs. The limit is the sum, in which shared
    weights count once, and at most what Metal recommends; a limit that was higher stays. When the
    last holder has released its memory, the limit is what it was before. Not tested on Metal.
    """

    def __init__(self) -> None:
        # one that is dropped without a release counts no longer
        self._held: WeakKeyDictionary[object, dict[int, int]] = WeakKeyDictionary()
        self._before: int | None = None  # the limit that was found; None while nothing is held

    def hold(self, owner: object, engines: Sequence[Engine], kind: CacheKind, rows: int) -> None:
        """Keep wired what `engines` need for so many rows, until `owner` releases it."""
        if device.most_wired() is None:
            return
        held = {id(engine.model): engine.nbytes for engine in engines}
        each = (needs(e.config, 0, kind, 0, itemsize_of(e)).cache for e in engines)
        self.hold_bytes(owner, held | {id(owner): rows * sum(each)})

    def hold_bytes(self, owner: object, parts: dict[int, int]) -> None:
        """Keep wired so many bytes, by the ids of what has them, until `owner` releases them."""
        if device.most_wired() is not None:
            self._held[owner] = parts
            self._set()

    def release(self, owner: object) -> None:
        """Give back what `owner` holds, if anything."""
        if self._held.pop(owner, None) is not None:
            self._set()

    def _set(self) -> None:
        """Set the limit to what is held."""
        mx.synchronize()  # it must not change while anything is evaluated (mlx-lm's generate.py)
        if self._before is None:
            self._before = mx.set_wired_limit(0)  # only setting one tells what it was
        held: dict[int, int] = {}
        for parts in self._held.values():
            held |= parts
        if held:
            wanted = min(sum(held.values()) + KEPT, device.most_wired() or 0)
            mx.set_wired_limit(max(wanted, self._before))
        else:
            mx.set_wired_limit(self._before)
            self._before = None


wired = Wired()


def give_back(most: int = KEPT) -> None:
    """Return memory to the system if MLX keeps more than `most`, and much, that is not in use."""
    kept = mx.get_cache_memory()
    if kept > most and kept > device.recommended_bytes() // SHARE:
        mx.clear_cache()


# --- planning


def recommended_by_metal(memory: int) -> int:
    """Return the bytes that Metal recommends at most on a Mac with `memory` bytes: two thirds.

    So it was seen at 8 GB (5726.6 MB: ggml-org/llama.cpp issue 5207), 16 GB (10922.7 MiB:
    abetlen/llama-cpp-python issue 687) and 32 GB (21845.3 MiB: ggml-org/llama.cpp pull 2011).
    """
    return memory * 2 // 3


class Choice(NamedTuple):
    """Options with which a model could run, and what it needs with them."""

    bits: int | None
    kv_bits: int | None
    chunk: int
    needs: Needs


def choices(
    config: OpenELMConfig, weights: Mapping[int | None, int], available: int
) -> Iterator[Choice]:
    """Yield what could run, the most exact first.

    `weights` are the bytes of the weights by bits, None for the model as it is.
    """
    for bits, size in weights.items():
        for kv_bits in (None, *sorted(KV_BITS, reverse=True)):
            try:
                kind = CacheKind.of(config, EngineOptions(kv_bits=kv_bits))
            except CacheError:
                continue
            chunk = prefill_chunk(config, size, kind, 2, available)
            yield Choice(bits, kv_bits, chunk, needs(config, size, kind, chunk))


class Plan(NamedTuple):
    """The options with which a model fits on a Mac, if any do."""

    memory: int  # bytes of the machine
    available: int  # that Metal recommends at most
    plain: Choice  # the model as it is
    fitting: Choice | None  # the first of `choices` that fits


def plan(config: OpenELMConfig, weights: Mapping[int | None, int], memory: int) -> Plan:
    """Return the plan for a Mac with `memory` bytes; `weights` are those of `choices`."""
    available = recommended_by_metal(memory)
    every = list(choices(config, weights, available))
    fitting = (choice for choice in every if choice.needs.total <= available)
    return Plan(memory, available, every[0], next(fitting, None))
