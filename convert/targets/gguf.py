"""Write GGUF for llama.cpp: its keys, its tensor names, its block format Q8_0, one tensor in memory
at a time.

Keys, names and types follow llama.cpp's conversion/openelm.py: proj_1 is split into gate and up,
vectors are float32, the tokenizer goes along. The file itself is laid out by the `gguf` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openelm_mlx.convert.sources.gguf import CHUNK, LAYER_NAMES, NAMES
from openelm_mlx.convert.tokenizers.tokenizer_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    TokenizerModel,
)
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.model.config import BOS, EOS, UNK, OpenELMConfig, expected_tensors, layer_shapes

STEMS = {name: stem for stem, name in (*NAMES.items(), *LAYER_NAMES.items())}
GATE_AND_UP = ("ffn_gate", "ffn_up")
LARGEST_SCALE = 65504.0  # Q8_0 keeps a block's largest weight / 127 as float16


def check_gguf(config: OpenELMConfig, q8: bool) -> None:
    """Raise `ConversionError` for a model that llama.cpp's `openelm` cannot express, before any
    work.
    """
    for held, what in (
        (config.share_input_output_layers, "a head of its own"),
        (config.ffn_with_glu, "a plain FFN"),
        (config.normalize_qk_projections, "no QK-norm"),
    ):
        if not held:
            raise ConversionError(
                f"the model has {what}, which llama.cpp's openelm cannot express; leave out --to gguf"
            )
    for name, shape in expected_tensors(config).items():
        if q8 and len(shape) == 2 and shape[1] % 32:
            raise ConversionError(
                f"{name} has rows of {shape[1]} weights, no multiple of Q8_0's 32; leave out --bits"
            )


def gguf_type(dtype: str, bits: int | None, group_size: int | None, mode: str | None) -> str:
    """F32, F16, BF16 or Q8_0, from the options of a conversion. Raises `OptionError` for what GGUF
    is not written in.
    """
    if bits is None and mode is None:
        return DTYPES[dtype].gguf
    if bits != 8 or group_size not in (None, 32) or mode not in (None, "affine"):
        raise OptionError(
            "--to gguf writes F32, F16, BF16 (--dtype) and Q8_0 (--bits 8); for others give the file to llama-quantize"
        )
    return "Q8_0"


def gguf_names(name: str) -> tuple[str, ...]:
    """The tensor or tensors that hold Hugging Face's `name`."""
    parts = name.removesuffix(".weight").removeprefix("transformer.").split(".")
    if parts[0] != "layers":
        return (f"{STEMS['.'.join(parts)]}.weight",)
    stem = ".".join(parts[2:])
    stems = GATE_AND_UP if stem == "ffn.proj_1" else (STEMS[stem],)
    return tuple(f"blk.{parts[1]}.{stem}.weight" for stem in stems)


class Stored(NamedTuple):
    """A tensor of the file: its type is one of gguf.GGMLQuantizationType."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    nbytes: int


def gguf_layout(config: OpenELMConfig, kind: str) -> list[Stored]:
    """The tensors of the file in its order: matrices of type `kind`, vectors in float32."""
    import gguf

    tensors = []
    for original, shape in expected_tensors(config).items():
        names = gguf_names(original)
        part = (shape[0] // len(names), *shape[1:])
        chosen = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        tensors += [Stored(name, part, chosen, math.prod(part) // block * size) for name in names]
    return tensors


def write_gguf(
    path: Path,
    name: str,
    config: OpenELMConfig,
    tokenizer: TokenizerModel,
    kind: str,
    chat_template: str | None,
    arrays: Iterable[tuple[str, mx.array]],
    licence: Mapping[str, str],
) -> None:
    """Write the whole file; `arrays` come in the order of `expected_tensors`.

    `licence` has the keys of a model card.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "openelm")
    add_metadata(writer, name, config, kind)
    for key, value in licence.items():
        writer.add_string(f"general.{key.replace('_', '.')}", value)
    add_tokenizer(writer, tokenizer, chat_template)
    layout = gguf_layout(config, kind)
    for tensor in layout:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
        )
    kinds = {tensor.name: tensor.kind for tensor in layout}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for original, array in arrays:
            names = gguf_names(original)
            for part_name, piece in zip(names, mx.split(array, len(names)), strict=True):
                writer.write_tensor_data(encoded(original, piece, kinds[part_name]))
    finally:
        writer.close()


def encoded(name: str, array: mx.array, kind: Any) -> np.ndarray:
    """The tensor's bytes in a GGUF type, encoded a few rows at a time."""
    from gguf.quants import quantize

    if kind.name == "Q8_0" and (mx.abs(array).max() > 127 * LARGEST_SCALE).item():
        raise ConversionError(
            f"{name} has weights beyond the range of Q8_0; use --dtype float32 without --bits"
        )
    if array.ndim == 1:
        return np.array(array.astype(mx.float32))
    step = max(1, CHUNK // array.shape[1])
    rows = (
        np.array(array[row : row + step].astype(mx.float32))
        for row in range(0, array.shape[0], step)
    )
    return np.concatenate(
        [np.ascontiguousarray(quantize(part, kind)).view(np.uint8) for part in rows]
    )


def add_metadata(writer: Any, name: str, config: OpenELMConfig, kind: str) -> None:
    import gguf

    shapes = layer_shapes(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_block_count(len(shapes))
    writer.add_context_length(config.max_context_length)
    writer.add_embedding_length(config.model_dim)
    writer.add_feed_forward_length([shape.ffn_dim for shape in shapes])
    writer.add_head_count([shape.q_heads for shape in shapes])
    writer.add_head_count_kv([shape.kv_heads for shape in shapes])
    writer.add_rope_freq_base(config.rope_freq_constant)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    file_types = {
        "F32": "ALL_F32",
        "F16": "MOSTLY_F16",
        "BF16": "MOSTLY_BF16",
        "Q8_0": "MOSTLY_Q8_0",
    }
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: Any, tokenizer: TokenizerModel, chat_template: str | None) -> None:
    spm = tokenizer.processor
    count = tokenizer.num_pieces
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([spm.id_to_piece(i).encode() for i in range(count)])
    writer.add_token_scores([spm.get_score(i) for i in range(count)])
    writer.add_token_types([piece_kind(spm, i) for i in range(count)])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(True)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def piece_kind(spm: Any, number: int) -> int:
    kinds = (
        (spm.is_unknown, UNKNOWN),
        (spm.is_control, CONTROL),
        (spm.is_unused, UNUSED),
        (spm.is_byte, BYTE),
    )
    return next((kind for test, kind in kinds if test(number)), NORMAL)
