"""Models to measure: by name, of random weights, in another width; and the same weights as a folder
for others.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from openelm_mlx import device
from openelm_mlx.device import mx, nn
from openelm_mlx.dtypes import DTYPES, name_of
from openelm_mlx.engine.hub import BUNDLED, resolve_model
from openelm_mlx.engine.loading import Engine, load, parameters, quantize_now
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import WEIGHTS, read_json, write_json
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, expected_tensors, normal_name
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.quantization import KEYS, QuantSpec, matrices, quantization_of, spec_of

SEED = 0


@dataclass(frozen=True)
class Facts:
    """What must be known of a model before it is loaded."""

    config: OpenELMConfig
    bits: int | None  # its own width, where it is quantized; the narrowest where that is mixed


def facts_of(name: str, random: bool) -> Facts:
    """Raises `BenchmarkError` for a size that was not published, `HubError` or `ConfigError` for an
    unknown model.
    """
    if random:
        return Facts(published(name), None)
    raw = read_json(resolve_model(name).folder / "config.json")
    config, quantization = OpenELMConfig.from_hf_dict(raw), quantization_of(raw) or {}
    specs = (spec_of(quantization, stem) for stem in matrices(expected_tensors(config)))
    bits = [spec.bits for spec in specs if spec is not None] if quantization else []
    return Facts(config, min(bits, default=None))


def published(size: str) -> OpenELMConfig:
    if normal_name(size) not in PUBLISHED:
        raise BenchmarkError(
            f"no size {size!r} was published; --random-weights takes one of {', '.join(PUBLISHED)}"
        )
    return OpenELMConfig.from_name(size)


def open_engine(
    name: str, dtype: str | None, bits: int | None, group_size: int = 64
) -> tuple[Engine, float]:
    """A model by name or folder, in `bits` where given, and the seconds it took to load as it is
    stored.
    """
    start = perf_counter()
    engine = load(name, dtype)
    seconds = perf_counter() - start
    if bits is not None:
        if engine.quantization:
            unquantize(engine.model)
        quantize_now(engine.model, bits, group_size)
        engine = Engine(
            engine.model,
            engine.tokenizer,
            engine.config,
            engine.name,
            engine.path,
            QuantSpec(bits, group_size).as_config(),
            engine.instruct,
        )
        evaluate_one_by_one(engine)
    return engine, seconds


def unquantize(model: OpenELM) -> None:
    """Full-precision layers in place of quantized ones, holding what those stood for."""
    layers: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            weight = mx.dequantize(
                module.weight,
                module.scales,
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
            )
            plain: nn.Module = (
                nn.Embedding(1, 1)
                if isinstance(module, nn.QuantizedEmbedding)
                else nn.Linear(1, 1, bias=False)
            )
            plain.weight = weight.astype(module.scales.dtype)
            layers.append((path, plain))
    model.update_modules(nest(layers))


def nest(leaves: list[tuple[str, nn.Module]]) -> Any:
    from openelm_mlx.device import utils

    return utils.tree_unflatten(leaves)


def random_engine(
    size: str, dtype: str | None = None, bits: int | None = None, group_size: int = 64
) -> Engine:
    """An engine of a published size with seeded random weights: nothing is downloaded, speed is
    that of the real one.

    Entries are normal with variance 1 / columns, norms are 1. Raises `BenchmarkError` for a size
    that is not published.
    """
    config = published(size)
    kind = DTYPES[dtype or ("float32" if device.kind() == "cpu" else "bfloat16")].mlx
    model = OpenELM(config)
    names = sorted(parameters(model).items())
    keys = mx.random.split(mx.random.key(SEED), len(names))
    model.load_weights(
        [
            (name, random_tensor(array, key, kind))
            for (name, array), key in zip(names, keys, strict=True)
        ]
    )
    if bits is not None:
        quantize_now(model, bits, group_size)
    model.eval()
    quantization = None if bits is None else QuantSpec(bits, group_size).as_config()
    engine = Engine(
        model, padded_tokenizer(config.vocab_size), config, normal_name(size), BUNDLED, quantization
    )
    evaluate_one_by_one(engine)
    return engine


def random_model(
    seed: int,
    vocab: int = 64,
    dim: int = 64,
    layers: int = 2,
    spread: float = 2.0,
    noise: float = 0.0,
) -> OpenELM:
    """A model of a few thousand random weights, made in a moment.

    `spread` scales the logits, so that the choice is neither flat nor certain. `noise` is how far
    its head is from that of the same seed without, as a draft model is from its target.
    """
    config = OpenELMConfig(
        vocab_size=vocab,
        model_dim=dim,
        head_dim=32,
        num_transformer_layers=layers,
        num_gqa_groups=2,
        share_input_output_layers=False,
        qkv_multipliers=(1.0, 2.0),
        ffn_multipliers=(1.0, 2.0),
        ffn_dim_divisor=32,
        max_context_length=512,
    )
    mx.random.seed(seed)
    model = OpenELM(config)
    head = mx.random.normal((vocab, dim)) * spread / dim**0.5
    if noise:
        head = head * (1 + noise * mx.random.normal((vocab, dim)))
    model.load_weights([("lm_head.weight", head)], strict=False)
    mx.eval(model.parameters())
    return model


def small_engine(
    like: Engine, seed: int, *shape: int, dtype: mx.Dtype = mx.float32, **more: float
) -> Engine:
    """An engine of random weights with the tokenizer of another; the rest is `random_model`'s."""
    model = random_model(seed, *shape, **more)  # type: ignore[arg-type]
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return Engine(model, like.tokenizer, model.args, f"random-{seed}", BUNDLED)


def random_tensor(like: mx.array, key: mx.array, dtype: mx.Dtype) -> mx.array:
    if like.ndim == 1:
        return mx.ones(like.shape, dtype)
    return mx.random.normal(like.shape, scale=1 / math.sqrt(like.shape[-1]), key=key).astype(dtype)


def evaluate_one_by_one(engine: Engine) -> None:
    """So that no more than one tensor waits in full precision for its quantized form."""
    for _, array in sorted(parameters(engine.model).items()):
        mx.eval(array)


def padded_tokenizer(vocab: int) -> Tokenizer:
    """The bundled tokenizer with meaningless pieces up to `vocab`, so that every id of a large
    model has one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(padded_pieces((BUNDLED / "tokenizer.model").read_bytes(), vocab))
        return Tokenizer.from_file(path)


def padded_pieces(data: bytes, vocab: int) -> bytes:
    """A SentencePiece file with pieces appended: in Protocol Buffers, more entries of a repeated
    field just follow.
    """
    from sentencepiece import SentencePieceProcessor

    have = SentencePieceProcessor(model_proto=data).GetPieceSize()
    pieces = []
    for number in range(have, vocab):
        name = f"⟨{number}⟩".encode()
        body = (
            b"\x0a" + bytes([len(name)]) + name
        )  # ModelProto.SentencePiece: field 1, the piece; its score stays 0
        pieces.append(b"\x0a" + bytes([len(body)]) + body)  # ModelProto: field 1, a piece
    return data + b"".join(pieces)


def write_folder(engine: Engine, folder: Path) -> Path:
    """The engine's very weights as a model folder for the peers to load. Raises `BenchmarkError`
    when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = parameters(engine.model)
        mx.save_safetensors(str(folder / WEIGHTS), arrays, {"format": "mlx"})
        config: dict[str, Any] = engine.config.to_hf_dict()
        if engine.quantization:
            config |= dict.fromkeys(KEYS, engine.quantization)
        write_json(folder / "config.json", config)
        write_tokenizer(engine, folder)
    except (OSError, RuntimeError) as error:
        raise BenchmarkError(
            f"cannot write the weights for the peers into {folder}: {error}; free some disk"
        ) from None
    return folder


def write_tokenizer(engine: Engine, folder: Path) -> None:
    if engine.tokenizer.path.exists():
        for file in engine.tokenizer.path.parent.glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
    else:  # the padded one
        data = padded_pieces((BUNDLED / "tokenizer.model").read_bytes(), engine.config.vocab_size)
        (folder / "tokenizer.model").write_bytes(data)


def bits_per_weight(engine: Engine) -> float:
    return 8 * engine.nbytes / engine.config.num_parameters


def dtype_name(engine: Engine) -> str:
    """The type that activations are computed in: that of the norms."""
    return name_of(parameters(engine.model)["transformer.norm.weight"].dtype)
