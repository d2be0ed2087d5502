"""Runs with and without drafts, alone and in a batch."""

from __future__ import annotations

from openelm_mlx import BatchEngine, stream_generate

PROMPT = [1, 9, 30, 12, 9, 30, 12, 9]


SAMPLED = {
    "temperature": 0.9,
    "top_k": 5,
    "top_p": 0.97,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 4,
}


FIXED = {"draft_tokens": 4, "adaptive_draft": False}


def run(engine, prompt=PROMPT, **settings):
    events = list(stream_generate(engine, prompt, ignore_eos=True, **settings))
    return [event.token for event in events], events[-1].stats


def run_batch(engine, requests, draft=None, **settings):
    """Tokens and statistics of each of `requests` (prompt, settings); the later half arrives while
    the first runs.
    """
    batch = BatchEngine(engine, draft=draft, **settings)
    tokens, stats, numbers = [[] for _ in requests], [None] * len(requests), {}

    def step():
        for number, event in batch.step():
            tokens[numbers[number]].append(event.token)
            stats[numbers[number]] = event.stats

    for place, (prompt, options) in enumerate(requests):
        numbers[batch.submit(prompt, ignore_eos=True, **options)] = place
        if place >= len(requests) // 2:
            step()
    while batch.busy:
        step()
    return tokens, stats
