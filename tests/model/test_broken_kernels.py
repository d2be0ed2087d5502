"""Kernels that are broken on purpose give themselves away, and kernels have their twins' values.

A few of each here; OPENELM_KERNEL_CASES=100000 for all.
"""

from __future__ import annotations

from functools import cache
from itertools import takewhile

import pytest
from equivalent_mutants import EQUIVALENT
from kernel_cases import MOST, REVEALING, apart, spread, stores, sums
from metal_broken import launches, outcome
from metal_emulator import ORDERS
from metal_mutants import Mutant, mutants

from openelm_mlx.model.kernels.add_rms_norm import ADD_RMS_NORM
from openelm_mlx.model.kernels.attend import ATTEND
from openelm_mlx.model.kernels.norm_rope_store import NORM_ROPE_PACK, NORM_ROPE_STORE
from openelm_mlx.model.kernels.sample import SAMPLE
from openelm_mlx.model.kernels.store_and_attend import STORE_AND_ATTEND

SOURCES = {
    "add_rms_norm": ADD_RMS_NORM,
    "norm_rope_store": NORM_ROPE_STORE,
    "norm_rope_store, packed": NORM_ROPE_PACK,
    "attend": ATTEND,
    "store_and_attend": STORE_AND_ATTEND,
    "sample": SAMPLE,
}


@cache
def all_mutants(name: str) -> list[Mutant]:
    source = SOURCES[name].source
    if not name.endswith("packed"):
        return mutants(source)
    pairs = zip(NORM_ROPE_STORE.source, source, strict=False)
    return mutants(source, after="".join(a for a, _ in takewhile(lambda p: p[0] == p[1], pairs)))


def operator(mutant: Mutant) -> str:
    return mutant.name.split(":")[0]


@cache
def chosen(name: str) -> list[Mutant]:
    """Return some of a kernel's mutants, and one of each operator that no kernel before has shown;
    or all.
    """
    left = [one for one in all_mutants(name) if one.name not in EQUIVALENT[name]]
    before = list(takewhile(lambda other: other != name, SOURCES))
    shown = {operator(one) for other in before for one in chosen(other)}
    first = {operator(one): one for one in reversed(left) if operator(one) not in shown}
    return list(dict.fromkeys([*spread(left, MOST // 3), *first.values()]))


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("name", SOURCES)
def test_a_broken_kernel_gives_itself_away(name):
    cases = [one for case in REVEALING[name] for one in launches(case.call, case.kernel)]
    assert {case.kernel.source for case in cases} == {SOURCES[name].source}
    result = outcome(chosen(name), cases)
    print(
        f"{name}: {len(all_mutants(name))} mutants; of {len(chosen(name))} that are run "
        f"{len(result.found)} are found; {len(EQUIVALENT[name])} are equivalent, and "
        f"{len(result.not_compiled)} do not compile: {result.not_compiled}"
    )
    assert not result.missed, "no case tells these from the kernel, or they belong to EQUIVALENT"
    assert len(result.not_compiled) <= 1 + len(chosen(name)) // 25


def test_mutants_that_are_called_equivalent_exist():
    for name in SOURCES:
        assert EQUIVALENT[name].keys() <= {mutant.name for mutant in all_mutants(name)}
    assert EQUIVALENT.keys() == SOURCES.keys() == REVEALING.keys()


def test_a_few_mutants_show_every_operator():
    shown = {operator(mutant) for name in SOURCES for mutant in chosen(name)}
    assert shown == {operator(mutant) for name in SOURCES for mutant in all_mutants(name)}


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("case", spread(sums()) + spread(stores()), ids=lambda case: case.title)
def test_a_kernel_has_the_values_of_its_twin(case):
    wanted = case.call()
    (one,) = launches(case.call, case.kernel, ORDERS)
    assert len(wanted) == len(one.wrote)
    assert not any(apart(a, b) for a, b in zip(wanted, one.wrote, strict=True))
