"""OpenELM on MLX: load, chat, convert and measure Apple's OpenELM language models.

Names are resolved on first use (PEP 562), so that importing the package, or asking the command line for help,
loads neither MLX nor the hub.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "Engine": "loading",
    "generate": "generation",
    "stream_generate": "generation",
    "Event": "generation",
    "GenerationOptions": "options",
    "SamplingOptions": "options",
    "OpenELMConfig": "config",
    "layer_shapes": "config",
    "Conversation": "chat",
    "PromptCache": "prompt_cache",
    "ModelDraft": "drafts",
    "batch_generate": "batch",
    "BatchEngine": "batch",
    "OpenELMError": "errors",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from openelm_mlx.batch import BatchEngine, batch_generate
    from openelm_mlx.chat import Conversation
    from openelm_mlx.config import OpenELMConfig, layer_shapes
    from openelm_mlx.drafts import ModelDraft
    from openelm_mlx.errors import OpenELMError
    from openelm_mlx.generation import Event, generate, stream_generate
    from openelm_mlx.loading import Engine, load
    from openelm_mlx.options import GenerationOptions, SamplingOptions
    from openelm_mlx.prompt_cache import PromptCache


# In a bare clone `convert/` and `benchmarks/` lie beside this package instead of inside it.
if (Path(__file__).parents[1] / "pyproject.toml").exists():
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"openelm_mlx.{_HOME[name]}"), name)
    if name in ("chat", "config", "convert", "errors"):  # `openelm_mlx.chat.encode_messages` without a second import
        return import_module(f"openelm_mlx.{name}")
    raise AttributeError(f"module 'openelm_mlx' has no attribute {name!r}")
