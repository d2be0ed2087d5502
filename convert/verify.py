"""Prove a conversion: the written folder, read back, against the source's own weights in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from openelm_mlx.convert.sources import TensorSource

from openelm_mlx.config import OpenELMConfig, expected_tensors

TEXT = "Once upon a time there was a little girl who lived in a house at the edge of a great forest with her mother."


def verify_folder(
    folder: Path, source: TensorSource, names: Mapping[str, str], config: OpenELMConfig
) -> dict[str, float]:
    """Largest logit difference, mean KL divergence (nats) and agreement of the likeliest token, on a short text."""
    import sentencepiece

    from openelm_mlx.model import OpenELM

    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = mx.array([[1, *spm.encode(TEXT)][: config.max_context_length]])
    shapes = expected_tensors(config)
    exact = {name: source.load(names[name])[: shape[0]].astype(mx.float32) for name, shape in shapes.items()}
    written: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        written |= mx.load(str(file))
    restored = {name: restore(name, written, shape) for name, shape in shapes.items()}
    logits = []
    for weights in (exact, restored):
        model = OpenELM(config)
        model.load_weights(list(weights.items()))
        logits.append(model(tokens).astype(mx.float32))
        mx.eval(logits[-1])
    reference, ours = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in logits)
    return {
        "max_logit_difference": mx.abs(logits[0] - logits[1]).max().item(),
        "mean_kl_divergence": (mx.exp(reference) * (reference - ours)).sum(axis=-1).mean().item(),
        "top_1_agreement": (reference.argmax(-1) == ours.argmax(-1)).astype(mx.float32).mean().item(),
    }


def restore(name: str, written: Mapping[str, mx.array], shape: tuple[int, ...]) -> mx.array:
    """The float32 weights a stored tensor stands for; bits and group size follow from the shapes."""
    array = written[name]
    stem = name.removesuffix("weight")
    if stem + "scales" not in written:
        return array.astype(mx.float32)
    scales, biases = (written[stem + part].astype(mx.float32) for part in ("scales", "biases"))
    bits, group_size = array.shape[1] * 32 // shape[1], shape[1] // scales.shape[1]
    return mx.dequantize(array, scales, biases, group_size=group_size, bits=bits)
