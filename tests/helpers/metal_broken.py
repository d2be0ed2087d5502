"""Which broken kernels give themselves away, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
from metal_build import NotCompiled, Variant, compile_together, form, variant
from metal_emulator import ORDERS, Wrong, emulate
from metal_mutants import Mutant

from openelm_mlx.model.kernels.kernel import Kernel, Launch, running

SECONDS = 0.5  # of the processor: a mutant that takes longer does not end
TOGETHER = 30  # mutants that are compiled at once


@dataclass
class Launched:
    """A kernel's launch, and the arrays that it wrote."""

    kernel: Kernel
    inputs: list[mx.array]
    launch: Launch
    wrote: list[mx.array]


def launches(call: Callable[[], object], name: str, orders: Sequence[int] = (0,)) -> list[Launched]:
    """Return what a call of the model launches of the kernel of this name."""
    found = []

    def record(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        given = [mx.array(array) for array in inputs]
        mx.eval(given)
        wrote = written(kernel, given, launch, orders)
        found.append(Launched(kernel, given, launch, wrote))
        return wrote[: len(launch.shapes)]

    with running(record, frozenset({name})):
        call()
    return found


def written(
    kernel: Kernel, inputs: list[mx.array], launch: Launch, orders: Sequence[int]
) -> list[mx.array]:
    """Run a kernel; return its outputs, then what it wrote to in place."""
    outputs, left = emulate(kernel, inputs, launch, orders, SECONDS)
    places = [a for a, name in zip(left, kernel.inputs, strict=True) if name in kernel.in_place]
    return outputs + places


def differs(a: mx.array, b: mx.array) -> bool:
    """Tell more than what another order of additions may do: bfloat16 and integers are equal."""
    if not mx.issubdtype(a.dtype, mx.floating) or a.dtype == mx.bfloat16:
        return not mx.array_equal(a, b, equal_nan=True).item()
    a, b, unit = a.astype(mx.float32), b.astype(mx.float32), 8 * mx.finfo(a.dtype).eps
    return not mx.allclose(a, b, rtol=unit, atol=unit, equal_nan=True).item()


@dataclass
class Outcome:
    """What became of mutants, by name. Those that do not compile prove nothing either way."""

    found: dict[str, str] = field(default_factory=dict)  # and how
    missed: list[str] = field(default_factory=list)
    not_compiled: list[str] = field(default_factory=list)


def outcome(mutants: Sequence[Mutant], cases: Sequence[Launched]) -> Outcome:
    """Tell which mutants give themselves away in these cases."""
    result = Outcome()
    for start in range(0, len(mutants), TOGETHER):
        some = mutants[start : start + TOGETHER]
        compile_together([broken for mutant in some for broken in variants(mutant, cases)])
        for mutant in some:
            try:
                how = how_found(mutant, cases)
            except NotCompiled:
                result.not_compiled.append(mutant.name)
                continue
            if how is None:
                result.missed.append(mutant.name)
            else:
                result.found[mutant.name] = how
    return result


def variants(mutant: Mutant, cases: Sequence[Launched]) -> list[Variant]:
    """Return all of a mutant that `how_found` is going to run."""
    wanted = []
    for case in cases:
        right = form(variant(case.kernel, case.inputs, case.launch))
        wanted.append(replace(right, kernel=replace(case.kernel, source=mutant.source)))
    return list(dict.fromkeys(wanted))


def how_found(mutant: Mutant, cases: Sequence[Launched]) -> str | None:
    """Return how the emulator or the results give a mutant away, or None. Raises `NotCompiled`."""
    for case in cases:
        kernel = replace(case.kernel, source=mutant.source)
        for orders in ((0,), ORDERS):  # most differ in the first
            try:
                wrote = written(kernel, case.inputs, case.launch, orders)
            except NotCompiled:
                raise
            except Wrong as error:
                return str(error)
            if any(map(differs, wrote, case.wrote)):
                return "other results"
    return None
