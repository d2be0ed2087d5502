"""Time the host takes to build and to submit one step, with the device's work taken away."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from openelm_mlx.benchmarks.ledger.fake_fast_ops import one_primitive_each
from openelm_mlx.benchmarks.ledger.trace import (
    DTYPES,
    Form,
    mlx_lm_caches,
    mlx_lm_model,
    mlx_lm_step,
    our_model,
    our_state,
    our_step,
    ready,
    shrunk,
)
from openelm_mlx.device import mx, nn, utils
from openelm_mlx.model.config import OpenELMConfig

BLOCK, WARM_UP, CONTEXT = 12, 4, 8
STAY = 200  # steps that stay inside the first block of the buffers, 256 tokens


@dataclass(frozen=True)
class HostTime:
    """Medians, seconds of CPU time of the thread that generates: what it waits for is not its
    work.
    """

    build: float  # until the graph of a step exists
    submit: float  # until MLX has handed it to the device

    @property
    def total(self) -> float:
        return self.build + self.submit


class Host(Protocol):
    def build(self) -> None: ...
    def submit(self) -> None: ...


def host_times(config: OpenELMConfig, form: Form, steps: int) -> dict[str, HostTime]:
    """Our step, compiled and eager, and mlx-lm's: each in blocks of steps of its own, as it runs,
    the blocks in turns.

    As many layers as `config` has, each of the least width, in float32, which the CPU backend need
    not emulate; every `mx.fast` call is one primitive that computes nothing, as on a GPU it is one
    kernel. What was submitted is awaited outside the clock, and as far as the system allows the
    device stays out of the way (`undisturbed`).
    """
    small, form = shrunk(config), Form("float32", form.quantization)
    with one_primitive_each(), undisturbed():
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
                    if (
                        count >= WARM_UP
                    ):  # the first steps find the processor's caches filled by the other engine
                        builds[name].append(built - start)
                        submits[name].append(stop - built)
    return {
        name: HostTime(statistics.median(builds[name]), statistics.median(submits[name]))
        for name in hosts
    }


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep MLX's threads off the clock: one core for all of this process, and nobody wakes up
    before his turn.

    On the CPU backend the device is a thread of this process. On a core of its own it fights with
    the host for locks, of the allocator first, which no GPU does. Linux only; elsewhere, and where
    it is forbidden, nothing changes.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    mx.eval(mx.zeros(1) + 1)  # MLX's thread is there from now on
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    cores = os.sched_getaffinity(0)
    try:
        arrange(threads, {max(cores)}, os.SCHED_BATCH)
        yield
    finally:
        arrange(threads, cores, os.SCHED_OTHER)


def arrange(threads: list[int], cores: set[int], policy: int) -> None:
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cores)
            os.sched_setscheduler(thread, policy, os.sched_param(0))
        except OSError:  # ended meanwhile, or forbidden
            continue


def filled(model: nn.Module) -> nn.Module:
    """The model with weights that lie in memory as real ones do: a broadcast scalar would be copied
    at every use.
    """
    model.update(
        utils.tree_map(lambda array: mx.zeros(array.shape, array.dtype), model.parameters())
    )
    mx.eval(model.parameters())
    return model


class OurHost:
    def __init__(self, config: OpenELMConfig, form: Form, compiled: bool) -> None:
        model = our_model(config, form)
        filled(model)
        self.step = our_step(ready(model), compiled)
        state = our_state(config, 1, 256, DTYPES[form.dtype])
        real = [[mx.zeros(a.shape, a.dtype) for a in arrays] for arrays in state.buffers]
        self.state = state._replace(position=mx.array([CONTEXT], mx.int32), buffers=real)
        mx.eval(self.state)
        self.start, self.count = self.state.position, 0

    def build(self) -> None:
        self.count += 1
        if self.count % STAY == 0:  # beyond the buffers a step would write into other memory
            self.state = self.state._replace(position=self.start)
        self.state = self.step(self.state)

    def submit(self) -> None:
        mx.async_eval(self.state.token)


class PeerHost:
    def __init__(self, config: OpenELMConfig, form: Form) -> None:
        self.caches = mlx_lm_caches(config, CONTEXT, DTYPES[form.dtype])
        for cache in self.caches:
            cache.keys, cache.values = (
                mx.zeros(a.shape, a.dtype) for a in (cache.keys, cache.values)
            )
            mx.eval(cache.keys, cache.values)
        self.step = mlx_lm_step(filled(mlx_lm_model(config, form)), self.caches)
        self.token, self.logprobs = mx.array([1], mx.uint32), mx.array(0.0)

    def build(self) -> None:
        for cache in self.caches:
            cache.offset = min(cache.offset, STAY)
        self.token, self.logprobs = self.step(self.token)

    def submit(self) -> None:
        mx.async_eval(self.token, self.logprobs)
