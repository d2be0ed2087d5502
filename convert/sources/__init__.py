"""Sources of weights: each module here reads one kind of file or folder as a `TensorSource`.

A source lists its tensors at once, under Hugging Face's names whatever it calls them itself, and
loads them one at a time. Choosing specs, quantizing and writing belong to other rooms.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.errors import CheckpointError, ConfigError, ConversionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.checkpoint import Shapes
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.convert.tokenizers import TokenizerModel
    from openelm_mlx.device import mx
    from openelm_mlx.quantization import Plan

OVERRIDES = ("vocab_size", "max_context_length", "padding_index")  # of a CoreNet YAML
LEGACY = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # begins torch's format before 1.6
ZIPFILE_ERRORS = (RuntimeError, ValueError, EOFError)  # for damaged fields
DAMAGED_ZIP = (zipfile.BadZipFile, struct.error, zlib.error, *ZIPFILE_ERRORS)
LICENCE_KEYS = ("license", "license_name", "license_link")  # of a model card on Hugging Face


class TensorSource(Protocol):
    """Tensors under Hugging Face's names. Only `load`, `reader` and `packed` read weights, so
    that only one tensor is in memory at a time.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    config: OpenELMConfig | None = None
    """The configuration that the source states; None if a file beside it or the shapes do."""
    tokenizer: TokenizerModel | None = None
    """The tokenizer that the source itself carries."""
    instruct: bool = False
    """True if the source has a chat template."""
    licence: Mapping[str, str] = {}
    """The licence that the source states, by `LICENCE_KEYS`."""
    rotary: tuple[TensorInfo, Callable[[], mx.array]] | None = None
    """Rotary frequencies that the source contains: their type and shape, and a reader."""
    quantized: Mapping[str, str] = {}
    """The quantization of a matrix by its stem, as in "4 bits, groups of 64" or Q4_K."""
    plan: Plan = {}
    """The matrices that are quantized in the source, in specs that this project writes."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that contain the weights."""
        return (self.path,)

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`, dequantized if need be, in the type that `tensors` states."""
        ...

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        """Return a function that returns the rows from `start` to `stop` of the tensor `name`.

        It loads the tensor once. A source that can read some rows alone returns one that does so.
        """
        array = self.load(name)
        return lambda start, stop: array[start:stop]

    def packed(self, name: str) -> dict[str, mx.array]:
        """Return the stored arrays of a matrix of `plan`, under their names."""
        raise KeyError(name)


def kind_of(path: Path) -> str | None:
    """Return safetensors, gguf or pt, by the first bytes of a file, or None for anything else.

    Raises `ConversionError` if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror or error}") from None
    if head[:4] == b"GGUF":
        return "gguf"
    if head[:4] == b"PK\x03\x04":
        return "pt" if is_torchs_zip(path, head) else None
    if LEGACY in head[:32]:
        return "pt"
    header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40
    return "safetensors" if header else None


def is_torchs_zip(path: Path, head: bytes) -> bool:
    """Return whether a zip, which documents and numpy's arrays are too, is one of torch.save.

    Of a truncated one the name of the first record tells, which is in `head`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except DAMAGED_ZIP:
        return b"/data.pkl" in head
    return any(name.endswith("/data.pkl") for name in names)


def weights_by_kind(folder: Path) -> dict[str, list[Path]]:
    """Return the files of weights in a folder by kind. The kind that loses nothing comes first."""
    found: dict[str, list[Path]] = {"safetensors": [], "gguf": [], "pt": []}
    for path in sorted(folder.iterdir()):
        if path.is_file() and (kind := kind_of(path)) is not None:
            found[kind].append(path)
    return {kind: files for kind, files in found.items() if files}


def infer_config(
    shapes: Shapes,
    section: Mapping[str, Any],
    head_dim: int | None = None,
    rope_base: float | None = None,
) -> OpenELMConfig:
    """Read a configuration off the shapes; `section` (of a CoreNet YAML) adds what they lack.

    Columns of out_proj are query heads x head_dim, rows of qkv_proj (query + 2 key/value heads) x
    head_dim; proj_1 has twice proj_2's columns with a gated unit. RoPE's base and, without QK-norm,
    head_dim are not in the tensors.
    """
    layers = count_layers(shapes)
    first = "transformer.layers.0."
    vocab_size, model_dim = matrix_shape(shapes, f"{EMBEDDINGS}.weight")
    norm = shapes.get(first + "attn.q_norm.weight")
    if norm is None and head_dim is None:
        raise ConversionError(
            "head_dim cannot be read off these tensors (no q_norm); give it as --head-dim, e.g. 64"
        )
    if norm is not None and head_dim not in (None, norm[0]):
        raise ConversionError(
            f"--head-dim {head_dim} contradicts q_norm, which has {norm[0]} entries"
        )
    size = int((head_dim if norm is None else norm[0]) or 0)
    heads = [layer_heads(shapes, number, size) for number in range(layers)]
    proj_2 = [f"transformer.layers.{number}.ffn.proj_2.weight" for number in range(layers)]
    ffn_dims = [matrix_shape(shapes, name)[1] for name in proj_2]
    groups = {q // kv for q, kv in heads}
    values: dict[str, Any] = {"vocab_size": vocab_size} | overrides(section)
    return OpenELMConfig(
        model_dim=model_dim,
        head_dim=size,
        num_transformer_layers=layers,
        num_gqa_groups=groups.pop() if len(groups) == 1 else 1,
        qkv_multipliers=tuple(q * size / model_dim for q, _ in heads),
        ffn_multipliers=tuple(dim / model_dim for dim in ffn_dims),
        num_query_heads=tuple(q for q, _ in heads),
        num_kv_heads=tuple(kv for _, kv in heads),
        ffn_dims=tuple(ffn_dims),
        ffn_with_glu=matrix_shape(shapes, first + "ffn.proj_1.weight")[0] == 2 * ffn_dims[0],
        normalize_qk_projections=norm is not None,
        share_input_output_layers=f"{HEAD}.weight" not in shapes,
        rope_freq_constant=10000.0 if rope_base is None else rope_base,
        **values,
    )


def overrides(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a CoreNet YAML overrides: sizes of vocabulary and context, padding row."""
    return {name: section[name] for name in OVERRIDES if section.get(name) is not None}


def number_of(name: str) -> int:
    """Return the layer of a tensor: 3 for layers.3.ffn.proj_2, -1 for one that is in no layer."""
    found = re.match(r"(?:transformer\.)?layers\.(\d{1,4})\.", name)
    return int(found[1]) if found else -1


def count_layers(shapes: Shapes) -> int:
    numbers = {number_of(name) for name in shapes} - {-1}
    if not numbers:
        raise CheckpointError(
            "this is not an OpenELM checkpoint: it contains no tensor named "
            "layers.0.attn.qkv_proj.weight"
        )
    if numbers != set(range(len(numbers))):
        gap = min(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(
            f"the checkpoint is incomplete: layer {gap} is missing and layer {max(numbers)} present"
        )
    return len(numbers)


def matrix_shape(shapes: Shapes, name: str) -> tuple[int, int]:
    if name not in shapes:
        raise CheckpointError(f"the checkpoint is incomplete: 1 missing ({name})")
    if len(shapes[name]) != 2 or min(shapes[name]) < 1:
        raise CheckpointError(f"{name} has shape {tuple(shapes[name])}; it must be a matrix")
    return shapes[name][0], shapes[name][1]


def layer_heads(shapes: Shapes, number: int, head_dim: int) -> tuple[int, int]:
    """Return the query and the key/value heads of one layer. Raises `ConfigError`."""
    layer = f"transformer.layers.{number}.attn."
    rows = matrix_shape(shapes, layer + "qkv_proj.weight")[0]
    q_dim = matrix_shape(shapes, layer + "out_proj.weight")[1]
    kv_dim, odd = divmod(rows - q_dim, 2)
    if head_dim < 1 or odd or kv_dim < head_dim or q_dim % head_dim or kv_dim % head_dim:
        raise ConfigError(
            f"layer {number}: qkv_proj has {rows} rows and out_proj {q_dim} columns, "
            f"which are not whole heads of head_dim {head_dim}"
        )
    return q_dim // head_dim, kv_dim // head_dim
