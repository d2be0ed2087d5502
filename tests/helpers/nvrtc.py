"""Compile kernels for NVIDIA GPUs, without one: `pip install nvidia-cuda-nvrtc`."""

from __future__ import annotations

import ctypes
from math import prod
from pathlib import Path

from openelm_mlx.device import mx
from openelm_mlx.model.kernels import cuda
from openelm_mlx.model.kernels.kernel import Kernel, Launch


def compiles_for_cuda() -> bool:
    """Tell whether NVRTC is here; where only a Python package has it, it is loaded from there."""
    try:
        import nvidia

        for path in nvidia.__path__:
            for file in Path(path).glob("*/lib/libnvrtc.so.*"):
                ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
    except (ImportError, OSError):
        pass
    try:
        cuda.nvrtc()
    except OSError:
        return False
    return True


class ForCuda:
    """A runner for `kernel.running` that compiles each kernel for CUDA, and computes nothing."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        assert all(g % t == 0 for g, t in zip(launch.grid, launch.threadgroup, strict=True))
        assert prod(launch.threadgroup) % 32 == 0
        assert cuda.compiled(cuda.text(kernel, inputs, launch), "sm_90")
        self.names.append(kernel.name)
        return [mx.zeros(shape, d) for shape, d in zip(launch.shapes, launch.dtypes, strict=True)]
