"""Measure what work costs on a device: a tiny kernel, a byte, and whole steps of a model.

Times are medians, or averages over many steps; nothing is compared with another engine here.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from openelm_mlx import device
from openelm_mlx.benchmarks.ledger.steps import our_state, our_step, shrunk
from openelm_mlx.benchmarks.measure.weights import random_tensor
from openelm_mlx.benchmarks.results.first_run import Buffers, Decoded, Kernels, Read
from openelm_mlx.device import mx
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.decode import State
from openelm_mlx.engine.loading import quantize_now
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.model.kernels.kernel import ALL, check_of, choice, runner, running
from openelm_mlx.model.kernels.self_check import wrong_kernels
from openelm_mlx.quantization import MLX_GROUP_SIZE

SHORT, LONG = 400, 3200  # kernels of a chain; the difference leaves out what every chain costs
BESIDE = 8
WARM_UP = 8  # steps that compile, and fill the pipeline
FIRST = 40  # position of the first step that is timed
SLOTS = (256, 2048)
# command buffers: kernels, and elements in units of 2**20; on a Mac MLX's own are 40 or 50 of each
LIMITS = (None, ("20", "40"), ("40", "40"), ("200", "40"), ("1000", "40"), ("1000", "400"))
VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
CHILD_SECONDS = 300
CHILD = "from openelm_mlx.benchmarks.doctor.steps import child; child({!r})"


def median_seconds(run: Callable[[], Any], trials: int = 7) -> float:
    """Return the median duration of `run`, the first two left out."""
    seconds = []
    for _ in range(trials + 2):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


# --- kernels and bytes


def costs(quick: bool) -> Iterator[tuple[str, Any]]:
    """Yield each figure of `Costs` with its name."""
    yield "round_trip_seconds", median_seconds(lambda: chains(1, 1), 15)
    dispatch, beside = (between(wide) for wide in (1, BESIDE))
    yield "dispatch_seconds", dispatch
    yield "beside_seconds", beside
    built, submitted = host_seconds()
    yield "build_seconds", built
    yield "submit_seconds", submitted
    yield "gemv_bytes_per_second", gemv_rates(1024 if quick else 16384)
    if names := sorted(choice().names):
        start = time.perf_counter()
        for name in names:
            check_of(name)
        yield "kernel_check_seconds", time.perf_counter() - start


def chains(kernels: int, wide: int) -> None:
    """Run so many kernels in `wide` chains; each reads what the one before it wrote."""
    ends = []
    for number in range(wide):
        x = mx.full((64,), float(number))
        for _ in range(kernels // wide):
            x = mx.sin(x)
        ends.append(x)
    mx.eval(ends)


def between(wide: int) -> float:
    """Return the seconds of one more kernel in a long chain."""
    short, long = (median_seconds(lambda n=n: chains(n, wide)) for n in (SHORT, LONG))  # type: ignore[misc]
    return max(long - short, 0.0) / (LONG - SHORT)


def host_seconds() -> tuple[float, float]:
    """Return the seconds that the host takes for a kernel: to build it, and to submit it."""
    pairs = []
    for _ in range(5):
        x = mx.zeros((64,))
        mx.eval(x)
        start = time.perf_counter()
        for _ in range(LONG):
            x = mx.sin(x)
        built = time.perf_counter()
        mx.async_eval(x)
        pairs.append((built - start, time.perf_counter() - built))
        mx.eval(x)
    build, submit = (statistics.median(values) / LONG for values in zip(*pairs, strict=True))
    return build, submit


def gemv_rates(rows: int) -> dict[str, float]:
    """Return the bytes a second of a matrix [rows, 4096] times a vector, by type of the matrix."""
    columns = 4096
    dtype = step_dtype()
    weights = mx.random.normal((rows, columns), key=mx.random.key(0)).astype(dtype)
    x = mx.random.normal((1, columns), key=mx.random.key(1)).astype(dtype)
    mx.eval(weights, x)
    found = {
        name_of(dtype): weights.nbytes / median_seconds(lambda: mx.eval(x @ weights.T)),
    }
    for bits in (8, 4):
        how: Any = {"group_size": MLX_GROUP_SIZE, "bits": bits}
        parts: Any = mx.quantize(weights, **how)
        mx.eval(parts)
        product: Any = mx.quantized_matmul
        multiply = partial(product, x, *parts, transpose=True, **how)
        seconds = median_seconds(lambda multiply=multiply: mx.eval(multiply()))  # type: ignore[misc]
        found[f"{bits} bits"] = sum(part.nbytes for part in parts) / seconds
    return found


# --- whole steps


def step_dtype() -> mx.Dtype:
    """The type in which a device computes a model unless told otherwise."""
    return mx.float32 if device.kind() == "cpu" else mx.bfloat16


def timed_config() -> tuple[str, OpenELMConfig]:
    """Return the model whose steps are timed: a narrow one on a CPU, where only this code is
    tried.
    """
    config = OpenELMConfig.from_name("270m")
    if device.kind() == "cpu":
        return "270m, as narrow as can be", shrunk(config)
    return "270m", config


def random_model(config: OpenELMConfig, bits: int | None) -> OpenELM:
    """Return a model of random weights in `step_dtype`, perhaps quantized."""
    model, dtype = OpenELM(config), step_dtype()
    names = sorted(parameters(model).items())
    keys = mx.random.split(mx.random.key(0), len(names))
    made = zip(names, keys, strict=True)
    model.load_weights([(name, random_tensor(array, key, dtype)) for (name, array), key in made])
    if bits is not None:
        quantize_now(model, bits, MLX_GROUP_SIZE)
    mx.eval(model.parameters())
    return model


def started(config: OpenELMConfig, slots: int) -> State:
    """Return the state of one greedy row at position FIRST, with buffers of so many slots."""
    state = our_state(config, 1, slots, step_dtype())
    buffers = [[mx.zeros(a.shape, a.dtype) for a in arrays] for arrays in state.buffers]
    state = state._replace(position=mx.array([FIRST], mx.int32), buffers=buffers)
    mx.eval(state)
    return state


class Stepper:
    """One row that is decoded. Nobody else holds its state: MLX can then reuse the buffers."""

    def __init__(self, model: OpenELM, slots: int, ahead: bool, compiled: bool = True) -> None:
        self.step, self.state = our_step(model, compiled), started(model.args, slots)
        self.ahead = ahead

    def run(self, count: int) -> float:
        """Return the seconds of each of `count` steps; see `Decoded.ahead`."""
        start = time.perf_counter()
        for _ in range(count):
            token = self.state.token
            self.state = self.step(self.state)
            mx.async_eval(self.state.token, self.state.position)
            (token if self.ahead else self.state.token).item()
        mx.synchronize()
        return (time.perf_counter() - start) / count


def decoded(quick: bool) -> Iterator[Decoded]:
    """Time whole steps: in three types of weights, two sizes of buffers, one step ahead or not,
    with kernels of ours, without, and with those of attention that are not in use; and once not
    compiled.
    """
    _, config = timed_config()
    count = 8 if quick else 100
    sets = list(kernel_sets().items())
    for bits in (None, 4) if quick else (None, 8, 4):
        model = random_model(config, bits)
        for slots, ahead, kernels in product(SLOTS[: 1 if quick else 2], (True, False), sets):
            yield one_setting(model, bits, slots, ahead, kernels, count)
        yield one_setting(model, bits, SLOTS[0], True, sets[0], count, compiled=False)


def kernel_sets() -> dict[Kernels, frozenset[str]]:
    """Return the kernels of ours to time steps with: those in use come first.

    None of them has failed its check.
    """
    names = choice().names
    if not names:
        return {"none": frozenset()}
    right = frozenset(ALL) - wrong_kernels(ALL, check_of).keys()
    every: dict[Kernels, frozenset[str]] = {"all": right} if names < right else {}
    return {"in use": names, "none": frozenset(), **every}


def one_setting(
    model: OpenELM,
    bits: int | None,
    slots: int,
    ahead: bool,
    kernels: tuple[Kernels, frozenset[str]],
    count: int,
    compiled: bool = True,
) -> Decoded:
    label, names = kernels
    with running(runner(), names):
        one = Stepper(model, slots, ahead, compiled)
        one.run(WARM_UP)
        # an even and an odd number: two buffers that take turns come back to where they were
        in_place = []
        for steps in (8, 9):
            before = addresses(one.state)
            one.run(steps)
            same = [a == b for a, b in zip(before, addresses(one.state), strict=True)]
            in_place.append(sum(same) / len(same))
        mx.reset_peak_memory()
        seconds = one.run(count)
        extra = max(mx.get_peak_memory() - mx.get_active_memory(), 0)
    about = name_of(step_dtype()), bits, slots, ahead, compiled, label
    return Decoded(*about, seconds, float(extra), tuple(in_place))


def addresses(state: State) -> list[int]:
    """Return where the first buffer of each layer lies."""
    found = []
    for first, *_ in state.buffers:
        view = memoryview(first.view(mx.uint8))  # type: ignore[arg-type]
        found.append(ctypes.addressof(ctypes.c_char.from_buffer(view)))
    return found


def read(quick: bool) -> Iterator[Read]:
    """Time a prompt in one pass, the second of two."""
    _, config = timed_config()
    model = random_model(config, None)
    for tokens in (64,) if quick else (64, 256, 512, 1024, 2048):
        yield one_prompt(model, tokens)


def one_prompt(model: OpenELM, tokens: int) -> Read:
    ids = mx.array([[1 + number % 50 for number in range(tokens)]])
    seconds = 0.0
    for _ in range(2):
        mx.reset_peak_memory()
        start = time.perf_counter()
        hidden = model.hidden(ids, KVCache(model.args), last=True)
        mx.eval(model.logits(hidden))
        seconds = time.perf_counter() - start
    return Read(tokens, tokens / seconds, float(mx.get_peak_memory()))


# --- command buffers: MLX reads their limits once, so each pair has a process


def buffers(quick: bool) -> Iterator[Buffers]:
    """Run `child` with each pair of limits; only Metal has them, elsewhere it runs once."""
    for pair in LIMITS if device.kind() == "metal" else LIMITS[:1]:
        environ = {name: text for name, text in os.environ.items() if name not in VARIABLES}
        environ |= dict(zip(VARIABLES, pair, strict=True)) if pair else {}
        command = [sys.executable, "-P", "-c", CHILD.format(quick)]
        environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=CHILD_SECONDS
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
            raise BenchmarkError(f"limits {pair or 'as they are'}: {last[0]}")
        operations, elements = map(int, pair) if pair else (None, None)
        yield Buffers(operations, elements, **json.loads(done.stdout))


def child(quick: bool) -> None:
    """Print what `Buffers` says of this process, for 4-bit weights."""
    _, config = timed_config()
    model = random_model(config, 4)
    seconds = {}
    for slots in SLOTS:
        one = Stepper(model, slots, ahead=True)
        one.run(WARM_UP)
        seconds[str(slots)] = one.run(8 if quick else 150)
    prompt = one_prompt(model, 64 if quick else 1024)
    found = {
        "seconds_per_token": seconds,
        "prompt_seconds": prompt.tokens / prompt.tokens_per_second,
    }
    print(json.dumps({**found, "prompt_peak_bytes": prompt.peak_bytes}))
