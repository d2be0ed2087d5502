"""Compile a kernel for a GPU of NVIDIA's by its run-time compiler, as MLX does; no GPU is needed.

`pip install nvidia-cuda-nvrtc nvidia-cuda-runtime` brings compiler and headers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from openelm_mlx.device import mx
from openelm_mlx.model.kernels.cuda import HEADER, parameters
from openelm_mlx.model.kernels.kernel import Kernel, Launch

NAMES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.bool_: "bool",
    mx.int32: "int",
    mx.uint32: "unsigned",
    mx.uint8: "unsigned char",
    mx.complex64: "float2",
}
OPTIONS = ("--device-as-default-execution-space", "--gpu-architecture=sm_90")


@cache
def folder() -> Path | None:
    """Return where compiler and headers are."""
    try:
        import nvidia
    except ImportError:
        return None
    found = [Path(path) / "cu13" for path in nvidia.__path__]
    complete = ("lib/libnvrtc.so.13", "include/cuda_fp16.h")
    return next((at for at in found if all((at / file).exists() for file in complete)), None)


def compiles_for_cuda() -> bool:
    return folder() is not None


def text(kernel: Kernel, inputs: Sequence[mx.array], launch: Launch) -> str:
    """Return the CUDA of a kernel for these types, as mlx/backend/cuda/custom_kernel.cpp has it."""
    numbers = tuple(n for n, a in zip(kernel.inputs, inputs, strict=True) if a.ndim == 0)
    names, source = parameters(kernel, numbers)
    arguments = [f"const {NAMES[a.dtype]}* {n}" for n, a in zip(names, inputs, strict=True)]
    results = zip(kernel.outputs, launch.dtypes, strict=True)
    arguments += [f"{NAMES[dtype]}* {name}" for name, dtype in results]
    lines = ["#include <cuda_bf16.h>", "#include <cuda_fp16.h>", HEADER, kernel.header]
    lines += ["namespace mlx { namespace core { namespace cu {", "__global__ void custom_kernel("]
    lines += [", ".join(arguments), ") {"]
    for name, value in launch.template:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {NAMES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
    return "\n".join([*lines, source, "}}}}"])


class ForCuda:
    """A runner for `kernel.running` that compiles each kernel for CUDA, and lets another run it.

    `complaints` has what the compiler says, by the kernel's name.
    """

    def __init__(self) -> None:
        self.complaints: dict[str, str] = {}
        self.compiled: set[str] = set()

    def __call__(self, kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        source = text(kernel, inputs, launch)
        if source not in self.compiled:
            self.compiled.add(source)
            if said := complaint(source):
                self.complaints[kernel.name] = said
        return [mx.zeros(shape, d) for shape, d in zip(launch.shapes, launch.dtypes, strict=True)]


def complaint(source: str) -> str:
    """Return why a source does not compile, "" if it does."""
    at = folder()
    assert at is not None
    library, program = ctypes.CDLL(str(at / "lib/libnvrtc.so.13")), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
    options = [option.encode() for option in (*OPTIONS, f"--include-path={at / 'include'}")]
    given = (ctypes.c_char_p * len(options))(*options)
    failed = library.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode() if failed else ""
