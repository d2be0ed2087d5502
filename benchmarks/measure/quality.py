"""What a width costs in truth: how far a model's predictions move from those of the same model in
full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.generation import stream_generate

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

TOKENS, SEED = 512, 0


def losses(
    reference: Engine, others: Mapping[int | None, Engine]
) -> tuple[dict[int | None, dict[str, list[float]]], int]:
    """Metrics of each of `others` against `reference`, on text that this one samples; and how many
    tokens that has.
    """
    text = own_text(reference)
    found = {}
    for bits, engine in others.items():
        loss, agreement = divergence(reference, engine, text)
        found[bits] = {"kl_mean": [loss], "top_1_agreement": [agreement]}
    return found, len(text)


def own_text(engine: Engine, tokens: int = TOKENS) -> list[int]:
    """BOS and what the model itself then samples at temperature 1: text of the kind it is good at,
    always the same.
    """
    tokens = min(tokens, engine.config.max_context_length)
    start = [engine.tokenizer.bos_id]
    with closing(
        stream_generate(
            engine, start, temperature=1.0, seed=SEED, max_tokens=tokens - 1, ignore_eos=True
        )
    ) as events:
        return start + [event.token for event in events]


def divergence(reference: Engine, other: Engine, text: list[int]) -> tuple[float, float]:
    """Mean KL divergence (nats) of the next-token distributions over `text`, and the share of equal
    likeliest tokens.
    """
    p, q = (log_probabilities(engine, text) for engine in (reference, other))
    loss = (mx.exp(p) * (p - q)).sum(axis=-1).mean()
    agreement = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(mx.float32).mean()
    figures: Any = [loss.item(), agreement.item()]
    return figures[0], figures[1]


def log_probabilities(engine: Engine, text: list[int]) -> mx.array:
    """[length, vocab], float32."""
    logits = engine.model(mx.array([text]))[0, :, : engine.vocab].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
