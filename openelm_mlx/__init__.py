"""OpenELM on MLX: load, chat, convert, evaluate and measure Apple's OpenELM language models.

Names are resolved on first use (PEP 562), so that importing the package, or asking the command line
for help, loads neither MLX nor the hub.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "engine.conversation": ("Conversation",),
    "engine.draft_model": ("ModelDraft",),
    "engine.generation": ("BatchResult", "batch_generate", "generate", "stream_generate"),
    "engine.loading": ("Engine", "load"),
    "engine.options": ("EngineOptions", "GenerationOptions", "SamplingOptions"),
    "engine.prompt_cache": ("PromptCache",),
    "engine.prompts": ("encode_messages",),
    "engine.request": ("Event", "GenerationStats"),
    "engine.scheduler": ("BatchEngine",),
    "errors": ("OpenELMError",),
    "model.config": ("OpenELMConfig", "layer_shapes"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
# modules that are public as attributes, without an import of their own
_MODULES = {name: name for name in ("chat", "convert", "errors", "evaluate")}
_MODULES |= {"config": "model.config"}
__all__ = [  # written out: type checkers and editors read it
    "BatchEngine",
    "BatchResult",
    "Conversation",
    "Engine",
    "EngineOptions",
    "Event",
    "GenerationOptions",
    "GenerationStats",
    "ModelDraft",
    "OpenELMConfig",
    "OpenELMError",
    "PromptCache",
    "SamplingOptions",
    "batch_generate",
    "encode_messages",
    "generate",
    "layer_shapes",
    "load",
    "stream_generate",
]

if TYPE_CHECKING:
    from openelm_mlx.engine.conversation import Conversation
    from openelm_mlx.engine.draft_model import ModelDraft
    from openelm_mlx.engine.generation import BatchResult, batch_generate, generate, stream_generate
    from openelm_mlx.engine.loading import Engine, load
    from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
    from openelm_mlx.engine.prompt_cache import PromptCache
    from openelm_mlx.engine.prompts import encode_messages
    from openelm_mlx.engine.request import Event, GenerationStats
    from openelm_mlx.engine.scheduler import BatchEngine
    from openelm_mlx.errors import OpenELMError
    from openelm_mlx.model.config import OpenELMConfig, layer_shapes


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"openelm_mlx.{_MODULES[name]}")
    raise AttributeError(f"module 'openelm_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
