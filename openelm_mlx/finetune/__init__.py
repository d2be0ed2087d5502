"""Fine-tuning: a model learns from examples, in an adapter beside its weights or in all of them.

    report = finetune(load("openelm-tiny"), "pairs.jsonl", "my-adapter", FinetuneOptions(rank=8))

A file's records (`sources`, `records`) become token ids with a mark on those that are trained
(`examples`, `data`), these become batches of packed rows (`packing`, `plan`, `batches`), and each
step of the loop (`loop`) takes some: their loss and gradients (`forward`, `step`), the optimizer,
and now and then a checkpoint (`state`). `run` begins it all, and `result` writes what it leaves.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.finetune.options import FinetuneOptions
    from openelm_mlx.finetune.report import FinetuneReport
    from openelm_mlx.finetune.run import finetune

_HOME = {"FinetuneOptions": "options", "FinetuneReport": "report", "finetune": "run"}
# written out: type checkers and editors read it
__all__ = ["FinetuneOptions", "FinetuneReport", "finetune"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.finetune.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
