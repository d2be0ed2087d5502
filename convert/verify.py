"""Prove a conversion: the written folder, read back, against the source's own weights in float32."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from openelm_mlx.convert.forms import read_plan
from openelm_mlx.convert.quantize import restored
from openelm_mlx.convert.sources import TensorSource
from openelm_mlx.convert.staging import config_of

from openelm_mlx.config import OpenELMConfig, expected_tensors, read_json

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
    raw = read_json(config_of(folder))
    plan = read_plan(raw.get("quantization"), shapes, set(written))
    ours = {name: restored(name, written, plan.get(name.removesuffix(".weight"))) for name in shapes}
    logits = []
    for weights in (exact, ours):
        model = OpenELM(config)
        model.load_weights(list(weights.items()))
        logits.append(model(tokens).astype(mx.float32))
        mx.eval(logits[-1])
    reference, ours_log = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in logits)
    return {
        "max_logit_difference": mx.abs(logits[0] - logits[1]).max().item(),
        "mean_kl_divergence": (mx.exp(reference) * (reference - ours_log)).sum(axis=-1).mean().item(),
        "top_1_agreement": (reference.argmax(-1) == ours_log.argmax(-1)).astype(mx.float32).mean().item(),
    }
