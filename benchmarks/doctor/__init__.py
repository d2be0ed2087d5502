"""The checks of `openelm doctor`, and the measurements of --full: whether a device computes
correctly, and what its work costs. One file answers what is open about a device.

Everything is compared with float32 on the processor. Engines are not compared here, and nothing is
printed: the command line does that. `measure` runs the sections of --full; what one of them cannot
do is written down, and the others go on.
"""

from __future__ import annotations

import os
import platform
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import reason

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.results.document import Document
    from openelm_mlx.benchmarks.results.first_run import Compared

# called with what is being run and how much of the work was done; with None, how much there is
Tick = Callable[[str | None, float], None]
Save = Callable[["Document"], None]  # called after each section: a GPU's fault ends the process

# sections in their order, with guesses of their seconds, for the progress bar
SECTIONS = {"paths": 60, "ways": 40, "kernels": 5, "costs": 10, "decoded": 40, "read": 10}
SECTIONS |= {"buffers": 60, "rates": 60}
SETTINGS = (
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_MAX_MB_PER_BUFFER",
    "MLX_ENABLE_TF32",
    "MLX_METAL_FAST_SYNCH",
    "OPENELM_KERNELS",
)
DTYPES = ("bfloat16", "float16", "float32")  # in which a GPU runs the bundled model here


class Sections:
    """The sections of `openelm doctor --full`, and what they have found so far."""

    def __init__(self, quick: bool, tick: Tick) -> None:
        from openelm_mlx import device

        self.on_gpu = device.kind() != "cpu"
        self.quick, self.tick = quick, tick
        self.small = quick or not self.on_gpu  # a processor only shows that all of this works
        self.found: dict[str, list[Any]] = defaultdict(list)
        self.failures: dict[str, str] = {}

    def run(self, after: Callable[[], None]) -> bool:
        """Run every section, and `after` behind each; return False after Ctrl-C, with what was
        found until then.
        """
        self.tick(None, sum(SECTIONS.values()))
        for name, seconds in SECTIONS.items():
            try:
                for one in getattr(self, name)():
                    self.found[name].append(one)
                    self.tick(f"{name}: {len(self.found[name])}", 0)
            except KeyboardInterrupt:
                self.failures[name] = "interrupted; later sections were not run"
                return False
            except Exception as error:  # what fails on a device is asked here, and goes no further
                self.failures[name] = impersonal(f"{type(error).__name__}: {reason(error)}")
            self.tick(name, seconds)
            after()
        return True

    def paths(self) -> Iterator[Compared]:
        from openelm_mlx.benchmarks.doctor.paths import cases, compared

        for case in cases(self.small):
            yield compared(case)

    def ways(self) -> Iterator[Compared]:
        """Run the bundled model in each way, with kernels of ours and, to know whose a difference
        is, without.
        """
        from openelm_mlx.benchmarks.doctor.self_test import MORE_WAYS, WAYS, Result, results
        from openelm_mlx.benchmarks.results.first_run import Compared
        from openelm_mlx.model.kernels.kernel import choice, twins

        def named(one: Result, more: str = "") -> Compared:
            name = f"{one.dtype}, {one.name}{more}"
            return Compared(name, one.ok, one.off, one.limit, None, one.error)

        for dtype in DTYPES if self.on_gpu and not self.quick else (None,):
            yield from map(named, results(dtype, WAYS if self.quick else (*WAYS, *MORE_WAYS)))
        if choice().names:
            with twins():
                for one in results():
                    yield named(one, ", without kernels of ours")

    def kernels(self) -> Iterator[tuple[str, str]]:
        """Check the kernels of ours anew; the verdict counts from the next process on."""
        from openelm_mlx import device
        from openelm_mlx.model.kernels.kernel import ALL, check_of
        from openelm_mlx.model.kernels.self_check import forget, wrong_kernels

        names = () if device.kind() == "cpu" else ALL  # also those that are not in use here
        forget()
        wrong = wrong_kernels(names, check_of)
        yield from ((name, wrong.get(name, "")) for name in names)

    def costs(self) -> Iterator[tuple[str, Any]]:
        from openelm_mlx.benchmarks.doctor import steps

        return steps.costs(self.small)

    def decoded(self) -> Iterator[Any]:
        from openelm_mlx.benchmarks.doctor import steps

        return steps.decoded(self.small)

    def read(self) -> Iterator[Any]:
        from openelm_mlx.benchmarks.doctor import steps

        return steps.read(self.small)

    def buffers(self) -> Iterator[Any]:
        from openelm_mlx.benchmarks.doctor import steps

        return steps.buffers(self.small)

    def rates(self) -> Iterator[Document]:
        """Time the engine as `openelm benchmark` does: random weights of the 270m on a GPU."""
        from openelm_mlx.benchmarks.measure.run import run
        from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions

        if self.quick:
            return
        size: Any = {"random_weights": ("270m",)} if self.on_gpu else {"prompt_tokens": (64,)}
        document = run(BenchmarkOptions(suite="first-run", **size))
        yield document
        if document.partial:
            raise KeyboardInterrupt


def measure(quick: bool, command: str, tick: Tick, save: Save) -> Document:
    """Run everything and return the document, which is partial after Ctrl-C.

    It has no names of users, machines or folders. `command` becomes a part of it. Raises
    `OptionError`, before anything is run, for a value of OPENELM_KERNELS that is not allowed.
    """
    from openelm_mlx import device
    from openelm_mlx.model.kernels.kernel import choose

    choose(device.kind(), os.environ, {})
    run = Sections(quick, tick)
    complete = run.run(lambda: save(document_of(run, command, partial=True)))
    return document_of(run, command, partial=not complete)


def document_of(run: Sections, command: str, partial: bool) -> Document:
    """Return what the sections have found so far."""
    from openelm_mlx.benchmarks.doctor.self_test import compared_with
    from openelm_mlx.benchmarks.doctor.steps import timed_config
    from openelm_mlx.benchmarks.measure import machine
    from openelm_mlx.benchmarks.results import first_run as results
    from openelm_mlx.benchmarks.results.document import Document, completed
    from openelm_mlx.settings import float32_products

    facts, found = machine.machine(), run.found
    about = results.FirstRun(
        compared_with=compared_with(),
        model=f"{timed_config()[0]}, random weights",
        quick=run.small,
        float32_products=float32_products(facts.backend or "", facts.chip, os.environ),
        kernels={name: impersonal(why) for name, why in found["kernels"]},
        settings={name: impersonal(os.environ[name]) for name in SETTINGS if name in os.environ},
        costs=results.Costs(**dict(found["costs"])),
        paths=tuple(map(blameless, found["paths"])),
        ways=tuple(map(blameless, found["ways"])),
        decoded=tuple(found["decoded"]),
        read=tuple(found["read"]),
        buffers=tuple(found["buffers"]),
        failures=run.failures,
    )
    commit, dirty = machine.commit(Path(__file__).resolve().parents[2])
    empty = Document(
        created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        command=command,
        rows=(),
        machine=facts,
        versions=machine.versions(),
        commit=commit,
        dirty=dirty,
    )
    timed: Document = found["rates"][0] if found["rates"] else empty
    document = replace(timed, command=command, partial=partial, first_run=about)
    return completed(machine.without_home(document))


def blameless(one: Compared) -> Compared:
    return one if one.error is None else replace(one, error=impersonal(one.error))


def impersonal(text: str) -> str:
    """Remove folders, and the names of the user and of the machine: results are shared."""
    text = re.sub(r"(?:~|(?<![\w.])/)(?:[^\s/'\",:;]+/)+", "", text)
    names = {os.path.basename(os.path.expanduser("~")), *platform.node().split(".")[:1]}
    for name in names - {"", "root", "localhost"}:
        text = re.sub(rf"\b{re.escape(name)}\b", "...", text)
    return text
