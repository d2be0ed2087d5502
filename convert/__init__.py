"""From every form in which OpenELM's weights were published to a model folder.

>>> from openelm_mlx.convert import ConvertOptions, convert
>>> report = convert(ConvertOptions(Path("checkpoint.pt"), Path("openelm-270m-4bit"), bits=4))
>>> report.bits_per_weight, report.written_bytes

`fetch_published` gives the path of what a published name such as corenet:270m stands for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.convert.fetch.catalog import fetch_published
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.pipeline import ConversionReport, convert

_HOME = {
    "ConversionReport": "pipeline",
    "ConvertOptions": "options",
    "convert": "pipeline",
    "fetch_published": "fetch.catalog",
}
__all__ = ["ConversionReport", "ConvertOptions", "convert", "fetch_published"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.convert.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
