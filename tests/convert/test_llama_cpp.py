"""llama.cpp itself on the files that are written: it loads every type, computes the same, and its
own quantizer chooses the same types and loses no less.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from formats import WIDE, again, random_folder
from golden_set import NANO

from openelm_mlx.convert.options import GGUF_TYPES
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.device import mx
from openelm_mlx.evaluate.compare import kl_divergence
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.decoder import OpenELM

pytestmark = pytest.mark.needs("cyllama")
TOKENS = [1, *range(3, 63), *range(62, 2, -1)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder of random weights whose rows divide by 256, but for those of one matrix."""
    config = replace(WIDE, num_transformer_layers=3, num_gqa_groups=2, ffn_multipliers=(0.5, 2.0))
    return random_folder(tmp_path_factory.mktemp("small") / "hf", config, seed=1, spread=0.05)


def theirs(path: Path, tokens: list[int], greedy: int = 0) -> tuple[np.ndarray, list[int]]:
    """Return llama.cpp's logits [tokens, vocab], and the likeliest tokens that follow."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        @property
        def n_vocab(self) -> int:  # which the context's get_logits_ith asks for
            return self.get_vocab().n_vocab

    llama_cpp.disable_logging()
    options = llama_cpp.LlamaContextParams()
    options.n_ctx, options.n_threads, options.n_threads_batch = 256, 1, 1
    options.type_k = options.type_v = 0  # float32
    context = llama_cpp.LlamaContext(Model(path_model=str(path)), options)
    logits, following = [], []
    for start in range(greedy + 1):
        batch = llama_cpp.LlamaBatch(n_tokens=256, embd=0, n_seq_max=1)
        for number, token in enumerate(following[-1:] or tokens):
            batch.add(token, number + (len(tokens) + start - 1 if start else 0), [0], True)
        context.decode(batch)
        logits += [np.array(context.get_logits_ith(n)) for n in range(1 if start else len(tokens))]
        following.append(int(logits[-1].argmax()))
    return np.stack(logits[: len(tokens)]), following[:greedy]


def ours(path: Path) -> OpenELM:
    file = GGUFFile(path)
    model = OpenELM(file.config)
    model.load_weights([(name, file.load_exact(name)) for name in expected_tensors(file.config)])
    return model


def test_float32_gives_the_same_tokens(tmp_path):
    path = again(NANO / "checkpoint.pt", tmp_path / "x.gguf")
    model, prompt = ours(path), [1, 410, 260, 262]
    logits, tokens = theirs(path, prompt, greedy=32)
    assert np.abs(np.array(model(mx.array([prompt]))[0]) - logits).max() < 1e-2
    for _ in range(32):
        prompt.append(int(model(mx.array([prompt]))[0, -1].argmax()))
    assert prompt[4:] == tokens


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_every_type_loads_and_is_read_alike(small, tmp_path, kind):
    """llama.cpp rounds activations to 8 bits, in which the rest of the divergence lies."""
    path = again(small, tmp_path / "x.gguf", gguf_type=kind)
    logits, _ = theirs(path, TOKENS)
    kl = kl_divergence(mx.array(logits), ours(path)(mx.array([TOKENS]))[0])
    assert kl.mean().item() < 1e-3


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_its_quantizer_chooses_the_same_types_and_loses_no_less(small, tmp_path, kind):
    import gguf
    from cyllama.llama import llama_cpp

    plain = again(small, tmp_path / "f32.gguf")
    path = again(small, tmp_path / "x.gguf", gguf_type=kind)
    options = llama_cpp.LlamaModelQuantizeParams()
    options.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    llama_cpp.disable_logging()
    llama_cpp.model_quantize(str(plain), str(tmp_path / "theirs.gguf"), options)
    original, mine, their = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        for file in (plain, path, tmp_path / "theirs.gguf")
    )
    assert {n: t.tensor_type for n, t in mine.items()} == {
        n: t.tensor_type for n, t in their.items()
    }
    lost = [
        sum(
            np.square(gguf.quants.dequantize(t.data, t.tensor_type) - original[name].data).sum()
            for name, t in tensors.items()
        )
        for tensors in (mine, their)
    ]
    assert lost[0] <= lost[1] * (1 + 1e-6)
