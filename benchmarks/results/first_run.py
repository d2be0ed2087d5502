"""What `openelm doctor --full` adds to a result document: what a device computes right, and what
its work costs. Every figure was measured on the machine of the document; None was not measured.

`--predict` reads `costs`: the seconds of a kernel that waits for the one before it, and the bytes a
second of a matrix times a vector, by the chip of the document's machine.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=STRICT)
class Costs:
    """What a device takes for work that does nothing, and how fast it reads."""

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
    kernels: bool  # those of ours in use, or their twins
    seconds_per_token: Amount
    extra_bytes: Amount  # the peak, beyond what is held at the end
    in_place: tuple[Amount, ...] = ()  # share of the buffers that did not move in 8 and 9 steps


@dataclass(frozen=True, config=STRICT)
class Read:
    """A prompt read in one pass of the unquantized model; the weights are random."""

    tokens: Count
    tokens_per_second: Amount
    peak_bytes: Amount


@dataclass(frozen=True, config=STRICT)
class Buffers:
    """A new process with limits of command buffers of its own; None is MLX's own."""

    operations: Count | None
    elements: Count | None  # in units of 2**20, as MLX_MAX_MB_PER_BUFFER counts them
    seconds_per_token: dict[str, Amount]  # by the slots of the keys and values
    prompt_seconds: Amount
    prompt_peak_bytes: Amount


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
