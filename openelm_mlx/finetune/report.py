"""What a fine-tuning has done: the numbers for its card, and for `finetune.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from openelm_mlx.finetune.options import FinetuneOptions


@dataclass(frozen=True)
class FinetuneReport:
    """The result of a fine-tuning. Losses are in nats per trained token, or per pair."""

    folder: Path
    model: str
    options: FinetuneOptions  # as the run took them: defaults that follow from the data are filled
    parameters: int  # numbers that were trained
    base_parameters: int
    data: Mapping[str, Any]
    """The `name` of the data without folders, their `kind`, how many `records`, `examples`,
    `validation_examples`, `tokens` and `trained_tokens` they have, and a hash of the latter
    (`sha256`).
    """
    length: int  # tokens of a row
    processes: int
    steps: int
    steps_planned: int
    epochs: float
    ended: str  # "all steps are done", "no better validation loss in 3 evaluations", ...
    first_loss: float | None
    last_loss: float | None
    first_validation_loss: float | None
    last_validation_loss: float | None
    best_validation_loss: float | None
    best_step: int  # whose weights are the result
    tokens: int  # of all steps, without padding
    trained_tokens: int  # those among them that the loss counts
    seconds: float  # of training and evaluation, those before a resume too
    peak_bytes: int  # of MLX's memory
    predicted_bytes: Mapping[str, Any]  # of it before the first step: `total`, and what takes it
    versions: Mapping[str, str | None]
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        return self.options.method

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the names of files without their folders."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        found |= {"folder": self.folder.name, "options": settings(self.options)}
        found |= {"method": self.method, "tokens_per_second": self.tokens_per_second}
        return found | {"notes": list(self.notes)}


def settings(options: FinetuneOptions) -> dict[str, Any]:
    """Return the options as JSON has them."""
    found: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        value = value.name if isinstance(value, Path) else value
        found[item.name] = list(value) if isinstance(value, tuple) else value
    return found
