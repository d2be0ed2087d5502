"""Time the host takes to build and to submit one step, with the device's work taken away."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Protocol

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

BLOCK, WARM_UP, CONTEXT = 12, 4, 8
STAY = 200  # steps that stay inside the first block of the buffers, 256 tokens


@dataclass(frozen=True)
class HostTime:
    """Medians, seconds of CPU time of the thread that generates: what it waits for is not its work."""

    build: float  # until the graph of a step exists
    submit: float  # until MLX has handed it to the device

    @property
    def total(self) -> float:
        return self.build + self.submit


class Host(Protocol):
    def build(self) -> None: ...
    def submit(self) -> None: ...


def host_times(config: OpenELMConfig, form: Form, steps: int) -> dict[str, HostTime]:
    """Our step, compiled and eager, and mlx-lm's: each in blocks of steps of its own, as it runs, the blocks in turns.

    As many layers as `config` has, each of the least width, in float32, which the CPU backend need not emulate; every
    `mx.fast` call is one primitive that computes nothing, as on a GPU it is one kernel. What was submitted is awaited
    outside the clock.
    """
    small, form = shrunk(config), Form("float32", form.quantization)
    with one_primitive_each():
        hosts: dict[str, Host] = {
            "openelm-mlx, compiled": OurHost(small, form, compiled=True),
            "openelm-mlx, eager": OurHost(small, form, compiled=False),
            "mlx-lm": PeerHost(small, form),
        }
        builds: dict[str, list[float]] = {name: [] for name in hosts}
        submits: dict[str, list[float]] = {name: [] for name in hosts}
        for _ in range(-(-steps // (BLOCK - WARM_UP))):
            for name, host in hosts.items():
                for count in range(BLOCK):
                    start = time.thread_time()
                    host.build()
                    built = time.thread_time()
                    host.submit()
                    stop = time.thread_time()
                    mx.synchronize()
                    if count >= WARM_UP:  # the first steps find the processor's caches filled by the other engine
                        builds[name].append(built - start)
                        submits[name].append(stop - built)
    return {name: HostTime(statistics.median(builds[name]), statistics.median(submits[name])) for name in hosts}


class OurHost:
    def __init__(self, config: OpenELMConfig, form: Form, compiled: bool) -> None:
        self.step = our_step(our_model(config, form), compiled)
        buffers = [[mx.zeros(a.shape, a.dtype) for a in arrays] for arrays in our_buffers(config, 256, DTYPES[form.dtype])]
        self.state: list[Any] = [mx.array([1], mx.uint32), mx.array([CONTEXT]), buffers]
        mx.eval(self.state)
        self.start, self.count = self.state[1], 0

    def build(self) -> None:
        self.count += 1
        if self.count % STAY == 0:  # beyond the buffers a step would write into other memory
            self.state[1] = self.start
        self.state[:] = self.step(*self.state)

    def submit(self) -> None:
        mx.async_eval(self.state[0])


class PeerHost:
    def __init__(self, config: OpenELMConfig, form: Form) -> None:
        self.caches = mlx_lm_caches(config, CONTEXT, DTYPES[form.dtype])
        for cache in self.caches:
            cache.keys, cache.values = (mx.zeros(a.shape, a.dtype) for a in (cache.keys, cache.values))
            mx.eval(cache.keys, cache.values)
        self.step = mlx_lm_step(mlx_lm_model(config, form), self.caches)
        self.token, self.logprobs = mx.array([1], mx.uint32), mx.array(0.0)

    def build(self) -> None:
        for cache in self.caches:
            cache.offset = min(cache.offset, STAY)
        self.token, self.logprobs = self.step(self.token)

    def submit(self) -> None:
        mx.async_eval(self.token, self.logprobs)
