"""The GGUF that llama.cpp is timed on: the very weights of a model folder.

An unquantized folder goes through our converter. MLX's affine 4 and 5 bits in groups of 32 or more
are, integer for integer, llama.cpp's Q4_1 and Q5_1 (weight = d * integer + m in blocks of 32, d and
m in float16), so such matrices keep their integers; a group of 64 fills two blocks. No GGUF type
has the other quantizations, which are expanded to the type of the activations: llama.cpp then reads
more bytes, and its version says so. The blocks are those of ggml/src/ggml-common.h.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.engine.loading import read_weights
from openelm_mlx.files import read_json
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec, quantization_of, spec_of

BLOCK = 32
KINDS = {4: "Q4_1", 5: "Q5_1"}  # by bits


def write_gguf(folder: Path, dtype: str, scratch: Path) -> Path:
    """Write a GGUF into `scratch`, named for its matrices: `float32`, `Q4_1`, `8-bit as float32`.

    Raises `ConversionError` for a model that llama.cpp's architecture cannot express.
    """
    from openelm_mlx.convert import ConvertOptions, convert

    work = Path(tempfile.mkdtemp(prefix="gguf-", dir=scratch))
    path, told = work / "model.gguf", dtype
    if quantization_of(read_json(folder / "config.json")) is None:
        convert(ConvertOptions(folder, path, target_format="gguf", dtype=dtype))
    else:
        told = write_quantized(folder, dtype, path)
    return path.rename(work / f"{told}.gguf")


def write_quantized(folder: Path, dtype: str, path: Path) -> str:
    """Write a quantized folder and return what its matrices are in."""
    import gguf

    from openelm_mlx.convert.targets.gguf import add_metadata, add_tokenizer, check_gguf, gguf_names
    from openelm_mlx.convert.tokenizers.tokenizer_model import read_tokenizer

    raw = read_json(folder / "config.json")
    config, quantization = OpenELMConfig.from_hf_dict(raw), quantization_of(raw) or {}
    check_gguf(config, False)
    weights, told = read_weights(folder), set()
    writer = gguf.GGUFWriter(path, "openelm")
    try:
        add_metadata(writer, folder.name, config, "F32")
        add_tokenizer(writer, read_tokenizer(folder / "tokenizer.model"), None)
        for name in expected_tensors(config):
            stem, array, spec = name.removesuffix(".weight"), weights[name], None
            if f"{stem}.scales" in weights:
                spec = spec_of(quantization, stem)
            if spec is None:
                data, kind = plain(array, dtype if array.ndim == 2 else "float32")
            else:
                parts = array, weights[f"{stem}.scales"], weights.get(f"{stem}.biases")
                data, kind = stored(*parts, spec, dtype)
                told.add(kind if kind in KINDS.values() else f"{spec.bits}-bit as {dtype}")
            names = gguf_names(name)
            for part_name, part in zip(names, np.split(data, len(names)), strict=True):
                writer.add_tensor(part_name, part, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return ", ".join(sorted(told))


def stored(
    words: mx.array, scales: mx.array, biases: mx.array | None, spec: QuantSpec, dtype: str
) -> tuple[np.ndarray, str]:
    """Return a quantized matrix for the file and its GGUF type: the same integers, or expanded."""
    if biases is None or spec.mode != "affine" or spec.group_size % BLOCK or spec.bits not in KINDS:
        return plain(mx.dequantize(words, scales, biases, **spec.as_config()), dtype)
    return blocks(words, scales, biases, spec), KINDS[spec.bits]


def plain(array: mx.array, dtype: str) -> tuple[np.ndarray, str]:
    """Return unquantized values and their GGUF type; numpy lacks bfloat16 and gets its bytes."""
    array = array.astype(DTYPES[dtype].mlx)
    return np.array(array.view(mx.uint8) if dtype == "bfloat16" else array), DTYPES[dtype].gguf


def blocks(words: mx.array, scales: mx.array, biases: mx.array, spec: QuantSpec) -> np.ndarray:
    """Return Q4_1 or Q5_1 blocks, [rows, bytes]: d, m, for 5 bits the 32 high bits, the low ones.

    Byte i of the low bits has the integers i and i + 16 of its block.
    """
    integers = unpacked(np.array(words), spec.bits).reshape(words.shape[0], -1, BLOCK)
    parts: list[np.ndarray] = []
    for array in (scales, biases):
        halves = np.array(array.astype(mx.float16)).repeat(spec.group_size // BLOCK, axis=1)
        parts.append(halves[..., None].view(np.uint8))
    if spec.bits == 5:
        parts.append(np.packbits(integers >> 4, axis=-1, bitorder="little"))
    low = integers & 15
    parts.append(low[..., :16] | low[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(integers.shape[0], -1)


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Turn [rows, words] uint32 into [rows, columns] uint8; a row is one stream of bits."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    columns = stream.reshape(len(words), -1, bits)
    return np.packbits(columns, axis=-1, bitorder="little")[..., 0]
