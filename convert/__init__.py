"""From every form in which OpenELM's weights were published to a model folder; see `pipeline.convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openelm_mlx.convert.catalog import fetch_published
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.pipeline import ConversionReport, convert

__all__ = ["ConversionReport", "ConvertOptions", "convert", "fetch_published"]


def __getattr__(name: str) -> Any:
    if name == "ConvertOptions":
        from openelm_mlx.convert.options import ConvertOptions

        return ConvertOptions
    if name == "fetch_published":
        from openelm_mlx.convert.catalog import fetch_published

        return fetch_published
    if name in __all__:
        from openelm_mlx.convert import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
