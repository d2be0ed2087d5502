"""The part of a result document that `openelm doctor --full` adds.

It says what a device computes right and what its work costs. Every figure was measured on the
machine of the document; None stands for what was not measured.

`--predict` reads `costs`: the seconds of a kernel that waits for the one before it, and the bytes a
second of a matrix times a vector, by the chip of the document's machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
# which kernels of ours run, with twins in place of the others
Kernels = Literal["in use", "none", "all"]
OURS = {"none": [], "in use": ["kernels of ours"], "all": ["kernels of ours, attention too"]}


@dataclass(frozen=True, config=STRICT)
class Costs:
    """The time that a device takes for tiny kernels, and the rate at which it reads."""

    dispatch_seconds: Amount | None = None  # a kernel that waits for the one before it
    beside_seconds: Amount | None = None  # a kernel in one of 8 chains beside each other
    round_trip_seconds: Amount | None = None  # one kernel, until the host knows of its end
    build_seconds: Amount | None = None  # of the host, to add a kernel to a graph
    submit_seconds: Amount | None = None  # of the host, to hand it to the device
    gemv_bytes_per_second: dict[str, Amount] = Field(default_factory=dict)  # by type of the matrix
    kernel_check_seconds: Amount | None = None  # of all kernels of ours against their twins, warm


@dataclass(frozen=True, config=STRICT)
class Compared:
    """Something computed on the device, beside float32 on the CPU."""

    name: str
    ok: bool
    off: Amount | None  # what differs, as a share of the largest value, or in nats; None: an error
    limit: Amount
    first_seconds: Amount | None = None  # of the first call, which compiles
    error: str | None = None


@dataclass(frozen=True, config=STRICT)
class Decoded:
    """Whole steps in one setting; the weights are random."""

    dtype: str
    bits: Count | None
    slots: Count  # of the keys and values
    ahead: bool  # each token is read while the next step runs, as the engine does
    compiled: bool
    kernels: Kernels
    seconds_per_token: Amount
    extra_bytes: Amount  # the peak, beyond what is held at the end
    in_place: tuple[Amount, ...] = ()  # share of the buffers that did not move in 8 and 9 steps

    def __str__(self) -> str:
        words = [f"{self.bits} bits" if self.bits else self.dtype, f"{self.slots} slots"]
        words += ["one step ahead" if self.ahead else "each token awaited"]
        words += OURS[self.kernels]
        words += ["not compiled"] * (not self.compiled)
        held = min(self.in_place, default=0.0)
        figures = f"{1e3 * self.seconds_per_token:.3f} ms a token, {held:.0%} of buffers in place"
        peak = f"at most {self.extra_bytes / 1e6:.1f} MB beyond what is held at the end"
        return f"{', '.join(words)}: {figures}, {peak}"


@dataclass(frozen=True, config=STRICT)
class Read:
    """A prompt read in one pass of the unquantized model; the weights are random."""

    tokens: Count
    tokens_per_second: Amount
    peak_bytes: Amount


@dataclass(frozen=True, config=STRICT)
class Buffers:
    """A new process with limits of command buffers of its own; None is what this engine sets."""

    operations: Count | None
    elements: Count | None  # in units of 2**20, as MLX_MAX_MB_PER_BUFFER counts them
    seconds_per_token: dict[str, Amount]  # by the slots of the keys and values
    prompt_seconds: Amount
    prompt_peak_bytes: Amount

    def __str__(self) -> str:
        limits = ((self.operations, "kernels"), (self.elements, "Mi elements"))
        size = " or ".join(f"{n} {what}" for n, what in limits if n)
        tokens = [
            f"{1e3 * seconds:.3f} ms a token at {slots} slots"
            for slots, seconds in self.seconds_per_token.items()
        ]
        prompt = f"a prompt {self.prompt_seconds:.2f} s, {self.prompt_peak_bytes / 1e6:.0f} MB"
        which = f"of {size}" if size else "as set here"
        return f"command buffers {which}: {', '.join([*tokens, prompt])}"


@dataclass(frozen=True, config=STRICT)
class FirstRun:
    """The sections of `openelm doctor --full`; what a section could not do is in `failures`."""

    compared_with: str
    model: str  # whose whole steps were timed
    quick: bool = False
    float32_products: str | None = None
    kernels: dict[str, str] = Field(default_factory=dict)  # of ours: "", or why it is not in use
    settings: dict[str, str] = Field(default_factory=dict)  # environment variables of MLX and ours
    costs: Costs = Costs()
    paths: tuple[Compared, ...] = ()  # each path of a kernel
    ways: tuple[Compared, ...] = ()  # of running the bundled model
    decoded: tuple[Decoded, ...] = ()
    read: tuple[Read, ...] = ()
    buffers: tuple[Buffers, ...] = ()
    failures: dict[str, str] = Field(default_factory=dict)  # by section

    @property
    def ok(self) -> bool:
        """True if every section ran, and nothing differs from the CPU by more than rounding."""
        return not self.failures and all(one.ok for one in (*self.paths, *self.ways))


def lines(run: FirstRun) -> Iterator[str]:
    """Say in words what was found, what is wrong first."""
    yield run.compared_with
    yield from (f"{section} failed: {why}" for section, why in run.failures.items())
    yield from judged("paths of kernels", run.paths)
    yield from judged("ways of running the bundled model", run.ways)
    if run.kernels:
        used = [name for name, why in run.kernels.items() if not why]
        yield f"kernels of ours equal to their twins: {', '.join(used) or 'none'}"
        yield from (f"{name} is not in use: {why}" for name, why in run.kernels.items() if why)
    if run.float32_products:
        yield f"matrices of float32 are multiplied in {run.float32_products}"
    yield from figures(run.costs)
    for one in run.decoded:
        yield f"{run.model}, {one}"
    for prompt in run.read:
        rate, peak = prompt.tokens_per_second, prompt.peak_bytes / 1e6
        yield f"a prompt of {prompt.tokens}: {rate:.0f} tokens/s, at most {peak:.0f} MB"
    for pair in run.buffers:
        yield str(pair)


def judged(what: str, found: Sequence[Compared]) -> Iterator[str]:
    """Say how many are right, and which are wrong."""
    wrong = [one for one in found if not one.ok]
    if found:
        yield f"{len(found) - len(wrong)} of {len(found)} {what} are right"
    for one in wrong:
        off = f"off by {one.off:.2g}, allowed {one.limit:g}" if one.off is not None else one.error
        yield f"wrong: {one.name}: {off}"


def figures(costs: Costs) -> Iterator[str]:
    """Say what the costs are."""
    seconds = {
        "a kernel that waits for the one before it": costs.dispatch_seconds,
        "a kernel beside others": costs.beside_seconds,
        "one kernel and the way back": costs.round_trip_seconds,
        "the host's part of a kernel, to build": costs.build_seconds,
        "to submit": costs.submit_seconds,
    }
    known = [f"{name} {1e6 * value:.2f} us" for name, value in seconds.items() if value is not None]
    if known:
        yield "; ".join(known)
    rates = [f"{name} {rate / 1e9:.1f} GB/s" for name, rate in costs.gemv_bytes_per_second.items()]
    if rates:
        yield f"a matrix times a vector: {', '.join(rates)}"
    if costs.kernel_check_seconds is not None:
        yield f"the check of our kernels: {1e3 * costs.kernel_check_seconds:.0f} ms"
