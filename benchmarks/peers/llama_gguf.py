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
from typing import Any

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
    from openelm_mlx.convert.targets import gguf
    from openelm_mlx.convert.tokenizers import read_tokenizer

    raw = read_json(folder / "config.json")
    config, quantization = OpenELMConfig.from_hf_dict(raw), quantization_of(raw) or {}
    gguf.check_gguf(config, "F32")
    weights, kinds, told = read_weights(folder), {}, set()
    specs: dict[str, QuantSpec | None] = {}
    for name in expected_tensors(config):
        stem = name.removesuffix(".weight")
        spec = specs[name] = spec_of(quantization, stem) if f"{stem}.scales" in weights else None
        kinds[name] = DTYPES[dtype].gguf if weights[name].ndim == 2 else "F32"
        if spec is not None:
            kinds[name] = same_integers(spec) or kinds[name]
            told.add(same_integers(spec) or f"{spec.bits}-bit as {dtype}")

    def encoded(name: str, spec: QuantSpec | None) -> np.ndarray:
        array, stem = weights[name], name.removesuffix(".weight")
        if spec is not None:
            parts = array, weights[f"{stem}.scales"], weights.get(f"{stem}.biases")
            if same_integers(spec):
                return blocks(*parts, spec)
            array = mx.dequantize(*parts, **spec.as_config())
        return gguf.encoded(name, array, kinds[name])

    tokenizer = read_tokenizer(folder / "tokenizer.model")
    rows = ((name, encoded(name, spec)) for name, spec in specs.items())
    gguf.write_gguf(path, gguf.Head(folder.name, "F32"), config, tokenizer, kinds, rows)
    return ", ".join(sorted(told))


def same_integers(spec: QuantSpec) -> str | None:
    """Return the GGUF type that has the same integers, if there is one."""
    return KINDS.get(spec.bits) if spec.mode == "affine" and spec.group_size % BLOCK == 0 else None


def blocks(words: mx.array, scales: mx.array, biases: Any, spec: QuantSpec) -> np.ndarray:
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
