"""Kernels that are broken on purpose give themselves away, and kernels have their twins' values.

A few of each here; OPENELM_KERNEL_CASES=100000 for all.
"""

from __future__ import annotations

from itertools import takewhile

import pytest
from equivalent_mutants import EQUIVALENT
from kernel_cases import MOST, REVEALING, apart, spread, stores, sums
from metal_broken import Launched, how_found, launches, prepare
from metal_emulator import ORDERS
from metal_mutants import Mutant, mutants

from openelm_mlx.model.kernels.norm_rope_store import NORM_ROPE_PACK, NORM_ROPE_STORE

pytestmark = pytest.mark.needs("emulated kernels")


def cases_of(name: str) -> list[Launched]:
    return [one for case in REVEALING[name] for one in launches(case.call, case.kernel)]


def all_mutants(name: str, source: str) -> list[Mutant]:
    if not name.endswith("packed"):
        return mutants(source)
    pairs = zip(NORM_ROPE_STORE.source, NORM_ROPE_PACK.source, strict=False)
    return mutants(source, after="".join(a for a, _ in takewhile(lambda p: p[0] == p[1], pairs)))


@pytest.mark.parametrize("name", REVEALING)
def test_a_broken_kernel_gives_itself_away(name):
    cases = cases_of(name)
    found = all_mutants(name, cases[0].kernel.source)
    if len(found) <= MOST:
        assert EQUIVALENT[name].keys() <= {mutant.name for mutant in found}
    chosen = [mutant for mutant in spread(found) if mutant.name not in EQUIVALENT[name]]
    prepare(chosen, cases)
    missed = [mutant.name for mutant in chosen if how_found(mutant, cases) is None]
    assert not missed, "no case tells these from the kernel, or they belong to EQUIVALENT"


@pytest.mark.parametrize("case", spread(sums()) + spread(stores()), ids=lambda case: case.title)
def test_a_kernel_has_the_values_of_its_twin(case):
    wanted = case.call()
    (one,) = launches(case.call, case.kernel, ORDERS)
    assert len(wanted) == len(one.wrote)
    assert not any(apart(a, b) for a, b in zip(wanted, one.wrote, strict=True))
