"""Where weights come from: each source lists its tensors at once and loads them one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from openelm_mlx.errors import ConversionError

if TYPE_CHECKING:
    import mlx.core as mx


class TensorInfo(NamedTuple):
    """What a file says of a tensor before its data is read; `dtype` is MLX's name for the type."""

    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Tensors by name. Nothing but `load` touches weights, so memory holds one tensor at a time."""

    path: Path
    tensors: dict[str, TensorInfo]

    def load(self, name: str) -> mx.array: ...


def open_source(path: Path) -> TensorSource:
    """The reader that fits `path`: a torch `.pt` file, or a folder of safetensors. Raises `ConversionError`."""
    from openelm_mlx.convert.sources.huggingface import HuggingFaceFolder
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    if path.is_dir():
        if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
            return HuggingFaceFolder(path)
        checkpoints = sorted(path.glob("*.pt"))
        if len(checkpoints) == 1:
            return TorchCheckpoint(checkpoints[0])
        found = f"{len(checkpoints)} .pt files" if checkpoints else "neither safetensors nor a .pt file"
        raise ConversionError(f"{path} holds {found}; give one .pt file or a Hugging Face folder")
    if not path.exists():
        raise ConversionError(f"{path} does not exist; give a CoreNet .pt file or a Hugging Face folder")
    if path.suffix == ".safetensors":
        raise ConversionError(f"{path} is one file of a model; give its folder, which also holds config.json")
    return TorchCheckpoint(path)
