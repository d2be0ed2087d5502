"""The GGUF that llama.cpp is timed on: the very weights of a model folder.

A folder in full precision goes through our converter. MLX's affine 4 and 5 bits in groups of 32 or
more are, integer for integer, llama.cpp's Q4_1 and Q5_1 (weight = d * integer + m in blocks of 32,
d and m in float16), so quantized matrices of these widths keep their integers; a group of 64 fills
two blocks. No GGUF type holds the other widths, which are expanded to the type of the activations:
llama.cpp then reads more bytes, and its version says so. Source of the blocks:
ggml/src/ggml-common.h, block_q4_1 and block_q5_1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.engine.loading import read_weights
from openelm_mlx.files import read_json
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec, quantization_of, spec_of

BLOCK = 32
KINDS = {4: "Q4_1", 5: "Q5_1"}


class Packed(NamedTuple):
    """A quantized matrix as MLX keeps it, and its settings."""

    words: mx.array  # [rows, columns * bits / 32] uint32
    scales: mx.array  # [rows, groups]
    biases: mx.array | None
    spec: QuantSpec

    @property
    def kind(self) -> str | None:
        """The GGUF type that holds the same integers, if there is one."""
        fits = self.spec.mode == "affine" and self.spec.group_size % BLOCK == 0
        return KINDS.get(self.spec.bits) if fits else None

    def expanded(self) -> mx.array:
        return mx.dequantize(self.words, self.scales, self.biases, **self.spec.as_config())


def write_gguf(folder: Path, dtype: str, path: Path) -> str:
    """Write `path` and return what its matrices are in: `float32`, `Q4_1`, `8-bit as float32` ...

    Raises `ConversionError` for a model that llama.cpp's architecture cannot express.
    """
    from openelm_mlx.convert import ConvertOptions, convert

    raw = read_json(folder / "config.json")
    quantization = quantization_of(raw)
    if quantization is None:
        convert(ConvertOptions(folder, path, target_format="gguf", dtype=dtype))
        return dtype
    return write_quantized(folder, OpenELMConfig.from_hf_dict(raw), quantization, dtype, path)


def write_quantized(
    folder: Path, config: OpenELMConfig, quantization: Mapping[str, Any], dtype: str, path: Path
) -> str:
    import gguf

    from openelm_mlx.convert.targets.gguf import add_metadata, add_tokenizer, check_gguf, gguf_names
    from openelm_mlx.convert.tokenizers.tokenizer_model import read_tokenizer

    check_gguf(config, False)
    weights, told = read_weights(folder), set()
    writer = gguf.GGUFWriter(path, "openelm")
    try:
        add_metadata(writer, folder.name, config, "F32")
        add_tokenizer(writer, read_tokenizer(folder / "tokenizer.model"), None)
        for name in expected_tensors(config):
            found = packed(weights, name.removesuffix(".weight"), quantization)
            if found is not None and found.kind is not None:
                whole, kind = blocks(found), gguf.GGMLQuantizationType[found.kind]
                told.add(found.kind)
            else:
                array = weights[name] if found is None else found.expanded()
                whole, kind = plain(array, dtype if array.ndim == 2 else "float32")
                told |= {f"{found.spec.bits}-bit as {dtype}"} if found is not None else set()
            names = gguf_names(name)
            for part_name, part in zip(names, np.split(whole, len(names)), strict=True):
                writer.add_tensor(part_name, part, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return ", ".join(sorted(told))


def packed(
    weights: Mapping[str, mx.array], module: str, quantization: Mapping[str, Any]
) -> Packed | None:
    """The quantized matrix of `module` under config.json's settings, or None where it is not
    quantized.
    """
    spec = spec_of(quantization, module) if f"{module}.scales" in weights else None
    if spec is None:
        return None
    words, scales = weights[f"{module}.weight"], weights[f"{module}.scales"]
    return Packed(words, scales, weights.get(f"{module}.biases"), spec)


def blocks(matrix: Packed) -> np.ndarray:
    """Q4_1 or Q5_1 blocks, [rows, bytes]: d, m, for 5 bits the 32 high bits, then the low ones.

    Byte i of the low bits holds integers i and i + 16 of its block.
    """
    integers = unpacked(np.array(matrix.words), matrix.spec.bits).reshape(
        matrix.words.shape[0], -1, BLOCK
    )
    scales, biases = (
        np.repeat(np.array(array.astype(mx.float16)), matrix.spec.group_size // BLOCK, axis=1)[
            ..., None
        ].view(np.uint8)
        for array in (matrix.scales, matrix.biases)
        if array is not None
    )
    low = integers & 15
    parts = [scales, biases, low[..., :16] | low[..., 16:] << 4]
    if matrix.spec.bits == 5:
        parts.insert(2, np.packbits(integers >> 4, axis=-1, bitorder="little"))
    return np.concatenate(parts, axis=-1).reshape(integers.shape[0], -1)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """[rows, words] uint32 -> [rows, columns] uint8. A row is one stream of bits, lowest first."""
    octets = np.pad(np.ascontiguousarray(words).view(np.uint8), ((0, 0), (0, 1))).astype(np.uint16)
    at = np.arange(words.shape[1] * 32 // bits) * bits
    pairs = octets[:, at // 8] | octets[:, at // 8 + 1] << 8
    return ((pairs >> (at % 8)) & (2**bits - 1)).astype(np.uint8)


def plain(array: mx.array, dtype: str) -> tuple[np.ndarray, Any]:
    """Unquantized values and their GGUF type; numpy has no bfloat16, so its bytes stand for it."""
    import gguf

    array, kind = array.astype(DTYPES[dtype].mlx), gguf.GGMLQuantizationType[DTYPES[dtype].gguf]
    return np.array(array.view(mx.uint8) if dtype == "bfloat16" else array), kind
