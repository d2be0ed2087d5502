"""A loaded model on its way through a run: what case it makes, where its folder is, what bounds
it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.benchmarks.hardware.roofline import bound, bytes_per_token
from openelm_mlx.benchmarks.measure.suites import Point, cache_settings
from openelm_mlx.benchmarks.measure.weights import (
    bits_per_weight,
    dtype_name,
    open_engine,
    random_engine,
    write_folder,
)
from openelm_mlx.benchmarks.results.document import Case, Row

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

OURS = "openelm-mlx"


@dataclass
class Weights:
    """A loaded model of one width, and where peers and new processes find the same weights."""

    engine: Engine
    load_seconds: float | None  # None where they were made, not read
    bits: int | None
    random: bool
    stored: bool  # in the width that its folder has
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        return dtype_name(self.engine)

    def written(self, scratch: Path) -> Path:
        """The folder that others load; put into `scratch` the first time, unless the weights came
        from one as they are.
        """
        if self.folder is None:
            self.folder = write_folder(
                self.engine, scratch / f"{self.engine.name.replace('/', '-')}-{self.bits}"
            )
        return self.folder

    def case(self, point: Point, engine: str = OURS) -> Case:
        return Case(
            engine=engine,
            model=last_part(self.engine.name),
            dtype=self.dtype,
            bits=self.bits,
            bits_per_weight=round(bits_per_weight(self.engine), 4),
            prompt_tokens=point.prompt_tokens,
            generation_tokens=point.generation_tokens,
            batch_size=point.batch_size,
            cache=point.cache,
            speculation=None if point.speculation is None else last_part(point.speculation),
            random_weights=self.random,
        )


def last_part(name: str) -> str:
    """A folder or file without where it lies, which is nobody's business: `draft /home/me/nano` -> `draft nano`."""
    kind, space, path = name.rpartition(" ") if name.startswith("draft ") else ("", "", name)
    here = Path(os.path.expanduser(path))
    return f"{kind}{space}{here.resolve().name}" if os.path.exists(here) else name


def open_weights(
    model: str, dtype: str | None, bits: int | None, group_size: int, random: bool
) -> Weights:
    """A model by name or folder, or of a published size with random weights. Raises
    `OpenELMError`.
    """
    if random:
        return Weights(
            random_engine(model, dtype, bits, group_size), None, bits, random=True, stored=False
        )
    engine, seconds = open_engine(model, dtype, bits, group_size)
    folder = engine.path if bits is None else None
    return Weights(
        engine,
        seconds,
        bits or uniform_bits(engine),
        random=False,
        stored=bits is None,
        folder=folder,
    )


def uniform_bits(engine: Engine) -> int | None:
    """The width of a folder that is quantized all alike."""
    quantization = engine.quantization or {}
    mixed = any(isinstance(value, dict) for value in quantization.values())
    bits = quantization.get("bits")
    return None if mixed or not isinstance(bits, int) else bits


def bounded(row: Row, loaded: list[Weights], bandwidth: float | None) -> Row:
    """The row with the bytes that one of its tokens reads and the rate at which a copy moves as
    many.

    One sequence without speculation: elsewhere a pass over the weights gives more than one token.
    """
    case = row.case
    weights = next(weights for weights in loaded if weights.bits == case.bits)
    if case.batch_size > 1 or case.speculation is not None:
        return row
    kept = cache_settings(case.cache)
    context = case.prompt_tokens + case.generation_tokens // 2  # half way through the answer
    parts = bytes_per_token(
        weights.engine.config,
        case.dtype,
        weights.engine.quantization,
        min(context, kept.get("kv_window", context)),
        kept.get("kv_bits"),
    )
    if bandwidth is None:
        return replace(row, bytes_per_token=parts)
    most = bound(parts, bandwidth)
    rate = row.metrics.get("decode_tokens_per_second")
    share = None if rate is None else 100 * rate.median / most
    notes = row.notes
    if share is not None and share > 100:
        notes += (
            f"{share:.0f} % of the bound: reading was faster here than the copy it stands on",
        )
    return replace(
        row,
        bytes_per_token=parts,
        bound_tokens_per_second=most,
        percent_of_bound=share,
        notes=notes,
    )
