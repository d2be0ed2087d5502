"""Models to measure: by name, with random weights, or with fewer bits than they are stored in.

The same weights become a folder for the peers and for new processes.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from openelm_mlx import device
from openelm_mlx.benchmarks.hardware import bytes_per_token
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions, Point
from openelm_mlx.benchmarks.results import OURS
from openelm_mlx.benchmarks.results.document import Case
from openelm_mlx.device import mx, nn, utils
from openelm_mlx.dtypes import DTYPES, itemsize, name_of
from openelm_mlx.engine.hub import BUNDLED, resolve_model
from openelm_mlx.engine.loading import Engine, load, quantize_now
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import WEIGHTS, read_json, write_json
from openelm_mlx.model.config import OpenELMConfig, expected_tensors, normal_name
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.quantization import (
    KEYS,
    MLX_GROUP_SIZE,
    QuantSpec,
    matrices,
    quantization_of,
    spec_of,
)

SEED = 0
LOSS_TOKENS = 512  # on which the loss of fewer bits is measured


@dataclass
class Weights:
    """A loaded model, and where peers and new processes find the same weights."""

    engine: Engine
    load_seconds: float | None  # None if the weights were made, not read
    bits: int | None  # None if they are unquantized or mixed
    random: bool
    stored: bool  # whether they are in the bits that their folder has
    scratch: Path  # for what is written
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        """The type that activations are computed in: that of the norms."""
        return name_of(parameters(self.engine.model)["transformer.norm.weight"].dtype)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.engine.nbytes / self.engine.config.num_parameters

    def written(self) -> Path:
        """Return the folder that others load, written if there is none yet."""
        if self.folder is None:
            name = f"{self.engine.name.replace('/', '-')}-{self.bits}"
            self.folder = write_folder(self.engine, self.scratch / name)
        return self.folder

    def case(self, point: Point, engine: str = OURS) -> Case:
        engine_facts = engine, last_part(self.engine.name), self.dtype, self.bits
        draft = None if point.speculation is None else last_part(point.speculation)
        axes: dict[str, Any] = {**vars(point), "speculation": draft, "random_weights": self.random}
        return Case(*engine_facts, round(self.bits_per_weight, 4), **axes)

    def moved(self, point: Point) -> dict[str, float] | None:
        """Return the bytes that a token reads, by part, half way through the answer.

        None stands for batches and speculation: there a pass over the weights gives more tokens.
        """
        if point.batch_size > 1 or point.speculation is not None:
            return None
        context = point.prompt_tokens + point.generation_tokens // 2
        kept, engine = point.settings, self.engine
        context, bits = min(context, kept.get("kv_window", context)), kept.get("kv_bits")
        return bytes_per_token(engine.config, self.dtype, engine.quantization, context, bits)


def last_part(name: str) -> str:
    """Return a name without its folders, which concern nobody: `draft /home/me/a` -> `draft a`."""
    kind, space, path = name.rpartition(" ") if name.startswith("draft ") else ("", "", name)
    here = Path(os.path.expanduser(path))
    return f"{kind}{space}{here.resolve().name}" if os.path.exists(here) else name


def facts_of(name: str, random: bool) -> tuple[OpenELMConfig, int | None]:
    """Return the configuration and the fewest bits of a model that is not loaded yet.

    The bits are None if it is not quantized. Raises `ConfigError` or `HubError` for an
    unknown model.
    """
    if random:
        return OpenELMConfig.from_name(name), None
    raw = read_json(resolve_model(name).folder / "config.json")
    config = OpenELMConfig.from_hf_dict(raw)
    return config, min(bits_of(config, quantization_of(raw)), default=None)


def bits_of(config: OpenELMConfig, quantization: Mapping[str, Any] | None) -> set[int]:
    """Return the numbers of bits that matrices are quantized to."""
    stems = matrices(expected_tensors(config)) if quantization else ()
    specs = [spec_of(quantization or {}, stem) for stem in stems]
    return {spec.bits for spec in specs if spec is not None}


def open_weights(
    model: str,
    dtype: str | None,
    bits: int | None,
    group_size: int,
    random: bool,
    scratch: Path,
) -> Weights:
    """Open a model by name or folder, or a published size with random weights.

    Raises `OpenELMError`.
    """
    if random:
        engine = random_engine(model, dtype, bits, group_size)
        return Weights(engine, None, bits, True, False, scratch)
    engine, seconds = open_engine(model, dtype, bits, group_size)
    if bits is not None:
        return Weights(engine, seconds, bits, False, False, scratch)
    found = bits_of(engine.config, engine.quantization)
    uniform = found.pop() if len(found) == 1 else None
    return Weights(engine, seconds, uniform, False, True, scratch, engine.path)


def open_engine(
    name: str, dtype: str | None, bits: int | None, group_size: int = MLX_GROUP_SIZE
) -> tuple[Engine, float]:
    """Load a model, quantize it if `bits` are given, and return it with its loading time.

    The time is that of the model as it is stored, in seconds.
    """
    start = perf_counter()
    engine = load(name, dtype)
    seconds = perf_counter() - start
    if bits is not None:
        if engine.quantization:
            unquantize(engine.model)
        quantize_now(engine.model, bits, group_size)
        engine = replace(engine, quantization=QuantSpec(bits, group_size).as_config())
        evaluate_one_by_one(engine)
    return engine, seconds


def unquantize(model: OpenELM) -> None:
    """Replace quantized layers by unquantized ones with the values that those stood for."""
    layers: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            embedding = isinstance(module, nn.QuantizedEmbedding)
            plain = nn.Embedding(1, 1) if embedding else nn.Linear(1, 1, bias=False)
            spec = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            weight = mx.dequantize(module.weight, module.scales, module.get("biases"), **spec)
            plain.weight = weight.astype(module.scales.dtype)
            layers.append((path, plain))
    model.update_modules(utils.tree_unflatten(layers))  # type: ignore[arg-type]


def random_engine(
    size: str, dtype: str | None = None, bits: int | None = None, group_size: int = MLX_GROUP_SIZE
) -> Engine:
    """Return an engine of a published size with seeded random weights, without a download.

    It is as fast as the real one. Entries are normal with variance 1 / columns, norms are 1. Raises
    `ConfigError` for a size that was not published.
    """
    config = OpenELMConfig.from_name(size)
    kind = DTYPES[dtype or ("float32" if device.kind() == "cpu" else "bfloat16")].mlx
    model = OpenELM(config)
    names = sorted(parameters(model).items())
    keys = mx.random.split(mx.random.key(SEED), len(names))
    made = zip(names, keys, strict=True)
    model.load_weights([(name, random_tensor(array, key, kind)) for (name, array), key in made])
    if bits is not None:
        quantize_now(model, bits, group_size)
    model.eval()
    quantization = None if bits is None else QuantSpec(bits, group_size).as_config()
    tokenizer = padded_tokenizer(config.vocab_size)
    engine = Engine(model, tokenizer, config, normal_name(size), BUNDLED, quantization)
    evaluate_one_by_one(engine)
    return engine


def random_tensor(like: mx.array, key: mx.array, dtype: mx.Dtype) -> mx.array:
    if like.ndim == 1:
        return mx.ones(like.shape, dtype)
    return mx.random.normal(like.shape, scale=1 / math.sqrt(like.shape[-1]), key=key).astype(dtype)


def evaluate_one_by_one(engine: Engine) -> None:
    """Evaluate the weights so that only one tensor at a time is unquantized in memory."""
    for _, array in sorted(parameters(engine.model).items()):
        mx.eval(array)


def padded_tokenizer(vocab: int) -> Tokenizer:
    """Return the bundled tokenizer with meaningless pieces added, so that every id has one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(padded_pieces(vocab))
        return Tokenizer.from_file(path)


def padded_pieces(vocab: int) -> bytes:
    """Return the bundled SentencePiece file with pieces appended up to `vocab`."""
    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString((BUNDLED / "tokenizer.model").read_bytes())
    for number in range(len(proto.pieces), vocab):
        proto.pieces.add(piece=f"<{number}>")
    padded: bytes = proto.SerializeToString()
    return padded


def write_folder(engine: Engine, folder: Path) -> Path:
    """Write the engine's weights as a model folder for the peers.

    Raises `BenchmarkError` if that is impossible.
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
        what = f"cannot write the weights for the peers into {folder}: {error}"
        raise BenchmarkError(f"{what}; free some disk") from None
    return folder


def write_tokenizer(engine: Engine, folder: Path) -> None:
    if engine.tokenizer.path.exists():
        for file in engine.tokenizer.path.parent.glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
    else:  # the padded one
        (folder / "tokenizer.model").write_bytes(padded_pieces(engine.config.vocab_size))


def groups(
    model: str, options: BenchmarkOptions, peers: int, notes: list[str]
) -> list[tuple[int | None, ...]]:
    """Return the numbers of bits in which a model is measured, those together that take turns.

    That is all of them if they fit into half of the memory, else one by one. `notes` gets why
    some are left out.
    """
    suite, (config, stored) = options.chosen(), facts_of(model, bool(options.random_weights))
    name = last_part(model)
    fewer = tuple(bits for bits in suite.bits if bits is None or stored is None or bits < stored)
    if fewer != suite.bits:
        left = ", ".join(str(bits) for bits in suite.bits if bits not in fewer)
        what = f"{left} bits left out, fewer bits made from those"
        notes.append(f"{name} has {stored}-bit weights already: {what}")
    unquantized = 8 * itemsize(suite.dtype or "float32")
    size = config.num_parameters * sum((bits or unquantized) / 8 for bits in fewer)
    if len(fewer) == 1 or size * (1 + peers) < device.memory_bytes() / 2:
        return [fewer]
    what = "do not fit into memory together and were measured one after the other"
    notes.append(f"{name}: the numbers of bits {what}")
    return [(bits,) for bits in fewer]


def losses(loaded: Sequence[Weights], reference: Engine) -> tuple[list[dict[str, float]], int]:
    """Return the loss of each number of bits against a model, and the tokens it is measured on.

    The reference writes the text itself. Weights as they are stored have no loss.
    """
    from openelm_mlx.evaluate.compare import compare, own_text

    unknown = mx.where(mx.arange(reference.config.vocab_size) < reference.vocab, 0.0, -mx.inf)
    length = min(LOSS_TOKENS, reference.config.max_context_length)
    bos = reference.tokenizer.bos_id
    text = own_text(reference.model, [[bos]], length, seed=0, banned=unknown)
    found: list[dict[str, float]] = []
    for weights in loaded:
        model, figures = weights.engine.model, {}
        if not weights.stored:
            loss = compare(reference.model, model, [text], vocab=reference.vocab)
            figures = {"kl_mean": loss.mean_kl_divergence, "top_1_agreement": loss.top_1_agreement}
        found.append(figures)
    return found, length
