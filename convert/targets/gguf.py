"""A GGUF file for llama.cpp: its keys, its tensor names, its blocks.

Keys, names and types follow llama.cpp's conversion/openelm.py: proj_1 is split into gate and up,
vectors are float32, the tokenizer goes along. The `gguf` package lays out the file, which is
written one tensor at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.options import ConvertOptions, Progress
from openelm_mlx.convert.quantize import kquants
from openelm_mlx.convert.quantize.plan import Quantization
from openelm_mlx.convert.record import ConversionReport, licence_of
from openelm_mlx.convert.sources.gguf import LAYER_NAMES, NAMES, licence_key
from openelm_mlx.convert.targets import Target
from openelm_mlx.convert.targets.gguf_types import fallen_back, types_of
from openelm_mlx.convert.tokenizers import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, TokenizerModel
from openelm_mlx.device import mx
from openelm_mlx.dtypes import BY_GGUF, DTYPES
from openelm_mlx.engine.prompts import CHAT_TEMPLATE
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.config import (
    BOS,
    EMBEDDINGS,
    EOS,
    UNK,
    OpenELMConfig,
    expected_tensors,
    layer_shapes,
)
from openelm_mlx.quantization import Plan, matrices, stem_of

STEMS = {name: stem for stem, name in (*NAMES.items(), *LAYER_NAMES.items())}
GATE_AND_UP = ("ffn_gate", "ffn_up")
LARGEST_SCALE = 65504.0  # a block keeps its scale as float16
CODES = {"Q8_0": 127, "Q4_0": 8}  # how many scales a block's largest weight is; other types: more
CHUNK = 1 << 16  # weights that a thread encodes at a time: they stay in its cache


class GGUFTarget(Target):
    """The file that a conversion writes with --to gguf. The format cannot store a record."""

    keeps_record = False

    def __init__(
        self, opened: OpenedModel, tensors: Mapping[str, TensorInfo], options: ConvertOptions
    ) -> None:
        """`tensors` are those of the model in the types that `options` ask for."""
        self.opened, self.options = opened, options
        self.kind = gguf_type(tensors[f"{EMBEDDINGS}.weight"].dtype, options)
        check_gguf(opened.trimmed)
        self.shapes = {name: info.shape for name, info in tensors.items()}
        self.kinds = types_of(self.kind, opened.trimmed)
        self.notes = fallen_back(self.kind, opened.trimmed)
        self.licence = licence_of(opened.source, options).without_files

    def plan(self, progress: Progress | None) -> Quantization:
        """Leave all matrices unquantized: llama.cpp's types are not MLX's."""
        return Quantization(dict.fromkeys(matrices(self.shapes)))

    def nbytes(self, plan: Plan | None = None) -> int:
        return sum(stored.nbytes for stored in gguf_layout(self.opened.trimmed, self.kinds))

    def types(self, plan: Plan) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, kind in self.kinds.items():
            found.setdefault(kind, []).append(stem_of(name))
        return found

    def rounds(self, plan: Plan) -> set[str]:
        return {stem_of(name) for name, kind in self.kinds.items() if kind not in BY_GGUF}

    def write(self, folder: Path, plan: Plan, arrays: Iterable[tuple[str, mx.array]]) -> Path:
        path = folder / self.options.target.name
        template = CHAT_TEMPLATE if self.options.is_instruct else None
        head = Head(self.options.target.stem, self.kind, template, self.licence)
        blocks = ((name, encoded(name, array, self.kinds[name])) for name, array in arrays)
        write_gguf(path, head, self.opened.trimmed, self.opened.tokenizer, self.kinds, blocks)
        return path

    def write_record(
        self, folder: Path, report: ConversionReport, hashes: Mapping[str, str]
    ) -> None:
        return None


def check_gguf(config: OpenELMConfig) -> None:
    """Raise `ConversionError` for a model that llama.cpp's `openelm` cannot express."""
    unfit = {
        "a head of its own": not config.share_input_output_layers,
        "a plain FFN": not config.ffn_with_glu,
        "no QK-norm": not config.normalize_qk_projections,
    }
    if what := next((what for what, found in unfit.items() if found), None):
        problem = f"the model has {what}, which llama.cpp's openelm cannot express"
        raise ConversionError(f"{problem}; leave out --to gguf")


def gguf_type(dtype: str, options: ConvertOptions) -> str:
    """Return the file's type: F32, F16, BF16, or one of `GGUF_TYPES`.

    Raises `OptionError` for bits and modes that are none of them.
    """
    if options.bits is None and options.mode is None:
        return options.gguf_type or DTYPES[dtype].gguf
    affine = options.mode in (None, "affine") and options.group_size in (None, 32)
    if options.bits != 8 or not affine:
        raise OptionError(
            "--to gguf writes F32, F16, BF16 (--dtype), Q8_0 (--bits 8), and the types of "
            "--gguf-type, such as Q4_K_M"
        )
    return "Q8_0"


def gguf_names(name: str) -> tuple[str, ...]:
    """Return the tensor or tensors that Hugging Face's `name` becomes."""
    stem = stem_of(name)
    if stem in STEMS:
        return (f"{STEMS[stem]}.weight",)
    _, _, number, role = stem.split(".", 3)
    stems = GATE_AND_UP if role == "ffn.proj_1" else (STEMS[role],)
    return tuple(f"blk.{number}.{of}.weight" for of in stems)


class Stored(NamedTuple):
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    nbytes: int


class Head(NamedTuple):
    """The file's own description: a name, the type of its matrices, how to chat with the model, and
    a licence by the keys of a model card.
    """

    name: str
    kind: str
    chat_template: str | None = None
    licence: Mapping[str, str] = {}


def gguf_layout(config: OpenELMConfig, kinds: Mapping[str, str]) -> list[Stored]:
    """Return the tensors of the file in its order; `kinds` says the type of each tensor of the
    model.
    """
    import gguf

    tensors = []
    for original, shape in expected_tensors(config).items():
        names = gguf_names(original)
        part = (shape[0] // len(names), *shape[1:])
        kind = gguf.GGMLQuantizationType[kinds[original]]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        tensors += [Stored(name, part, kind, math.prod(part) // block * size) for name in names]
    return tensors


def write_gguf(
    path: Path,
    head: Head,
    config: OpenELMConfig,
    tokenizer: TokenizerModel,
    kinds: Mapping[str, str],
    blocks: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write the file. `blocks` are the encoded rows of every tensor, in the order of
    `expected_tensors` and in the types that `kinds` says.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "openelm")
    add_metadata(writer, head.name, config, head.kind)
    for key, value in head.licence.items():
        writer.add_string(licence_key(key), value)
    add_tokenizer(writer, tokenizer, head.chat_template)
    for stored in gguf_layout(config, kinds):
        dtype = np.dtype(np.float32)
        writer.add_tensor_info(stored.name, stored.shape, dtype, stored.nbytes, stored.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, rows in blocks:
            for part in np.split(rows, len(gguf_names(name))):
                writer.write_tensor_data(part)
    finally:
        writer.close()


def encoded(name: str, array: mx.array, kind: str) -> np.ndarray:
    """Return the bytes of a tensor in a GGUF type, row by row, encoded a few rows at a time."""
    largest = LARGEST_SCALE * CODES.get(kind, CODES["Q4_0"])
    if kind not in BY_GGUF and (mx.abs(array).max() > largest).item():
        raise ConversionError(
            f"{name} has weights beyond the range of {kind}; use --dtype float32, without --bits "
            "and --gguf-type"
        )
    if array.ndim == 1:
        return np.array(array.astype(mx.float32))
    threads = os.cpu_count() or 1
    step = max(1, CHUNK // array.shape[1])
    parts: list[np.ndarray] = []
    with ThreadPoolExecutor(threads) as pool:
        for row in range(0, array.shape[0], step * threads):
            plain = np.array(array[row : row + step * threads].astype(mx.float32))
            pieces = [plain[start : start + step] for start in range(0, len(plain), step)]
            parts += pool.map(lambda rows: as_blocks(rows, kind), pieces)
    return np.concatenate(parts)


def as_blocks(rows: np.ndarray, kind: str) -> np.ndarray:
    """Return uint8 [rows, bytes] for float32 rows [rows, columns] in a GGUF type."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind in kquants.KINDS:
        return kquants.encode(rows, kind)
    return np.ascontiguousarray(quantize(rows, GGMLQuantizationType[kind])).view(np.uint8)


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
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: Any, tokenizer: TokenizerModel, chat_template: str | None) -> None:
    spm = tokenizer.processor
    count = tokenizer.num_pieces
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece in tokenizer.pieces])
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
    tests = {UNKNOWN: spm.is_unknown, CONTROL: spm.is_control, UNUSED: spm.is_unused}
    tests[BYTE] = spm.is_byte
    return next((kind for kind, test in tests.items() if test(number)), NORMAL)
