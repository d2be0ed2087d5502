"""Which kernels are in use, and the emulator that runs them without a GPU."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import Emulator, Wrong

from openelm_mlx.errors import OptionError
from openelm_mlx.model.kernels.kernel import ALL, NAMES, Kernel, choose, in_use, running

DOUBLE = Kernel("double", ("x",), ("y",), "uint i = thread_position_in_grid.x; y[i] = x[i] + x[i];")
STORE = Kernel(
    "store",
    ("place", "buffer"),
    ("done",),
    "((device float*)buffer)[place[0]] = 7; done[0] = 1;",
    in_place=("buffer",),
)


def one(kernel: Kernel, *inputs: mx.array, threads: int = 1, size: int = 1) -> mx.array:
    launch = {"grid": (threads, 1, 1), "threadgroup": (32, 1, 1)}
    return kernel(*inputs, **launch, shapes=[(size,)], dtypes=[mx.float32])[0]


def test_kernels_are_in_use_on_a_gpu_unless_they_failed_or_are_off() -> None:
    assert choose("metal", {}, {}).names == frozenset(NAMES)
    assert choose("cuda", {}, {}).names == frozenset(ALL)
    assert choose("metal", {"OPENELM_KERNELS": "all"}, {}).names == frozenset(ALL)
    assert choose("cpu", {}, {}).names == frozenset()
    assert choose("metal", {"OPENELM_KERNELS": "off"}, {}).names == frozenset()
    assert choose("metal", {"OPENELM_KERNELS": ""}, {}) == choose("metal", {}, {})
    failed = choose("metal", {}, {"sample": "differs by 1"})
    assert failed.names == frozenset(NAMES) - {"sample"}
    assert failed.reason == "sample: differs by 1"
    with pytest.raises(OptionError, match="OPENELM_KERNELS is 'maybe'; allowed: on, off, all"):
        choose("metal", {"OPENELM_KERNELS": "maybe"}, {})


@pytest.mark.needs("emulated kernels")
def test_the_emulator_computes_and_writes_in_place() -> None:
    x = mx.arange(40).astype(mx.float32)
    buffer = mx.zeros(8)
    mx.eval(buffer)
    with running(Emulator(), frozenset({"double"})):
        assert in_use(DOUBLE) and not in_use(STORE)
        np.testing.assert_array_equal(one(DOUBLE, x, threads=40, size=40), 2 * np.arange(40))
        one(STORE, mx.array([3]), buffer)
    np.testing.assert_array_equal(buffer, [0, 0, 0, 7, 0, 0, 0, 0])


@pytest.mark.needs("emulated kernels")
def test_the_emulator_finds_a_write_outside() -> None:
    with running(Emulator()), pytest.raises(Wrong, match="access outside a buffer"):
        one(DOUBLE, mx.zeros(8), threads=8, size=4)
