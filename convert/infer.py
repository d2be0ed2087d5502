"""The configuration of a checkpoint: from its file where one is known, otherwise read off the
tensors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.config_files import read_json
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.sources.yaml_files import corenet_overrides, corenet_section
from openelm_mlx.errors import CheckpointError, ConfigError, ConversionError
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, normal_name

Shapes = Mapping[str, tuple[int, ...]]  # under Hugging Face's names


def config_for(source: Path, shapes: Shapes, options: ConvertOptions) -> OpenELMConfig:
    """The source's configuration. Raises `ConfigError`, `CheckpointError` or `ConversionError`."""
    path = config_path(source, options)
    section: dict[str, Any] = {}
    if path is not None:
        raw = read_json(path) if path.suffix == ".json" else {}
        if path.suffix == ".json" and not is_corenet_section(raw):
            return with_flags(OpenELMConfig.from_file(path), options)
        section = {k: v for k, v in raw.items() if k != "quantization"} or corenet_section(path)
        size = normal_name(str(section.get("model_name", "")))
        if (
            size in PUBLISHED
        ):  # an adapted embedding leaves the head behind: what the tensors hold wins
            rows = matrix(shapes, "transformer.token_embeddings.weight")[0]
            held: dict[str, Any] = {"share_input_output_layers": "lm_head.weight" not in shapes}
            held |= {} if "vocab_size" in section else {"vocab_size": rows}
            published = OpenELMConfig(**PUBLISHED[size] | corenet_overrides(section) | held)
            return with_flags(published, options)
    return infer_config(shapes, section, options.head_dim, options.rope_base)


def config_path(source: Path, options: ConvertOptions) -> Path | None:
    """`--config`, else config.json of a folder, else config.yaml beside the checkpoint."""
    if options.config is not None or source.is_file():
        return options.config or beside(source, "config.yaml")
    return beside(source, "config.json") or beside(source, "config.yaml")


def is_corenet_section(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of CoreNet's MLX port: the YAML's section, not Hugging Face's
    keys.
    """
    return "model_name" in raw and "model_dim" not in raw


def beside(source: Path, name: str) -> Path | None:
    path = (source if source.is_dir() else source.parent) / name
    return path if path.is_file() else None


def with_flags(config: OpenELMConfig, options: ConvertOptions) -> OpenELMConfig:
    if options.head_dim not in (None, config.head_dim):
        raise ConversionError(
            f"--head-dim {options.head_dim} contradicts the configuration, which has {config.head_dim}"
        )
    return (
        config
        if options.rope_base is None
        else replace(config, rope_freq_constant=options.rope_base)
    )


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
    vocab_size, model_dim = matrix(shapes, "transformer.token_embeddings.weight")
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
        matrix(shapes, f"transformer.layers.{n}.ffn.proj_2.weight")[1] for n in range(layers)
    ]
    glu = matrix(shapes, first + "ffn.proj_1.weight")[0] == 2 * ffn_dims[0]
    groups = {q // kv for q, kv in heads}
    values: dict[str, Any] = {"vocab_size": vocab_size} | corenet_overrides(section)
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


def matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    if name not in shapes:
        raise CheckpointError(f"the checkpoint is incomplete: 1 missing ({name})")
    if len(shapes[name]) != 2 or min(shapes[name]) < 1:
        raise CheckpointError(f"{name} has shape {tuple(shapes[name])}; it must be a matrix")
    return shapes[name][0], shapes[name][1]


def layer_heads(shapes: Shapes, number: int, head_dim: int) -> tuple[int, int]:
    """Query and key/value heads of one layer."""
    layer = f"transformer.layers.{number}.attn."
    rows, q_dim = (
        matrix(shapes, layer + "qkv_proj.weight")[0],
        matrix(shapes, layer + "out_proj.weight")[1],
    )
    kv_dim, odd = divmod(rows - q_dim, 2)
    if head_dim < 1 or odd or kv_dim < head_dim or q_dim % head_dim or kv_dim % head_dim:
        raise ConfigError(
            f"layer {number}: qkv_proj has {rows} rows and out_proj {q_dim} columns, "
            f"which are no whole heads of head_dim {head_dim}"
        )
    return q_dim // head_dim, kv_dim // head_dim
