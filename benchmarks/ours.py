"""This engine behind the seam of timing.py: its public `stream_generate`, timed where a user's loop would stand."""

from __future__ import annotations

import math
import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from openelm_mlx.blas import load_blas

load_blas()  # takes effect only before MLX is imported

import mlx.core as mx  # noqa: E402
from openelm_mlx.benchmarks.timing import Timed  # noqa: E402

from openelm_mlx import PromptCache, __version__  # noqa: E402
from openelm_mlx.config import PUBLISHED, OpenELMConfig, normal_name  # noqa: E402
from openelm_mlx.errors import BenchmarkError  # noqa: E402
from openelm_mlx.generation import stream_generate  # noqa: E402
from openelm_mlx.hub import BUNDLED  # noqa: E402
from openelm_mlx.loading import DTYPES, Engine, load, parameters, quantize_now  # noqa: E402
from openelm_mlx.model import OpenELM  # noqa: E402
from openelm_mlx.options import GenerationOptions  # noqa: E402
from openelm_mlx.tokenizer import Tokenizer  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable

SEED = 0
NEW_TOKENS = 8  # of a prompt whose beginning is in the cache already

# R. L. Stevenson, Treasure Island (1883), the opening; its first 36 tokens are the prompt of CoreNet's
# mlx_examples/open_elm/inference.py, with which arXiv:2404.14619 measured.
TEXT = (
    "Squire Trelawney, Dr. Livesey, and the rest of these gentlemen having asked me to write down the whole "
    "particulars about Treasure Island, from the beginning to the end, keeping nothing back but the bearings of the "
    "island, and that only because there is still treasure not yet lifted, I take up my pen in the year of grace 17 "
    "and go back to the time when my father kept the Admiral Benbow inn and the brown old seaman with the sabre cut "
    "first took up his lodging under our roof. I remember him as if it were yesterday, as he came plodding to the inn "
    "door, his sea-chest following behind him in a hand-barrow; a tall, strong, heavy, nut-brown man, his tarry "
    "pigtail falling over the shoulder of his soiled blue coat, his hands ragged and scarred, with black, broken "
    "nails, and the sabre cut across one cheek, a dirty, livid white. I remember him looking round the cover and "
    "whistling to himself as he did so, and then breaking out in that old sea-song that he sang so often afterwards. "
)


class OurSession:
    """A loaded engine with the settings of one case. Several sessions may share an engine."""

    engine = "openelm-mlx"
    version = __version__

    def __init__(self, engine: Engine, load_seconds: float = 0.0, options: GenerationOptions | None = None) -> None:
        self.model: Engine = engine
        self.load_seconds = load_seconds
        self.options = options or GenerationOptions()
        self.tokens_per_pass: float | None = None
        self._held: PromptCache | None = None
        self._turn = 0

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        return self._timed(prompt, tokens, None)

    def generate_reused(self, prompt: list[int]) -> float:
        """Seconds to the first token where all of `prompt` but its last 8 tokens is in the cache already."""
        kept, fresh = prompt[:-NEW_TOKENS], prompt[-NEW_TOKENS:]
        self._turn += 1  # other tokens each time, or the cache would hold these too
        fresh = [3 + (token + self._turn) % (self.model.vocab - 3) for token in fresh]
        if self._held is None or self._held.tokens[: len(kept)] != kept:
            self._held = PromptCache.for_config(self.model.config)
            self._timed([*kept, *fresh[::-1]], 1, self._held)
        return self._timed([*kept, *fresh], 1, self._held).first

    def _timed(self, prompt: list[int], tokens: int, cache: PromptCache | None) -> Timed:
        found: list[int] = []
        seconds: list[float] = []
        others = max(0, mx.get_active_memory() - self.model.nbytes)  # weights of engines loaded beside this one
        stats = None
        start = perf_counter()
        with closing(
            stream_generate(
                self.model, prompt, options=self.options, prompt_cache=cache, max_tokens=tokens, ignore_eos=True
            )
        ) as events:
            for event in events:
                if event.token is not None:
                    seconds.append(perf_counter() - start)
                    found.append(event.token)
                stats = event.stats or stats
        peak = None if stats is None else stats.peak_memory_bytes - others
        return Timed(tuple(found), tuple(seconds), peak)

    def close(self) -> None:
        self._held = None
        del self.model
        mx.clear_cache()


def prompt_ids(engine: Engine, tokens: int, start: int = 0) -> list[int]:
    """BOS and the text above from its token `start` on, over and over, cut to `tokens` ids: the same on every machine."""
    text = engine.tokenizer.encode(TEXT, bos=False)
    return [engine.tokenizer.bos_id, *(text[(start + i) % len(text)] for i in range(tokens - 1))]


def open_engine(name: str, dtype: str | None, bits: int | None, group_size: int = 64) -> tuple[Engine, float]:
    """A model by name or folder, and the seconds it took to load."""
    start = perf_counter()
    engine = load(name, dtype, bits, group_size)
    return engine, perf_counter() - start


def random_engine(size: str, dtype: str | None = None, bits: int | None = None, group_size: int = 64) -> Engine:
    """An engine of a published size with seeded random weights: nothing is downloaded, speed is that of the real one.

    Entries are normal with variance 1 / columns, norms are 1. Raises `BenchmarkError` for a size that is not published.
    """
    if normal_name(size) not in PUBLISHED:
        raise BenchmarkError(f"no size {size!r} was published; --random-weights takes one of {', '.join(PUBLISHED)}")
    config = OpenELMConfig.from_name(size)
    kind = DTYPES[dtype or ("bfloat16" if mx.metal.is_available() else "float32")]
    model = OpenELM(config)
    names = sorted(parameters(model).items())
    keys = mx.random.split(mx.random.key(SEED), len(names))
    model.load_weights([(name, random_tensor(array, key, kind)) for (name, array), key in zip(names, keys, strict=True)])
    if bits is not None:
        quantize_now(model, bits, group_size)
    model.eval()
    evaluate_one_by_one(parameters(model).values())
    quantization = None if bits is None else {"bits": bits, "group_size": group_size}
    return Engine(model, padded_tokenizer(config.vocab_size), config, normal_name(size), BUNDLED, quantization)


def random_tensor(like: mx.array, key: mx.array, dtype: mx.Dtype) -> mx.array:
    if like.ndim == 1:
        return mx.ones(like.shape, dtype)
    return mx.random.normal(like.shape, scale=1 / math.sqrt(like.shape[-1]), key=key).astype(dtype)


def evaluate_one_by_one(arrays: Iterable[mx.array]) -> None:
    """So that no more than one tensor waits in full precision for its quantized form."""
    for array in arrays:
        mx.eval(array)


def padded_tokenizer(vocab: int) -> Tokenizer:
    """The bundled tokenizer with meaningless pieces up to `vocab`, so that every id of a large model has one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(padded_pieces((BUNDLED / "tokenizer.model").read_bytes(), vocab))
        return Tokenizer.from_file(path)


def padded_pieces(data: bytes, vocab: int) -> bytes:
    """A SentencePiece file with pieces appended: in Protocol Buffers, more entries of a repeated field just follow."""
    from sentencepiece import SentencePieceProcessor

    have = SentencePieceProcessor(model_proto=data).GetPieceSize()
    pieces = []
    for number in range(have, vocab):
        name = f"⟨{number}⟩".encode()
        body = b"\x0a" + bytes([len(name)]) + name  # ModelProto.SentencePiece: field 1, the piece; its score stays 0
        pieces.append(b"\x0a" + bytes([len(body)]) + body)  # ModelProto: field 1, a piece
    return data + b"".join(pieces)


def write_folder(engine: Engine, folder: Path) -> Path:
    """The engine's very weights as a model folder for the peers to load. Raises `BenchmarkError` when it cannot be written."""
    import json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = parameters(engine.model)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
        config: dict[str, Any] = engine.config.to_hf_dict()
        if engine.quantization:
            config["quantization"] = config["quantization_config"] = engine.quantization
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        write_tokenizer(engine, folder)
    except (OSError, RuntimeError) as error:
        raise BenchmarkError(f"cannot write the weights for the peers into {folder}: {error}; free some disk") from None
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
    return str(parameters(engine.model)["transformer.norm.weight"].dtype).rsplit(".", 1)[-1]
