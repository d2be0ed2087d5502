"""Memory bandwidth as MLX's own copy kernel reaches it on this machine: what percent of bound is
measured against.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass

from openelm_mlx import device
from openelm_mlx.device import mx

BYTES = (
    256 * 2**20
)  # a copy's source: well beyond the last-level caches of every chip in chips.py (96 MB at most)
WARM_UP, TRIALS = 2, 7
ROW = 2**18


@dataclass(frozen=True)
class Bandwidth:
    """Bytes read and written a second, median of `values`; `assumed` says what the figure stands
    on.
    """

    bytes_per_second: float
    values: tuple[float, ...]
    assumed: str


def measure(size: int = BYTES, trials: int = TRIALS) -> Bandwidth:
    """Copy `size` bytes into a buffer that exists already, `trials` times after a warm-up; read and
    written bytes count.

    On Metal one copy fills the memory system. On the CPU backend a stream is a thread, so every
    core copies its share.
    """
    metal = device.kind() == "metal"
    streams = (
        [mx.default_stream(mx.gpu)]
        if metal
        else [mx.new_stream(mx.cpu) for _ in range(os.cpu_count() or 1)]
    )
    rows = max(size // len(streams) // (4 * ROW), 1)
    pairs = [
        (mx.ones((rows, ROW)), mx.zeros((rows + 1, ROW))) for _ in streams
    ]  # one row more, or no copy would be made
    mx.eval(pairs)
    targets = [target for _, target in pairs]
    sources = [source for source, _ in pairs]
    del pairs
    rates = []
    for trial in range(WARM_UP + trials):
        start = time.perf_counter()
        for number, stream in enumerate(streams):
            with mx.stream(stream):
                targets[number][:rows] = sources[number]  # in place: nothing else holds the target
        mx.eval(targets)
        seconds = time.perf_counter() - start
        if trial >= WARM_UP:
            rates.append(2 * sum(source.nbytes for source in sources) / seconds)
    assumed = (
        "one copy kernel on the GPU"
        if metal
        else f"copies on {len(streams)} threads of the CPU backend; a token's own work may use fewer, and then reaches less"
    )
    return Bandwidth(
        statistics.median(rates),
        tuple(rates),
        f"measured: {assumed}, read and written bytes counted",
    )
