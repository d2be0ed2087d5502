"""Rows of a batch that are sampled, and the distribution of each by plain arithmetic in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from openelm_mlx.device import mx
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Context,
    Controls,
    Filters,
    History,
    coin,
    draw,
    filter_logits,
    seed_key,
)

VOCAB = 100  # more than the shorter list of top-k holds


NEWEST = mx.array([0])


class Row:
    """One sequence at one position, with all that its next token depends on; drawn from alone or in
    a batch.
    """

    def __init__(
        self,
        logits: Any,
        options: SamplingOptions,
        prompt: Any = (),
        answer: Any = (),
        position: int = 7,
        allowed: Any = None,
    ) -> None:
        self.logits = np.asarray(logits, np.float32)
        self.options, self.prompt, self.answer, self.position = (
            options,
            [*map(int, prompt)],
            [*map(int, answer)],
            position,
        )
        self.allowed = np.ones(len(self.logits), bool) if allowed is None else np.asarray(allowed)
        self.key = seed_key(options.seed or 0)


def inputs(rows: list[Row], masked: bool = False) -> tuple[mx.array, Filters, Context]:
    """What `draw` and `filter_logits` take for these rows; histories go through `plus`, as in
    generation.
    """
    options, vocab = [row.options for row in rows], len(rows[0].logits)
    filters = Filters.of(options, masked)
    histories = []
    for row in rows:
        history = History.of(row.prompt, row.answer[:1], row.options.penalty_window, filters, vocab)
        for token in row.answer[1:]:
            history = history and history.plus(mx.array([token], mx.uint32))
        histories.append(history)
    history = None
    if histories[0] is not None:
        history = History(
            *(
                None if parts[0] is None else mx.concatenate(parts)
                for parts in zip(*histories, strict=True)
            )
        )
    words = np.zeros((len(rows), -(-vocab // 32) * 32), np.uint32)
    words[:, :vocab] = [row.allowed for row in rows]
    mask = (words.reshape(len(rows), -1, 32) << np.arange(32, dtype=np.uint32)).sum(
        -1, dtype=np.uint32
    )
    context = Context(
        Controls.of(options, filters, vocab),
        mx.concatenate([row.key for row in rows]),
        mx.array([row.position for row in rows]),
        mx.array([(row.prompt + row.answer or [0])[-1] for row in rows]),
        history,
        mx.array(mask) if masked else None,
    )
    return mx.array(np.stack([row.logits for row in rows])), filters, context


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(row: Row) -> np.ndarray:
    """The distribution of the next token, in the plainest way there is."""
    o, x = row.options, row.logits.astype(np.float64)
    vocab = len(x)
    if o.processor is not None:
        x = np.array(o.processor(mx.array(row.logits[None]), NEWEST, mx.array([row.position])))[
            0
        ].astype(np.float64)
    for token, bias in dict(o.logit_bias).items():
        x[token] += bias
    x[~row.allowed] = -np.inf
    text = [(token, False) for token in row.prompt] + [(token, True) for token in row.answer]
    text = text[len(text) - o.penalty_window :] if 0 < o.penalty_window < len(text) else text
    for token in {token for token, _ in text}:
        x[token] = (
            x[token] / o.repetition_penalty if x[token] > 0 else x[token] * o.repetition_penalty
        )
    for token in {token for token, drawn in text if drawn}:
        x[token] -= o.presence_penalty + o.frequency_penalty * text.count((token, True))
    ranking = sorted(range(vocab), key=lambda token: (-x[token], token))
    p = np.zeros(vocab)
    if o.greedy:
        p[ranking[0]] = 1
        return p
    p = softmax(x / o.temperature)
    stay = ranking[: o.top_k or vocab]
    p[[token for token in range(vocab) if token not in stay]] = 0
    p /= p.sum()
    mass, stay = 0.0, []
    for token in ranking:
        if mass < o.top_p or o.top_p == 1 or not stay:
            stay.append(token)
        mass += p[token]
    p[[token for token in range(vocab) if token not in stay]] = 0
    p[p < o.min_p * p.max()] = 0
    p /= p.sum()
    likely = [token for token in range(vocab) if p[token] >= o.xtc_threshold]
    if likely and coin(row.key, mx.array([row.position])).item() < o.xtc_probability:
        p[[token for token in likely if p[token] > min(p[likely])]] = 0
    return p / p.sum()


def distributions(rows: list[Row], masked: bool = False) -> np.ndarray:
    return np.array(mx.softmax(filter_logits(*inputs(rows, masked)), axis=-1))


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def likelier_later(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
    return logits + mx.arange(logits.shape[1]) * positions[:, None] / 40


def flatter(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
    return logits * 0.5


def random_rows(count: int, seed: int, masked: bool = False) -> list[Row]:
    """Rows in which every option is on or off by chance, greedy ones and extreme temperatures among
    them.
    """
    rng = np.random.default_rng(seed)

    def maybe(value: Any, off: Any, chance: float = 0.4) -> Any:
        return value if rng.random() < chance else off

    rows = []
    for _ in range(count):
        settings = {
            "temperature": float(rng.choice([0.0, 1e-9, 1e-5, 0.3, 0.7, 1.0, 1.5, 20.0, 100.0])),
            "top_k": maybe(int(rng.integers(1, rng.choice([60, VOCAB + 5]))), 0),
            "top_p": maybe(float(rng.random()), 1.0),
            "min_p": maybe(float(rng.random() ** 3), 0.0),
            "repetition_penalty": maybe(float(rng.uniform(0.5, 2)), 1.0),
            "presence_penalty": maybe(float(rng.normal()), 0.0),
            "frequency_penalty": maybe(float(rng.normal()), 0.0),
            "logit_bias": maybe(
                {int(t): float(rng.normal() * 5) for t in rng.integers(0, VOCAB, 4)}, {}
            ),
            "processor": maybe(rng.choice([likelier_later, flatter]), None),
            "seed": int(rng.integers(0, 2**40)),
        }
        if rng.random() < 0.5:
            settings |= {"xtc_probability": 0.5, "xtc_threshold": float(rng.uniform(0.01, 0.3))}
        if settings["repetition_penalty"] != 1.0:
            settings["penalty_window"] = maybe(int(rng.integers(1, 12)), 0)
        allowed = rng.random(VOCAB) < 0.5
        allowed[int(rng.integers(VOCAB))] = True
        rows.append(
            Row(
                rng.normal(size=VOCAB) * 2,
                SamplingOptions(**settings),
                rng.integers(0, VOCAB, 6),
                rng.integers(0, VOCAB, 9),
                int(rng.integers(1, 1000)),
                allowed if masked else None,
            )
        )
    return rows


def drawn(rows: list[Row], compiled: bool = False) -> list[int]:
    logits, filters, context = inputs(rows, masked=any(not row.allowed.all() for row in rows))

    def step(logits: mx.array, context: Context) -> mx.array:
        return draw(logits, filters, context)

    return (mx.compile(step) if compiled else step)(logits, context).tolist()
