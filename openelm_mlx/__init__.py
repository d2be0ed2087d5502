"""OpenELM on MLX: load, chat, convert and measure Apple's OpenELM language models.

Names are resolved on first use (PEP 562), so that importing the package, or asking the command line
for help, loads neither MLX nor the hub.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "BatchEngine": "scheduler",
    "BatchResult": "batch",
    "Conversation": "chat",
    "Engine": "loading",
    "EngineOptions": "options",
    "Event": "request",
    "GenerationOptions": "options",
    "GenerationStats": "stats",
    "ModelDraft": "drafts",
    "OpenELMConfig": "config",
    "OpenELMError": "errors",
    "PromptCache": "prompt_cache",
    "SamplingOptions": "options",
    "batch_generate": "batch",
    "encode_messages": "instruct",
    "generate": "generation",
    "layer_shapes": "config",
    "load": "loading",
    "stream_generate": "generation",
}
_MODULES = ("chat", "config", "convert", "errors")  # no second import for `openelm_mlx.errors`
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
    from openelm_mlx.batch import BatchResult, batch_generate
    from openelm_mlx.chat import Conversation
    from openelm_mlx.config import OpenELMConfig, layer_shapes
    from openelm_mlx.drafts import ModelDraft
    from openelm_mlx.errors import OpenELMError
    from openelm_mlx.generation import generate, stream_generate
    from openelm_mlx.instruct import encode_messages
    from openelm_mlx.loading import Engine, load
    from openelm_mlx.options import EngineOptions, GenerationOptions, SamplingOptions
    from openelm_mlx.prompt_cache import PromptCache
    from openelm_mlx.request import Event
    from openelm_mlx.scheduler import BatchEngine
    from openelm_mlx.stats import GenerationStats


# In a bare clone `convert/` and `benchmarks/` lie beside this package instead of inside it.
if (Path(__file__).parents[1] / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"openelm_mlx.{name}")
    raise AttributeError(f"module 'openelm_mlx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
