"""Does this device compute what it should? The bundled model's own words tell, in half a second."""

from __future__ import annotations

PROMPT = "Once upon a time"
# Greedy tokens in float32, one pass over the whole text each, on the CPU. The next best is never
# nearer than 0.2 in logits, so rounding changes none of them, and a kernel that computes something
# else changes most.
TOKENS = (444, 310, 261, 583, 872, 1086, 523, 4024, 272, 262, 523, 429, 310, 492, 651, 2422)


def matching_tokens() -> int:
    """Count how many of `TOKENS`, from the first on, the compiled step gives on this device."""
    from openelm_mlx import load, stream_generate

    engine = load("openelm-tiny", dtype="float32")
    found = [
        event.token
        for event in stream_generate(engine, PROMPT, max_tokens=len(TOKENS), ignore_eos=True)
    ]
    return next(
        (n for n, (a, b) in enumerate(zip(found, TOKENS, strict=True)) if a != b), len(TOKENS)
    )
