"""Scores say how good a model's predictions are, and how far they are from another model's.

    report = evaluate(load("openelm-tiny"), EvaluateOptions(tasks="fairy_tales"))

Here lives what scores text, compares distributions and asks the questions of benchmarks, for
anything that gives logits; `evaluation` is the map. What converts or measures time does not: those
rooms call this one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.evaluate.compare import Comparison, compare_engines
    from openelm_mlx.evaluate.differences import Differences
    from openelm_mlx.evaluate.evaluation import evaluate
    from openelm_mlx.evaluate.options import EvaluateOptions, TextOptions
    from openelm_mlx.evaluate.perplexity import Perplexity, text_perplexity
    from openelm_mlx.evaluate.report import Report

_HOME = {
    "Comparison": "compare",
    "Differences": "differences",
    "EvaluateOptions": "options",
    "Perplexity": "perplexity",
    "Report": "report",
    "TextOptions": "options",
    "compare_engines": "compare",
    "evaluate": "evaluation",
    "text_perplexity": "perplexity",
}
__all__ = [  # written out: type checkers and editors read it
    "Comparison",
    "Differences",
    "EvaluateOptions",
    "Perplexity",
    "Report",
    "TextOptions",
    "compare_engines",
    "evaluate",
    "text_perplexity",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.evaluate.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
