"""Test whether this device computes the bundled model correctly, in the ways models will run here.

Each way is a run of the engine. The log probabilities that it gives are compared with those of one
pass in float32 over the whole text, on the processor, without quantized products, cache, compiled
step or kernels of ours. In 16 bits rounding turns many greedy choices, so tokens are compared in
float32 only, where a test shows that no other token comes near.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from openelm_mlx import device, load, stream_generate
from openelm_mlx.benchmarks.measure.weights import open_engine, unquantize
from openelm_mlx.benchmarks.peers.on_mlx import prompt_ids
from openelm_mlx.device import mx
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.generation import UNLIMITED
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.request import Event
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import reason
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.model.kernels.kernel import twins

PROMPT = "Once upon a time"
# Greedy tokens in float32 on the CPU, each from one pass over the entire text. The second best is
# never nearer than 0.2 in logits: rounding changes none of them, a wrong kernel changes most.
TOKENS = (444, 310, 261, 583, 872, 1086, 523, 4024, 272, 262, 523, 429, 310, 492, 651, 2422)
STORED = 8  # bits of the bundled model
TOP = 4  # likeliest tokens whose log probabilities are compared, beside the one that was drawn
# Differences that rounding explains, in nats, as the root of the mean square. On the CPU this
# model differs by at most 0.18 in bfloat16 and 0.016 in float16, by 0.015 and 0.002 unquantized.
# Apple's M5 and later multiply float32 in TF32, with as many bits as float16. A rotation by one
# position too many, a head of zeros or a token that does not see itself make it 0.4 to 1.2.
LIMITS = {"float32": 0.05, "float16": 0.05, "bfloat16": 0.5}
UNQUANTIZED = 0.2  # of the limit: half types round the products of packed weights on a CPU


@dataclass(frozen=True)
class Way:
    """A way to run the model."""

    name: str
    bits: int | None = STORED
    prompts: tuple[int, ...] = (12,)  # the length of each row's
    tokens: int = 6
    drafted: bool = False  # the answer of a run before, with every third token wrong
    engine: dict[str, Any] = field(default_factory=dict)  # options of the engine


WAYS = (
    Way("8 bits, a prompt of 250 and a buffer that grows", prompts=(250,), tokens=9),
    Way("3 rows", prompts=(5, 12, 40)),
    Way("speculation", tokens=9, drafted=True),
    Way("4 bits", bits=4),
    Way("unquantized", bits=None),
)
# options that fewer use, for --full
MORE_WAYS = (
    Way("8-bit keys and values", prompts=(40,), engine={"kv_bits": 8}),
    Way("a window of 64", prompts=(40,), tokens=9, engine={"kv_window": 64}),
    Way("not compiled", engine={"compiled": False}),
    Way("a prompt in pieces of 7", prompts=(40,), engine={"prefill_chunk": 7}),
)


@dataclass(frozen=True)
class Result:
    """The distance of a way from the reference, in nats, or the error that ended it."""

    name: str
    dtype: str | None
    off: float | None
    limit: float
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.off is not None and self.off <= self.limit

    def __str__(self) -> str:
        if self.off is None:
            return f"{self.name}: {self.error}"
        return f"{self.name}: log probabilities are off by {self.off:.2g}, allowed {self.limit:g}"


def matching_tokens() -> int:
    """Count how many of `TOKENS`, from the first on, the compiled step gives in float32 here."""
    engine = load("openelm-tiny", dtype="float32")
    events = stream_generate(engine, PROMPT, max_tokens=len(TOKENS), ignore_eos=True)
    pairs = zip((event.token for event in events), TOKENS, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(TOKENS))


def results(dtype: str | None = None, ways: Sequence[Way] | None = None) -> Iterator[Result]:
    """Run the bundled model in each way (`WAYS`), in `dtype` or what this device computes in."""
    opened = cache(partial(models, dtype))
    for way in WAYS if ways is None else ways:
        yield result(way, partial(opened, way.bits), dtype)


def result(way: Way, opened: Callable[[], tuple[Engine, OpenELM]], dtype: str | None) -> Result:
    """Run one way; an error is its result."""
    limit = 0.0
    try:
        engine, exact = opened()
        dtype = name_of(parameters(engine.model)["transformer.norm.weight"].dtype)
        limit = LIMITS[dtype] * (UNQUANTIZED if way.bits is None else 1)
        off = difference(engine, exact, way)
        if not math.isfinite(off):
            return Result(way.name, dtype, None, limit, "log probabilities that are not finite")
        return Result(way.name, dtype, off, limit)
    except Exception as error:  # of MLX or anything else: what a device cannot do is a result
        return Result(way.name, dtype, None, limit, f"{type(error).__name__}: {reason(error)}")


def models(dtype: str | None, bits: int | None) -> tuple[Engine, OpenELM]:
    """Return the bundled model in so many bits, and what it stands for in float32."""
    engine, _ = open_engine("openelm-tiny", dtype, None if bits in (None, STORED) else bits)
    if bits is None:
        unquantize(engine.model)
        mx.eval(engine.model.parameters())
    exact = deepcopy(engine.model)
    exact.set_dtype(mx.float32)
    unquantize(exact)
    mx.eval(exact.parameters())
    return engine, exact


def difference(engine: Engine, exact: OpenELM, way: Way) -> float:
    """Return how far the engine's log probabilities are from those of `exact`, in nats.

    It is the root of the mean square over the tokens drawn and the likeliest ones at each place. A
    token that was drawn although another is likelier counts by how much likelier that is, too.
    """
    prompts = [prompt_ids(engine, length) for length in way.prompts]
    answers = run(engine, prompts, way)
    if way.drafted:
        draft = NearlyRight(prompts[0] + [event.token for event in answers[0]])
        answers = run(engine, prompts, way, draft)
    squares: list[float] = []
    for prompt, events in zip(prompts, answers, strict=True):
        drawn = [event.token for event in events]
        expected = reference(exact, prompt + drawn[:-1], len(drawn), engine.vocab)
        for event, row in zip(events, expected, strict=True):
            pairs = ((event.token, event.logprob or 0.0), *event.top_logprobs)
            squares += [(value - row[token]) ** 2 for token, value in pairs]
            squares.append((max(row) - row[event.token]) ** 2)
    return math.sqrt(sum(squares) / len(squares))


@dataclass
class NearlyRight:
    """A draft that knows the text, but for every third token."""

    text: list[int]

    def propose(self, known: list[int], length: int) -> list[int]:
        first = len(known)
        ahead = enumerate(self.text[first : first + length], first)
        return [token if place % 3 else token ^ 1 for place, token in ahead]


def run(
    engine: Engine, prompts: list[list[int]], way: Way, draft: NearlyRight | None = None
) -> list[list[Event]]:
    """Return the events of each prompt; they run together."""
    events: dict[int, list[Event]] = {}
    wanted: Any = {"max_tokens": way.tokens, "ignore_eos": True, "logprobs": TOP}
    wanted |= {"draft_tokens": 4, "adaptive_draft": False} if draft is not None else {}
    settings: Any = {"admission": UNLIMITED, "draft": draft, **way.engine}
    with closing(BatchEngine(engine, len(prompts), **settings)) as batch:
        numbers = [batch.submit(prompt, **wanted) for prompt in prompts]
        while batch.busy:
            for number, event in batch.step():
                events.setdefault(number, []).append(event)
    return [events[number] for number in numbers]


def reference(exact: OpenELM, ids: list[int], count: int, vocab: int) -> list[list[float]]:
    """Return the log probabilities after the last `count` of these ids, by one pass on the CPU."""
    with mx.stream(mx.cpu), twins():
        logits = exact.logits(exact.hidden(mx.array([ids]))[0, -count:])[:, :vocab]
        rows: Any = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
    return rows


def compared_with() -> str:
    """Say what the results are worth: without a GPU a processor is compared with itself."""
    if device.kind() == "cpu":
        return "compared on the CPU with the CPU itself: there is no GPU here that MLX can use"
    return "compared with float32 on the CPU"
