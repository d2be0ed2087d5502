"""The converter: it reads OpenELM's weights in every published format, and writes MLX's or GGUF.

    report = convert(ConvertOptions(Path("checkpoint.pt"), Path("openelm-270m-4bit"), bits=4))

`pipeline` is the map. The engine imports this room only to turn a name into a folder, and to read
the adapter in a checkpoint. `fetch_published` returns the path of a published name such as
corenet:270m.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.convert.fetch import fetch_published
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.pipeline import convert
    from openelm_mlx.convert.record import ConversionReport

_HOME = {
    "ConversionReport": "record",
    "ConvertOptions": "options",
    "convert": "pipeline",
    "fetch_published": "fetch",
}
__all__ = ["ConversionReport", "ConvertOptions", "convert", "fetch_published"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.convert.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
