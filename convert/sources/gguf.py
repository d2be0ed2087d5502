"""llama.cpp's GGUF files of architecture `openelm`: metadata and places first, tensors on demand.

The layout is that of ggml's gguf.md, version 2 or 3. llama.cpp's conversion/openelm.py says what
each key and tensor is: proj_1 is split into gate and up, nothing is permuted. The `gguf` package
decodes the block formats.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openelm_mlx.convert.sources import LICENCE_KEYS, TensorSource, infer_config
from openelm_mlx.convert.tokenizers import UNUSED, TokenizerModel, assemble
from openelm_mlx.device import mx
from openelm_mlx.dtypes import BY_GGUF, DTYPES
from openelm_mlx.errors import CheckpointError, ConfigError, ConversionError, TokenizerError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.config import BOS, EMBEDDINGS, EOS, HEAD, UNK, OpenELMConfig, layer_shapes
from openelm_mlx.quantization import stem_of

# GGUF's stem -> Hugging Face's; blk.N. and transformer.layers.N. stand before the second group
NAMES = {"token_embd": EMBEDDINGS, "output_norm": "transformer.norm", "output": HEAD}
LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "attn_qkv": "attn.qkv_proj",
    "attn_q_norm": "attn.q_norm",
    "attn_k_norm": "attn.k_norm",
    "attn_output": "attn.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.proj_1",
    "ffn_up": "ffn.proj_1",
    "ffn_down": "ffn.proj_2",
}
BLOCKS = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
READABLE = (*BY_GGUF, *BLOCKS.split())
SCALARS = dict(enumerate(("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
MAX_ENTRIES, MAX_TOKENS = 1 << 16, 1 << 20  # the 3B has 30 keys, 327 tensors, 32000 tokens
CHUNK = 1 << 20  # weights decoded at a time: the package makes several copies


class Place(NamedTuple):
    """A tensor in the file: block format, shape (outermost first), first byte."""

    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int


@dataclass
class Cursor:
    """Reads a GGUF header forward. Raises `ConversionError` rather than reach past its end."""

    data: mmap.mmap
    path: Path
    at: int = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ConversionError(
                f"{self.path} is truncated or damaged: its header goes on past byte {self.at}"
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        where = f"{self.path}: its metadata has"
        if kind in SCALARS:
            return self.scalars(kind, 1)[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ConversionError(f"{where} a value of unknown type {kind}, at byte {self.at}")
        inner, count = self.number("<I"), self.number("<Q")
        if count > MAX_TOKENS:
            raise ConversionError(f"{where} a list of {count} entries; no OpenELM needs that many")
        if inner in SCALARS:
            return self.scalars(inner, count)
        if inner != STRING:
            raise ConversionError(f"{where} a list of unknown type {inner}, at byte {self.at}")
        return [self.text() for _ in range(count)]

    def scalars(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()


class GGUFFile(TensorSource):
    """A GGUF file as a checkpoint. Raises `ConversionError` for what it cannot read.

    All tensors are given out in the type of the embedding, or in float32 if that is made of
    blocks: float32 has every value of every block format exactly. (Norms are float32 in the file
    whatever the rest is.)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with (
                open(self.path, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                self.metadata, places = read_header(Cursor(data, self.path))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{self.path} cannot be read: {error}") from None
        self._parts: dict[str, list[Place]] = {}
        for name, place in places.items():
            self._parts.setdefault(hugging_face_name(name), []).append(place)
        kinds = {stem_of(name): parts[0].kind.name for name, parts in self._parts.items()}
        stored = BY_GGUF.get(kinds.get(EMBEDDINGS, ""))
        self._dtype = "float32" if stored is None else stored.name
        self.tensors = {
            name: TensorInfo(self._dtype, self._joined(name, parts))
            for name, parts in self._parts.items()
        }
        self.quantized = {stem: kind for stem, kind in kinds.items() if kind not in BY_GGUF}
        self.instruct = "tokenizer.chat_template" in self.metadata
        fields = {key: self.metadata.get(licence_key(key)) for key in LICENCE_KEYS}
        self.licence = {key: text for key, text in fields.items() if isinstance(text, str) and text}
        self.config: OpenELMConfig = self._read_config()
        self.tokenizer = read_tokenizer(self.path, self.metadata)

    def load(self, name: str) -> mx.array:
        return self._load(name, DTYPES[self._dtype].mlx)

    def load_exact(self, name: str) -> mx.array:
        """Return the tensor `name` in float32. Norms beside half types, which `load` rounds, come
        as they are in the file.
        """
        return self._load(name, mx.float32)

    def _load(self, name: str, dtype: mx.Dtype) -> mx.array:
        decoded = [mx.array(self._decode(place)).astype(dtype) for place in self._parts[name]]
        return decoded[0] if len(decoded) == 1 else mx.concatenate(decoded)

    def _decode(self, place: Place) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        block, size = GGML_QUANT_SIZES[place.kind]
        rows, width = math.prod(place.shape[:-1]), place.shape[-1] // block * size
        out = np.empty((rows, place.shape[-1]), np.float32)
        step = max(1, CHUNK // place.shape[-1])
        try:
            # damaged blocks may be anything: NaN is refused later
            with open(self.path, "rb") as file, np.errstate(all="ignore"):
                file.seek(place.start)
                for row in range(0, rows, step):
                    stored = np.fromfile(file, np.uint8, min(step, rows - row) * width)
                    out[row : row + step] = dequantize(stored.reshape(-1, width), place.kind)
        except (OSError, ValueError) as error:
            raise ConversionError(f"{self.path} cannot be read: {error}") from None
        return out.reshape(place.shape)

    def _joined(self, name: str, parts: list[Place]) -> tuple[int, ...]:
        if len(parts) == 1:
            return parts[0].shape
        gate, up = (part.shape for part in parts[:2])
        if len(parts) > 2 or len(gate) != 2 or gate != up:
            raise ConversionError(
                f"{self.path}: the parts of {name} have shapes {gate}, {up}; they must be alike"
            )
        return (2 * gate[0], gate[1])

    def _read_config(self) -> OpenELMConfig:
        """Read the configuration off the shapes. The metadata must agree, and adds what shapes do
        not say.
        """
        shapes = {name: info.shape for name, info in self.tensors.items()}
        head_dim = self._number("attention.key_length", whole=True)
        base = self._number("rope.freq_base", 10000.0)
        eps = self._number("attention.layer_norm_rms_epsilon", 1e-6)
        section = {"max_context_length": self._number("context_length", 2048, whole=True)}
        if "transformer.layers.0.attn.q_norm.weight" in shapes:
            head_dim = None
        try:
            config = replace(infer_config(shapes, section, head_dim, base), rms_norm_eps=eps)
            described = layer_shapes(config)
        except (CheckpointError, ConfigError) as error:
            raise ConversionError(f"{self.path}: {error}") from None
        keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
        for column, key in enumerate(keys):
            stated = self.metadata.get(f"openelm.{key}", [])
            stated = stated if isinstance(stated, list) else [stated] * len(described)
            if stated and stated != [shape[column] for shape in described]:
                raise ConversionError(
                    f"{self.path}: its metadata says {key} {stated[:4]}..., its tensors say "
                    "otherwise"
                )
        return config

    def _number(self, key: str, default: float | None = None, whole: bool = False) -> Any:
        """Return a number of the metadata; float32 as the decimal that was meant (1e-06, not
        9.9999999747524e-07).
        """
        value = self.metadata.get(f"openelm.{key}", default)
        if value is None:
            return None
        fits = type(value) is int or (type(value) is float and not whole)
        if not fits or not math.isfinite(value) or value <= 0:
            raise ConversionError(
                f"{self.path}: its metadata says openelm.{key} {str(value)[:40]}; it must be a "
                "number above 0"
            )
        with np.errstate(over="ignore"):
            return value if whole else float(str(np.float32(value)))


def read_header(cursor: Cursor) -> tuple[dict[str, Any], dict[str, Place]]:
    """Return the metadata and the places of the tensors, each checked to lie within the file."""
    path = cursor.path
    if cursor.take(4) != b"GGUF":
        raise ConversionError(f"{path} is not a GGUF file")
    version = cursor.number("<I")
    if version not in (2, 3):
        what = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
        raise ConversionError(
            f"{path} is a GGUF file {what}; little-endian files of versions 2 and 3 are read"
        )
    num_tensors, num_keys = cursor.number("<Q"), cursor.number("<Q")
    damaged = f"{path} is damaged: it"
    if max(num_tensors, num_keys) > MAX_ENTRIES:
        raise ConversionError(f"{damaged} claims {num_tensors} tensors and {num_keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.text()
        if key in metadata:
            raise ConversionError(f"{damaged} has the key {key[:60]!r} twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    check_model(path, metadata)
    found = [read_place(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment > 1 << 20 or alignment % 8:
        raise ConversionError(f"{path} is damaged: its alignment is {str(alignment)[:40]}")
    base = -(-cursor.at // alignment) * alignment
    places = {name: located(cursor, name, place, base) for name, place in found}
    if len(places) != len(found):
        raise ConversionError(f"{damaged} has a tensor twice")
    return metadata, places


def check_model(path: Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "openelm":
        raise ConversionError(
            f"{path} contains a model of architecture {str(architecture)[:40]!r}; only openelm is "
            "converted"
        )
    parts = metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise ConversionError(
            f"{path} is one part of {str(parts)[:20]}; join them with llama-gguf-split --merge "
            "first"
        )


def read_place(cursor: Cursor) -> tuple[str, Place]:
    from gguf import GGMLQuantizationType

    name, dims = cursor.text(), cursor.number("<I")
    where = f"{cursor.path}: tensor {name[:60]}"
    if not 1 <= dims <= 4:
        raise ConversionError(f"{where} has {dims} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dims))[::-1]
    code, offset = cursor.number("<I"), cursor.number("<Q")
    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    kind = kinds[code].name if code in kinds else code
    if kind not in READABLE:
        raise ConversionError(f"{where} has type {kind}; readable are {', '.join(READABLE)}")
    return name, Place(kinds[code], shape, offset)


def located(cursor: Cursor, name: str, place: Place, base: int) -> Place:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[place.kind]
    kind, shape, start = place.kind.name, place.shape, base + place.start
    what, end = f"tensor {name[:60]}", start + math.prod(shape) // block * size
    if min(shape) < 1 or shape[-1] % block:
        raise ConversionError(
            f"{cursor.path}: {what} of shape {shape} is not made of {kind} blocks"
        )
    if end > (whole := len(cursor.data)):
        raise ConversionError(f"{cursor.path} is truncated: {what} ends at byte {end} of {whole}")
    return place._replace(start=start)


def licence_key(key: str) -> str:
    """Return GGUF's name for one of `LICENCE_KEYS`: general.license.name for license_name."""
    return f"general.{key.replace('_', '.')}"


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name, transformer.layers.3.attn.qkv_proj.weight for
    blk.3.attn_qkv.weight, or `name` if it is not one of llama.cpp's.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in NAMES and parts[1] == "weight":
        return f"{NAMES[parts[0]]}.weight"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] == "weight":
        return f"transformer.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return name


def read_tokenizer(path: Path, metadata: dict[str, Any]) -> TokenizerModel | None:
    """Return the SentencePiece model behind tokenizer.ggml.*, None if there is none.

    Raises `TokenizerError`.
    """
    prefix = "tokenizer.ggml."
    fields = {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)}
    kind = fields.get("model")
    if kind in (None, "none", "no_vocab"):
        return None
    defaults = {"unknown": UNK, "bos": BOS, "eos": EOS}
    ids = [fields.get(f"{key}_token_id", number) for key, number in defaults.items()]
    if kind != "llama" or ids != [UNK, BOS, EOS]:
        raise TokenizerError(
            f"{path} has a tokenizer of kind {str(kind)[:40]!r} with special ids {ids}, where "
            "OpenELM's is 'llama' with 0, 1, 2; give the right one with --tokenizer"
        )
    lists: list[Any] = [fields.get(key) for key in ("tokens", "scores", "token_type")]
    tokens, scores, kinds = lists
    fits = all_are(tokens, str) and all_are(scores, (int, float)) and all_are(kinds, int)
    if not fits or not len(tokens) == len(scores) == len(kinds) >= 3:
        raise TokenizerError(
            f"{path}: the lists of its tokenizer (tokens, scores, token_type) do not fit together"
        )
    size = len(tokens)
    while size > 3 and kinds[size - 1] == UNUSED and tokens[size - 1].startswith("[PAD"):
        size -= 1  # rows that pad the vocabulary have such names
    return assemble(path, tokens[:size], scores[:size], kinds[:size])


def all_are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
