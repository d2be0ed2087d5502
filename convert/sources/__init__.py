"""Where weights come from: each source lists its tensors at once and loads them one at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from openelm_mlx.errors import CheckpointError, ConfigError, ConversionError
from openelm_mlx.files import TensorInfo, read_json
from openelm_mlx.model.config import OpenELMConfig

if TYPE_CHECKING:
    from openelm_mlx.convert.tokenizers.tokenizer_model import TokenizerModel
    from openelm_mlx.device import mx
    from openelm_mlx.quantization import QuantSpec


Value = TypeVar("Value")
Shapes = Mapping[str, tuple[int, ...]]  # under Hugging Face's names
RENAMES = (  # CoreNet's names become Hugging Face's; the first pattern that matches wins
    (re.compile(r"^classifier(?=\.|$)"), "lm_head"),
    (re.compile(r"^(token_embeddings|layers|norm)(?=\.|$)"), r"transformer.\1"),
)
OVERRIDES = ("vocab_size", "max_context_length", "padding_index")  # of a CoreNet YAML
COMPUTED = re.compile(r"\.inv_freq$|(^|\.)causal_mask$")  # buffers of some exports, never read


class TensorSource(Protocol):
    """Tensors under the names that Hugging Face's checkpoints use, whatever the source calls them.

    Only `load`, `rows` and `packed` read weights, so memory holds one tensor at a time.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    config: OpenELMConfig | None = (
        None  # what the source itself says of its model; None: a file beside it, or the shapes
    )
    tokenizer: TokenizerModel | None = None  # where the source carries one
    instruct: bool = False  # whether the source has a chat template
    licence: Mapping[str, str] = {}  # what the source itself says of its licence, by licence.KEYS
    forms: Mapping[
        str, QuantSpec
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


def canonical_name(name: str) -> str:
    """Return Hugging Face's name of a tensor or module that CoreNet may have named."""
    for pattern, replacement in RENAMES:
        name, count = pattern.subn(replacement, name)
        if count:
            break
    return name


def canonical(found: Mapping[str, Value]) -> dict[str, Value]:
    """Return the same values under Hugging Face's names, without buffers that the engine computes.

    Raises `ConversionError` where two names stand for one tensor.
    """
    result: dict[str, Value] = {}
    first: dict[str, str] = {}
    for name, value in found.items():
        if COMPUTED.search(name):
            continue
        known = canonical_name(name)
        if known in result:
            raise ConversionError(
                f"the checkpoint holds both {first[known]} and {name}, which are one tensor"
            )
        result[known], first[known] = value, name
    return result


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
    from openelm_mlx.convert.sources.huggingface import HuggingFaceFolder
    from openelm_mlx.convert.sources.quantized import QuantizedFolder
    from openelm_mlx.quantization import quantization_of

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


def infer_config(
    shapes: Shapes,
    section: Mapping[str, Any],
    head_dim: int | None = None,
    rope_base: float | None = None,
) -> OpenELMConfig:
    """What the shapes say; `section` (of a CoreNet YAML) adds context length and padding row.

    Columns of out_proj are query heads x head_dim, rows of qkv_proj (query + 2 key/value heads) x
    head_dim; proj_1 has twice proj_2's columns with a gated unit. RoPE's base and, without QK-norm,
    head_dim are not in the tensors.
    """
    layers = count_layers(shapes)
    first = "transformer.layers.0."
    vocab_size, model_dim = matrix_shape(shapes, "transformer.token_embeddings.weight")
    norm = shapes.get(first + "attn.q_norm.weight")
    if norm is None and head_dim is None:
        raise ConversionError(
            "head_dim cannot be read off these tensors (no q_norm); give it as --head-dim, e.g. 64"
        )
    if norm is not None and head_dim not in (None, norm[0]):
        raise ConversionError(
            f"--head-dim {head_dim} contradicts q_norm, which has {norm[0]} entries"
        )
    width = head_dim if norm is None else norm[0]
    heads = [layer_heads(shapes, number, int(width or 0)) for number in range(layers)]
    ffn_dims = [
        matrix_shape(shapes, f"transformer.layers.{n}.ffn.proj_2.weight")[1] for n in range(layers)
    ]
    glu = matrix_shape(shapes, first + "ffn.proj_1.weight")[0] == 2 * ffn_dims[0]
    groups = {q // kv for q, kv in heads}
    values: dict[str, Any] = {"vocab_size": vocab_size} | overrides(section)
    return OpenELMConfig(
        model_dim=model_dim,
        head_dim=int(width or 0),
        num_transformer_layers=layers,
        num_gqa_groups=groups.pop() if len(groups) == 1 else 1,
        qkv_multipliers=tuple(q * int(width or 0) / model_dim for q, _ in heads),
        ffn_multipliers=tuple(dim / model_dim for dim in ffn_dims),
        num_query_heads=tuple(q for q, _ in heads),
        num_kv_heads=tuple(kv for _, kv in heads),
        ffn_dims=tuple(ffn_dims),
        ffn_with_glu=glu,
        normalize_qk_projections=norm is not None,
        share_input_output_layers="lm_head.weight" not in shapes,
        rope_freq_constant=10000.0 if rope_base is None else rope_base,
        **values,
    )


def count_layers(shapes: Shapes) -> int:
    numbers = {
        int(m[1]) for name in shapes if (m := re.match(r"transformer\.layers\.(\d{1,4})\.", name))
    }
    if not numbers:
        raise CheckpointError(
            "this is no OpenELM checkpoint: it holds no tensor named layers.0.attn.qkv_proj.weight"
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
    """Query and key/value heads of one layer."""
    layer = f"transformer.layers.{number}.attn."
    rows, q_dim = (
        matrix_shape(shapes, layer + "qkv_proj.weight")[0],
        matrix_shape(shapes, layer + "out_proj.weight")[1],
    )
    kv_dim, odd = divmod(rows - q_dim, 2)
    if head_dim < 1 or odd or kv_dim < head_dim or q_dim % head_dim or kv_dim % head_dim:
        raise ConfigError(
            f"layer {number}: qkv_proj has {rows} rows and out_proj {q_dim} columns, "
            f"which are no whole heads of head_dim {head_dim}"
        )
    return q_dim // head_dim, kv_dim // head_dim


def overrides(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a CoreNet YAML overrides: sizes of vocabulary and context, padding row."""
    return {name: section[name] for name in OVERRIDES if section.get(name) is not None}
