"""What a soak saw of memory and speed, and whether they drifted."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.device import mx

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.peers import Timed

MEMORY_MAY_GROW = 0.02  # arrays from the first probe on, the process from half way on
SPEED_MAY_FALL = 0.10


@dataclass
class Soak:
    """What a soak saw. `failures` is empty where all was well."""

    generations: Counter[str] = field(default_factory=Counter)  # by kind
    tokens: int = 0
    cancelled: int = 0
    checked: int = 0
    # of these, differences of two answers, which rounding explains where they are no failures
    rounded: int = 0
    probes: list[Timed] = field(default_factory=list)
    references: list[float] = field(
        default_factory=list
    )  # seconds of a fixed work of MLX, beside each probe
    arrays: list[int] = field(default_factory=list)  # bytes of arrays alive at each probe
    process: list[int] = field(default_factory=list)  # bytes the process holds at each probe
    failures: list[str] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [rate for probe in self.probes if (rate := probe.decode_rate()) is not None]

    @property
    def settled(self) -> int:
        """Bytes of the process half way: by then every kind of step has been compiled, and what was
        is kept.
        """
        return self.process[len(self.process) // 2]

    @property
    def relative(self) -> list[float]:
        """Decode speed by the machine's own at that time: neither heat nor a neighbour's load is
        the engine's fault.
        """
        return [rate * seconds for rate, seconds in zip(self.rates, self.references, strict=False)]

    def summary(self) -> list[str]:
        """What was done and seen, in a few lines."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.generations.items()))
        found = [
            f"{sum(self.generations.values())} generations ({kinds}), {self.tokens} tokens; {self.cancelled} cancelled "
            f"midway, {self.checked} repeated alone, of which {self.rounded} differ"
        ]
        if self.arrays:
            found.append(
                f"arrays {self.arrays[0] / 1e6:.1f} MB at the start, {self.arrays[-1] / 1e6:.1f} MB at the end; "
                f"process {self.process[0] / 1e6:.0f} MB at the start, {self.settled / 1e6:.0f} MB half way, "
                f"{self.process[-1] / 1e6:.0f} MB at the end"
            )
        if len(self.relative) >= 9:
            found.append(
                f"decode speed from the first third of the probes to the last: {trend(self.rates)[0]:+.1%}; "
                f"relative to a fixed work timed beside them {trend(self.relative)[0]:+.1%}"
            )
        return found

    def judge(self) -> None:
        """Add to the failures what memory and speed say."""
        if self.arrays and self.arrays[-1] > self.arrays[0] * (1 + MEMORY_MAY_GROW):
            self.failures.append(
                f"memory did not return: arrays grew by {(self.arrays[-1] - self.arrays[0]) / 1e6:.1f} MB"
            )
        if self.process and self.process[-1] > self.settled * (1 + MEMORY_MAY_GROW):
            grown = self.process[-1] - self.settled
            self.failures.append(
                f"memory did not return: the process grew by {grown / 1e6:.0f} MB in the second half"
            )
        change, sure = trend(self.relative)
        if sure and change < -SPEED_MAY_FALL:
            self.failures.append(
                f"decode speed fell by {-change:.0%} against a fixed work timed beside it"
            )


def trend(rates: list[float]) -> tuple[float, bool]:
    """Change from the first third to the last, sure where even their quartiles keep apart."""
    if len(rates) < 9:
        return 0.0, False
    third = len(rates) // 3
    first, last = sorted(rates[:third]), sorted(rates[-third:])
    change = last[third // 2] / first[third // 2] - 1
    return change, last[third * 3 // 4] < first[third // 4]


def reference_seconds() -> float:
    """A fixed work that is like decoding, many small kernels in a chain, and has nothing of this
    engine in it.
    """
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x = mx.ones((1, 256))
        for _ in range(400):
            x = mx.tanh(x)
        mx.eval(x)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[2]


def resident_bytes() -> int:
    """Memory that this process holds, as the system counts it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        shown = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())],
            capture_output=True,
            text=True,
            check=False,
        )
        return 1024 * int(shown.stdout.strip() or 0)
