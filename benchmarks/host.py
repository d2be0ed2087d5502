"""Time the host takes to build and submit one step, with the device's work taken away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from openelm_mlx.benchmarks.standins import one_primitive_each
from openelm_mlx.benchmarks.traced import (
    DTYPES,
    Form,
    mlx_lm_caches,
    mlx_lm_model,
    mlx_lm_step,
    our_buffers,
    our_model,
    our_step,
    shrunk,
)

from openelm_mlx.config import OpenELMConfig

WARM_UP, CONTEXT = 10, 8


def host_seconds(config: OpenELMConfig, form: Form, steps: int) -> dict[str, float]:
    """Median seconds to build and submit a step: ours compiled, ours eager, and mlx-lm's, in turns.

    As many layers as `config` has, each of the least width; every `mx.fast` call is one primitive that computes
    nothing, as on a GPU it is one kernel. What was submitted is awaited outside the clock.
    """
    small = shrunk(config)
    with one_primitive_each():
        ours = our_model(small, form)
        runs = {
            "openelm-mlx, compiled": ours_in_turn(small, form, our_step(ours, compiled=True)),
            "openelm-mlx, eager": ours_in_turn(small, form, our_step(ours, compiled=False)),
            "mlx-lm": mlx_lm_in_turn(small, form),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for count in range(WARM_UP + steps):
            for name, run in runs.items():
                start = time.thread_time()
                run()
                stop = time.thread_time()
                mx.synchronize()
                if count >= WARM_UP:
                    seconds[name].append(stop - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ours_in_turn(config: OpenELMConfig, form: Form, step: Callable[..., tuple[mx.array, mx.array, list[mx.array]]]):  # type: ignore[no-untyped-def]
    buffers = [[mx.zeros(a.shape, a.dtype) for a in arrays] for arrays in our_buffers(config, 256, DTYPES[form.dtype])]
    state = [mx.array([1], mx.uint32), mx.array([CONTEXT]), buffers]
    mx.eval(state)

    def run() -> None:
        state[:] = step(*state)
        mx.async_eval(state[0])

    return run


def mlx_lm_in_turn(config: OpenELMConfig, form: Form) -> Callable[[], None]:
    caches = mlx_lm_caches(config, CONTEXT, DTYPES[form.dtype])
    for cache in caches:
        cache.keys, cache.values = mx.zeros(cache.keys.shape, cache.keys.dtype), mx.zeros(cache.values.shape, cache.values.dtype)
    mx.eval([cache.keys for cache in caches], [cache.values for cache in caches])
    step = mlx_lm_step(mlx_lm_model(config, form), caches)
    state = [mx.array([1], mx.uint32)]

    def run() -> None:
        for cache in caches:
            cache.offset = min(cache.offset, 200)  # stay inside the first block, which both engines then do
        state[0], logprobs = step(state[0])
        mx.async_eval(state[0], logprobs)

    return run
