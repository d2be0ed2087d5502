"""What the tests of formats share: golden fixtures, tokenizers of any size, logits of a written folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from openelm_mlx.config import OpenELMConfig

GOLDEN = Path(__file__).parent / "golden"
NANO = GOLDEN / "openelm-nano"
CORPUS = ("once upon a time there was a little girl who lived in a forest with a fox", "two birds flew")


@cache
def trained_tokenizer(size: int) -> bytes:
    """A SentencePiece model of `size` pieces."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9), model_writer=model, vocab_size=size, model_type="bpe", minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=True,
    )  # fmt: skip
    return model.getvalue()


def tokenizer_file(folder: Path, size: int) -> Path:
    path = folder / f"tokenizer-{size}.model"
    path.write_bytes(trained_tokenizer(size))
    return path


def mlx_lm_logits(folder: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """The float32 logits of a folder, as mlx-lm loads it."""
    from mlx_lm import load

    model, _ = load(str(folder), adapter_path=None if adapter is None else str(adapter))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The float32 logits of an unquantized folder in this engine."""
    from openelm_mlx.model import OpenELM

    model = OpenELM(OpenELMConfig.from_file(folder / "config.json"))
    model.load_weights(str(folder / "model.safetensors"))
    return np.array(model(mx.array(tokens)).astype(mx.float32))
