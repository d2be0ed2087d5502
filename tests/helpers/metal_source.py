"""The Metal source of a kernel as MLX makes it, with the signature that it writes around the body.

MLX tells it where a function is exported, also on a machine without Metal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import mlx.core as mx
from kernel_cases import Case

from openelm_mlx.model.kernels.kernel import Kernel, Launch, made_for_metal, running

HEADERS = Path(mx.__file__).parent / "include"  # MLX's own, which every wheel has
BEFORE = '#include "mlx/backend/metal/kernels/utils.h"\n'  # what MLX puts before a kernel

Launched = tuple[Kernel, list[mx.array], Launch]


def launched(case: Case) -> list[Launched]:
    """Return what a call launches. Nothing runs, and the results are zeros."""
    found = []

    def record(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> list[mx.array]:
        found.append((kernel, inputs, launch))
        return [mx.zeros(*one) for one in zip(launch.shapes, launch.dtypes, strict=True)]

    with running(record, frozenset({case.kernel})):
        case.call()
    return found


def sources(cases: Iterable[Case]) -> dict[str, str]:
    """Return the source of every kernel, type and template of these calls, by MLX's name for it."""
    found = {}
    for case in cases:
        for one in launched(case):
            text = source(*one)
            name = re.search(r"\[\[kernel\]\] void (\w+)", text)
            assert name, text
            found[name[1]] = BEFORE + text
    return found


def source(kernel: Kernel, inputs: list[mx.array], launch: Launch) -> str:
    """Return what MLX compiles of a kernel, without what it puts before every kernel."""

    def call(*inputs: mx.array) -> list[mx.array]:
        outputs: list[mx.array] = made_for_metal(kernel)(
            inputs=list(inputs),
            template=list(launch.template),
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=launch.shapes,
            output_dtypes=launch.dtypes,
            verbose=True,
        )
        return outputs

    with TemporaryDirectory() as folder:
        said = printed(lambda: mx.export_function(f"{folder}/kernel.mlxfn", call, *inputs))
    return said.split("```")[1].strip() + "\n"


def printed(call: Callable[[], object]) -> str:
    """Return what a call prints from C++, past `sys.stdout`."""
    with TemporaryFile() as file:
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            call()
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return file.read().decode()
