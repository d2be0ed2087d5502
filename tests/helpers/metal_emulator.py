"""Run a kernel of openelm_mlx/model/kernels on the processor, by g++ and metal_shim.h.

    outputs, inputs = emulate(kernel, inputs, launch)      # the inputs as the kernel left them
    with running(Emulator()):                              # the model's kernels, in eager steps
        ...

`Wrong` is raised for divergence, accesses outside buffers and arrays, threads that do not end,
results that depend on the order of threads, and writes to an input that the kernel does not name in
`in_place`. metal_build.py compiles, metal_threads.cpp runs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from metal_build import Program, Wrong, program, threads

from openelm_mlx.model.kernels.kernel import Kernel, Launch

__all__ = ["Emulator", "Wrong", "emulate"]

ORDERS = (0, 1, 2, 3)  # of the threads: forwards, backwards, and two shuffles
SECONDS = 5.0


def emulate(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    launch: Launch,
    orders: Sequence[int] = ORDERS,
    seconds: float = SECONDS,
) -> tuple[list[mx.array], list[mx.array]]:
    """Return the outputs, and the inputs as the kernel left them. Raises `Wrong`, also where one
    order takes more than `seconds` of the processor.
    """
    built = program(kernel, inputs, launch)
    given = [host(array) for array in inputs]
    first: list[np.ndarray] = []
    for order in orders:
        outs = empty(launch)
        ins = [array.copy() for array in given]
        run(kernel, built, launch, [*given, *[None] * len(outs)], [*ins, *outs], order, seconds)
        for name, before, after in zip(kernel.inputs, given, ins, strict=True):
            if name not in kernel.in_place and not np.array_equal(before, after):
                raise Wrong(f"{kernel.name}: writes to its input {name}")
        for name, a, b in zip(kernel.outputs + kernel.inputs, first, outs + ins, strict=False):
            if not np.array_equal(a, b):
                what = "a barrier is missing, or two threads write one place"
                raise Wrong(f"{kernel.name}: {name} depends on the order of threads: {what}")
        first = first or outs + ins
    outputs = [
        back(raw, shape, dtype)
        for raw, shape, dtype in zip(first, launch.shapes, launch.dtypes, strict=False)
    ]
    left = [
        back(raw, a.shape, a.dtype) for raw, a in zip(first[len(outputs) :], inputs, strict=True)
    ]
    return outputs, left


class Emulator:
    """A runner for `kernel.running`. What a kernel writes in place is written to the array.

    With one order of threads there is no guard around what is written in place: MLX's own memory is
    written to. With more, all is checked that `emulate` checks.
    """

    def __init__(self, orders: Sequence[int] = (0,)) -> None:
        self.orders, self.launches = orders, 0

    def __call__(self, kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        self.launches += 1
        mx.eval(inputs)
        places = {
            name: memory(kernel, name, array)
            for name, array in zip(kernel.inputs, inputs, strict=True)
            if name in kernel.in_place
        }
        if len(self.orders) > 1:
            outputs, left = emulate(kernel, inputs, launch, self.orders)
            for name, array in zip(kernel.inputs, left, strict=True):
                if name in places:
                    overwrite(places[name], host(array))
            return outputs
        pairs = zip(kernel.inputs, inputs, strict=True)
        given = [places[name] if name in places else host(array) for name, array in pairs]
        after, outs = [places.get(name) for name in kernel.inputs], empty(launch)
        nothing = [None] * len(outs)
        built = program(kernel, inputs, launch)
        run(kernel, built, launch, [*given, *nothing], [*after, *outs], self.orders[0])
        return [
            back(raw, shape, dtype)
            for raw, shape, dtype in zip(outs, launch.shapes, launch.dtypes, strict=True)
        ]


def overwrite(place: np.ndarray, value: np.ndarray) -> None:
    """Write into the memory of an array; numpy takes it for one that cannot be written to."""
    ctypes.memmove(address(place), value.ctypes.data, value.nbytes)


def run(
    kernel: Kernel,
    built: Program,
    launch: Launch,
    before: Sequence[np.ndarray | None],
    after: Sequence[np.ndarray | None],
    order: int,
    seconds: float = SECONDS,
) -> None:
    """Run all threads once; what the buffers then hold is written to `after`."""
    group = [min(a, b) for a, b in zip(launch.threadgroup, launch.grid, strict=True)]  # as MLX does
    count = len(before)
    sizes = [a.nbytes if a is not None else b.nbytes for a, b in zip(before, after, strict=True)]
    message = ctypes.create_string_buffer(512)
    failed = threads().run(
        ctypes.c_void_p(built.address),
        (ctypes.c_void_p * count)(*map(address, before)),
        (ctypes.c_void_p * count)(*map(address, after)),
        (ctypes.c_size_t * count)(*sizes),
        count,
        (ctypes.c_long * max(1, len(built.numbers)))(*built.numbers),
        (ctypes.c_uint * 3)(*launch.grid),
        (ctypes.c_uint * 3)(*group),
        order,
        ctypes.c_double(seconds),
        message,
    )
    if failed:
        raise Wrong(f"{kernel.name}: {message.value.decode()}")


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.__array_interface__["data"][0]


def empty(launch: Launch) -> list[np.ndarray]:
    return [
        np.empty(math.prod(shape) * dtype.size, np.uint8)
        for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)
    ]


def host(array: mx.array) -> np.ndarray:
    """Return the bytes of an array, row by row, as [n] uint8."""
    return np.ascontiguousarray(seen(array)).reshape(-1).view(np.uint8)


def seen(array: mx.array) -> np.ndarray:
    """Return an array as numpy sees its memory; numpy does not know bfloat16."""
    return np.asarray(memoryview(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array))


def memory(kernel: Kernel, name: str, array: mx.array) -> np.ndarray:
    """Return the memory of an array that a kernel writes to, of which MLX does not know."""
    if array.size < 8:
        raise Wrong(
            f"{kernel.name}: {name} has fewer than 8 elements, which are passed as constants"
        )
    raw = seen(array)
    if not raw.flags.c_contiguous:
        raise Wrong(f"{kernel.name}: {name} is not row contiguous: MLX would pass a copy")
    return raw


def back(raw: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    if dtype == mx.bool_:
        return mx.array(raw.view(np.bool_)).reshape(shape)
    plain: dict[mx.Dtype, Any] = {mx.float32: np.float32, mx.uint32: np.uint32, mx.int32: np.int32}
    if dtype in plain:
        return mx.array(raw.view(plain[dtype]).reshape(shape))
    return mx.array(raw).view(dtype).reshape(shape)
