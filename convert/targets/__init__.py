"""Targets of a conversion: a model folder (`folder`), or a file for llama.cpp (`gguf`).

A `Target` states how a model is written in one format, and writes it. Reading sources and choosing
a plan belong to other rooms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from openelm_mlx.convert.quantize.plan import Quantization
    from openelm_mlx.convert.record import ConversionReport
    from openelm_mlx.device import mx
    from openelm_mlx.quantization import Plan


class Target(Protocol):
    """One model in one format. Making a target raises an error, before any work, for what the
    format cannot hold.
    """

    keeps_record: bool
    """Whether the format has a place for the record of a conversion."""

    def plan(self, progress: Callable[[int, int, str], None] | None) -> Quantization:
        """Choose how MLX quantizes every matrix, and learn its rounding."""
        ...

    def nbytes(self, plan: Plan) -> int:
        """Return the bytes of the weights."""
        ...

    def write(self, folder: Path, plan: Plan, arrays: Iterable[tuple[str, mx.array]]) -> Path:
        """Write into `folder` all but the record, and return what there is to verify.

        `arrays` come in the order of `expected_tensors`, quantized as `plan` says.
        """
        ...

    def write_record(
        self, folder: Path, report: ConversionReport, hashes: Mapping[str, str]
    ) -> None:
        """Write the record: the report with its losses, and the hashes of the source's files."""
