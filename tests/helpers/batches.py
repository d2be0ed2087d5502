"""Requests of a batch, and what each gives alone."""

from __future__ import annotations

from openelm_mlx import stream_generate
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions

PROMPTS = [[1] + [(5 * i + 11 * k) % 60 + 3 for i in range(3 + 9 * k)] for k in range(9)]


SAMPLING = [
    SamplingOptions(),
    SamplingOptions(temperature=0.9, top_p=0.9, seed=1),
    SamplingOptions(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.2, seed=2),
] * 3


OPTIONS = [
    GenerationOptions(max_tokens=5 + 7 * k, ignore_eos=True, logprobs=k if k in (2, 5) else None)
    for k in range(9)
]


def alone(engine, k, sampling=None, options=None, **settings):
    return list(
        stream_generate(
            engine, PROMPTS[k], sampling or SAMPLING[k], options or OPTIONS[k], **settings
        )
    )
