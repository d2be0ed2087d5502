"""What the tests of formats share: tokenizers of any size, a small model folder, what a written
folder holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from golden_set import GOLDEN

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec, matrices

CORPUS = (
    "once upon a time there was a little girl who lived in a forest with a fox",
    "two birds flew",
)
TINY = OpenELMConfig(
    model_dim=32,
    head_dim=8,
    num_transformer_layers=1,
    vocab_size=64,
    num_gqa_groups=1,
    ffn_dim_divisor=32,
    qkv_multipliers=(1.0,),
    ffn_multipliers=(1.0,),
)
WIDE = OpenELMConfig(  # rows divide by 256, as llama.cpp's K-quants need
    model_dim=256,
    head_dim=64,
    num_transformer_layers=2,
    vocab_size=64,
    num_gqa_groups=4,
    ffn_multipliers=(1.0, 2.0),
    qkv_multipliers=(1.0, 1.0),
)

MIXED = {
    "token_embeddings": QuantSpec(6, 32),
    "ffn.proj_1": QuantSpec(3, 128),
    "ffn.proj_2": QuantSpec(4, 16, "nvfp4"),
    "attn.qkv_proj": None,
}


@cache
def trained_tokenizer(size: int) -> bytes:
    """Return a SentencePiece model of `size` pieces."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 9),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=True,
    )
    return model.getvalue()


def tokenizer_file(folder: Path, size: int = 128) -> Path:
    """Write a tokenizer of `size` pieces as tokenizer.model into the folder."""
    path = folder / "tokenizer.model"
    path.write_bytes(trained_tokenizer(size))
    return path


def random_folder(
    folder: Path, config: OpenELMConfig = TINY, seed: int = 0, spread: float = 0.1
) -> Path:
    """Write a Hugging Face folder of random weights with its tokenizer; with TINY a conversion of
    it takes milliseconds.
    """
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    arrays = {
        n: mx.array(rng.normal(0, spread, s).astype(np.float32))
        for n, s in expected_tensors(config).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
    tokenizer_file(folder, config.vocab_size)
    return folder


def long_context(folder: Path) -> Path:
    """Put a small golden checkpoint with a context of 1024 tokens into `folder`; return its path.

    Beside it lie its YAML and a tokenizer.
    """
    small = GOLDEN / "tied-gqa4"
    yaml = (small / "config.yaml").read_text(encoding="utf-8").replace("64", "1024")
    (folder / "config.yaml").write_text(yaml, encoding="utf-8")
    tokenizer_file(folder, 128)
    return Path(shutil.copy(small / "checkpoint.pt", folder))


def again(source: Path, target: Path, **fields) -> Path:
    """Convert the source, and return the target."""
    convert(ConvertOptions(source=source, target=target, **fields))
    return target


def weights(folder: Path) -> dict[str, mx.array]:
    """The arrays of a model folder, of one file or of shards, as mlx-lm finds them."""
    arrays: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        arrays |= mx.load(str(file))
    return arrays


def everything(source: Path, **fields) -> None:
    """Open, check and load all of a source, as a conversion does."""
    opened = open_model(ConvertOptions(source=source, target="x", **fields))
    for name in opened.shapes:
        mx.eval(opened.load(name))
        if name.removesuffix(".weight") in opened.source.plan:
            mx.eval(opened.packed(name))


def changed(
    folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array] | None], **config
) -> Path:
    """Change the tensors and the configuration of a folder of one file."""
    path = folder / "model.safetensors"
    arrays = mx.load(str(path))
    mx.eval(arrays)
    mx.save_safetensors(str(path), change(arrays) or arrays)
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def assert_refused_alike(folder: Path, tmp_path: Path, message: str) -> None:
    """Check that the folder is neither loaded nor converted, for one reason."""
    for use in (lambda: load(folder), lambda: again(folder, tmp_path / "out")):
        with pytest.raises(OpenELMError, match=message) as caught:
            use()
        assert str(folder) in str(caught.value)
    assert not (tmp_path / "out").exists()


def mixed_plan(shapes: dict[str, tuple[int, ...]]) -> dict[str, QuantSpec | None]:
    """A plan of several specs and modes, by role as in `MIXED`."""
    return {
        stem: next((spec for role, spec in MIXED.items() if stem.endswith(role)), QuantSpec(4, 64))
        for stem in matrices(shapes)
    }


def mlx_lm_logits(folder: Path, tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """Return the float32 logits of a folder, as mlx-lm loads it."""
    from mlx_lm import load

    model, _ = load(str(folder), adapter_path=None if adapter is None else str(adapter))
    return np.array(model(mx.array(tokens)).astype(mx.float32))


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the float32 logits of an unquantized folder in this engine."""
    from openelm_mlx.model.decoder import OpenELM

    model = OpenELM(OpenELMConfig.from_file(folder / "config.json"))
    model.load_weights(str(folder / "model.safetensors"))
    return np.array(model(mx.array(tokens)).astype(mx.float32))
