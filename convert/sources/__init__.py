"""Where weights come from: each source lists its tensors at once and loads them one at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from openelm_mlx.errors import ConversionError

if TYPE_CHECKING:
    from openelm_mlx.convert.quantize.forms import Form
    from openelm_mlx.convert.tokenizers.tokenizer_model import TokenizerModel
    from openelm_mlx.device import mx
    from openelm_mlx.model.config import OpenELMConfig


class TensorInfo(NamedTuple):
    """What a file says of a tensor before its data is read; `dtype` is MLX's name for the type."""

    dtype: str
    shape: tuple[int, ...]


class TensorSource(Protocol):
    """Tensors by name. Nothing but `load` touches weights, so memory holds one tensor at a time."""

    path: Path
    tensors: dict[str, TensorInfo]
    config: OpenELMConfig | None = (
        None  # what the source itself says of its model; None: a file beside it, or the shapes
    )
    tokenizer: TokenizerModel | None = None  # where the source carries one
    instruct: bool = False  # whether the source has a chat template
    licence: Mapping[str, str] = {}  # what the source itself says of its licence, by licence.KEYS
    forms: Mapping[
        str, Form
    ] = {}  # stems of matrices that are quantized in the source, in forms this project writes

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""
        return (self.path,)

    def load(self, name: str) -> mx.array:
        """The tensor `name` in the type it is stored in, whole: quantized matrices are
        dequantized.
        """
        ...

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        """Some rows of the tensor `name`; a source that can read them alone does."""
        return self.load(name)[start:stop]

    def packed(self, name: str) -> dict[str, mx.array]:
        """The stored arrays of a matrix among `forms`, under their names."""
        raise KeyError(name)


def open_source(path: Path, source_format: str | None = None) -> TensorSource:
    """The reader for what `path` holds, by its content, not its name. Raises `ConversionError`.

    `source_format` (`--from`) forces one: pt, huggingface, mlx, corenet-mlx, gguf.
    """
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    if not os.path.exists(path):
        raise ConversionError(f"{path} does not exist; give {WANTED}")
    if not os.path.isfile(path) and not os.path.isdir(
        path
    ):  # a pipe would be waited for without end
        raise ConversionError(f"{path} is neither a file nor a folder; give {WANTED}")
    kind = kind_of(path) if path.is_file() else None
    if path.is_dir():
        found = weights_by_kind(path)
        if source_format is not None:
            found = {
                kind: files for kind, files in found.items() if kind == FILE_KIND[source_format]
            }
        kind = next(iter(found), None)
        if kind is None:
            wanted = (
                "nothing that --from " + source_format
                if source_format
                else "neither safetensors nor a .pt or GGUF file"
            )
            raise ConversionError(
                f"{path} holds {wanted}{' reads' if source_format else ''}; give {WANTED}"
            )
        if kind == "safetensors":
            return safetensors_folder(path)
        if len(found[kind]) > 1:
            raise ConversionError(f"{path} holds {len(found[kind])} {kind} files; name one of them")
        path = found[kind][0]
    elif kind == "safetensors" and source_format is None:
        raise ConversionError(
            f"{path} is one file of a model; give its folder, which also holds config.json"
        )
    if source_format is not None:
        kind = FILE_KIND[source_format]
    if kind is None and path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty; fetch or copy it again")
    if kind == "gguf" or (kind is None and path.suffix.lower() == ".gguf"):
        from openelm_mlx.convert.sources.gguf import GGUFFile

        return GGUFFile(path)
    if kind == "safetensors":
        raise ConversionError(
            f"{path} is no folder; --from {source_format} takes the folder of a model"
        )
    return TorchCheckpoint(path)


def safetensors_folder(path: Path) -> TensorSource:
    from openelm_mlx.config_files import read_json
    from openelm_mlx.convert.sources.huggingface import HuggingFaceFolder
    from openelm_mlx.convert.sources.quantized import QuantizedFolder, quantization_of

    source = HuggingFaceFolder(path)
    if not any(name.endswith(".scales") for name in source.tensors):
        return source
    config = path / "config.json"
    return QuantizedFolder(source, quantization_of(read_json(config)) if config.is_file() else None)


WANTED = "a CoreNet .pt file, a folder of safetensors or a GGUF file"
FILE_KIND = {
    "pt": "pt",
    "huggingface": "safetensors",
    "mlx": "safetensors",
    "corenet-mlx": "safetensors",
    "gguf": "gguf",
}


def kind_of(path: Path) -> str | None:
    """safetensors, gguf or pt, by the first bytes; None for anything else. Raises `ConversionError`
    if unreadable.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    if head[:4] == b"GGUF":
        return "gguf"
    if path.suffix == ".npz":
        return None  # a zip too, of numpy's arrays
    if head[:4] == b"PK\x03\x04" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04"):
        return "pt"  # a zip, or a bare pickle: torch's formats, new and old
    return (
        "safetensors"
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40
        else None
    )


def weights_by_kind(folder: Path) -> dict[str, list[Path]]:
    """Files of weights in a folder by kind, the kind that loses nothing first."""
    found: dict[str, list[Path]] = {"safetensors": [], "gguf": [], "pt": []}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (kind := kind_of(path)) is not None:
            found[kind].append(path)
    return {kind: files for kind, files in found.items() if files}
