"""Run a kernel of openelm_mlx/model/kernels on the processor, by g++ and metal_shim.h.

    outputs, inputs = emulate(kernel, inputs, launch)      # the inputs as the kernel left them
    with running(Emulator()):                              # the model's kernels, in eager steps
        ...

`Wrong` is raised for divergence, accesses outside buffers, results that depend on the order of
threads, and writes to an input that the kernel does not name in `in_place`.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from openelm_mlx.model.kernels.kernel import Kernel, Launch

HERE = Path(__file__).parent
NAMES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.bool_: "bool",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
    mx.int64: "int64_t",
    mx.uint16: "uint16_t",
    mx.complex64: "complex64_t",
}
ORDERS = (0, 1, 2, 3)  # of the threads: forwards, backwards, and two shuffles


class Wrong(Exception):
    """What a kernel does that no GPU promises to allow."""


def emulate(
    kernel: Kernel, inputs: Sequence[mx.array], launch: Launch, orders: Sequence[int] = ORDERS
) -> tuple[list[mx.array], list[mx.array]]:
    """Return the outputs, and the inputs as the kernel left them. Raises `Wrong`."""
    library = built(cpp(kernel, inputs, launch))
    given = [host(array) for array in inputs]
    threads, grid = launch.threadgroup, launch.grid
    group = tuple(min(a, b) for a, b in zip(threads, grid, strict=True))  # as MLX does
    results = []
    for order in orders:
        ins = [array.copy() for array in given]
        outs = [
            np.full(math.prod(shape) * dtype.size, 0xFF, np.uint8)
            for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)
        ]
        arrays = ins + outs
        pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
        sizes = (ctypes.c_size_t * len(arrays))(*(a.nbytes for a in arrays))
        message = ctypes.create_string_buffer(512)
        three = ctypes.c_uint * 3
        ok = library.run(pointers, sizes, len(arrays), three(*grid), three(*group), order, message)
        if not ok:
            raise Wrong(f"{kernel.name}: {message.value.decode()}")
        for name, before, after in zip(kernel.inputs, given, ins, strict=True):
            if name not in kernel.in_place and not np.array_equal(before, after):
                raise Wrong(f"{kernel.name}: writes to its input {name}")
        results.append(outs + ins)
    for result in results[1:]:
        for name, a, b in zip(kernel.outputs + kernel.inputs, results[0], result, strict=True):
            if not np.array_equal(a, b):
                what = "a barrier is missing, or two threads write one place"
                raise Wrong(f"{kernel.name}: {name} depends on the order of threads: {what}")
    count = len(launch.shapes)
    pairs = zip(results[0], [*launch.shapes, *(a.shape for a in inputs)], strict=True)
    dtypes = [*launch.dtypes, *(a.dtype for a in inputs)]
    arrays_ = [back(raw, shape, dtype) for (raw, shape), dtype in zip(pairs, dtypes, strict=True)]
    return arrays_[:count], arrays_[count:]


class Emulator:
    """A runner for `kernel.running`. What a kernel writes in place is written to the array."""

    def __init__(self, orders: Sequence[int] = (0,)) -> None:
        self.orders, self.launches = orders, 0

    def __call__(self, kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        self.launches += 1
        outputs, after = emulate(kernel, inputs, launch, self.orders)
        for name, array, changed in zip(kernel.inputs, inputs, after, strict=True):
            if name in kernel.in_place:
                overwrite(array, changed)
        return outputs


def overwrite(array: mx.array, value: mx.array) -> None:
    """Write into the memory of an array, as a kernel does of which MLX does not know."""
    assert array.size >= 8, "a kernel gets fewer than 8 elements as constants"
    view = memoryview(array.view(mx.uint8))
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))  # of MLX's own buffer
    raw = host(value)
    ctypes.memmove(address, raw.ctypes.data, raw.nbytes)


@cache
def built(text: str) -> ctypes.CDLL:
    """Compile once per text, also over runs: the library's name is a hash of its text."""
    shim = (HERE / "metal_shim.h").read_text()
    name = hashlib.sha256((text + shim).encode()).hexdigest()[:24]
    target = Path(tempfile.gettempdir()) / f"openelm-mlx-metal-{os.getuid()}" / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source = target.with_name(f"{name}-{os.getpid()}.cpp")
        source.write_text(text)
        made = source.with_suffix(".so")
        flags = [
            "-std=c++17",
            "-O1",
            "-w",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
        ]
        command = ["g++", *flags, "-I", str(HERE), "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        source.unlink()
        if done.returncode:
            raise Wrong(f"does not compile:\n{done.stderr[:3000]}")
        made.replace(target)
    return ctypes.CDLL(str(target))


def cpp(kernel: Kernel, inputs: Sequence[mx.array], launch: Launch) -> str:
    """Return the C++ of a kernel for these types, as MLX makes Metal of it."""
    alone = "#define SHIM_NO_SECTION" if "template" in kernel.header else ""
    lines = [alone, '#include "metal_shim.h"', "using namespace metal;"]
    lines += ["static shim::Guarded buffers[32];", kernel.header, "void kernel_body() {"]
    for name, value in launch.template:
        if isinstance(value, mx.Dtype):
            lines.append(f"  using {name} = {NAMES[value]};")
        else:
            type_ = "bool" if isinstance(value, bool) else "int"
            lines.append(f"  constexpr {type_} {name} = {str(value).lower()};")
    for number, (name, array) in enumerate(zip(kernel.inputs, inputs, strict=True)):
        type_ = NAMES[array.dtype]
        data = f"buffers[{number}].data"
        if array.ndim == 0:
            lines.append(f"  const {type_}& {name} = *(const {type_}*){data};")
        else:
            lines.append(f"  const device {type_}* {name} = (const {type_}*){data};")
    for number, (name, dtype) in enumerate(zip(kernel.outputs, launch.dtypes, strict=True)):
        type_ = NAMES[dtype]
        data = f"buffers[{len(inputs) + number}].data"
        lines.append(f"  device {type_}* {name} = ({type_}*){data};")
    return "\n".join([*lines, "#line 1", kernel.source, "}", RUN])


RUN = r"""
extern "C" int run(char** data, const size_t* sizes, int count, const unsigned* grid,
                   const unsigned* group, int order, char* message) {
  for (int i = 0; i < count; i++) {
    buffers[i] = shim::guarded(sizes[i]);
    memcpy(buffers[i].data, data[i], sizes[i]);
  }
  static char stack[64 << 10];
  stack_t alternative{}; alternative.ss_sp = stack; alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction mine{}, before_segv, before_bus;
  mine.sa_sigaction = shim::on_crash; mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &mine, &before_segv); sigaction(SIGBUS, &mine, &before_bus);
  bool ok = sigsetjmp(shim::crash, 1) == 0 && shim::launch(kernel_body, grid, group, order);
  sigaction(SIGSEGV, &before_segv, nullptr); sigaction(SIGBUS, &before_bus, nullptr);
  for (int i = 0; i < count; i++) {
    memcpy(data[i], buffers[i].data, sizes[i]);
    munmap(buffers[i].map, buffers[i].length);
  }
  snprintf(message, 512, "%s", shim::error);
  return ok;
}
"""


def host(array: mx.array) -> np.ndarray:
    """Return a copy of the bytes of an array, row by row, as [n] uint8."""
    flat = mx.contiguous(array).reshape(-1)
    return np.array(flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(mx.uint8))


def back(raw: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    flat = mx.array(raw)
    return (flat.astype(mx.bool_) if dtype == mx.bool_ else flat.view(dtype)).reshape(shape)
