"""Randomized checks of the engine: random requests are run in every way and judged.

This file draws requests and answers one alone; `judge` weighs tokens that differ by a pass of its
own in numpy, and `soak` keeps an engine busy for hours. Nothing here times anything for a
comparison of engines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from openelm_mlx import stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.model.config import BOS, OpenELMConfig
from openelm_mlx.model.decoder import OpenELM

# Which options are on: few sets, as each has its own step to compile. Their values are random.
FILTERS = (
    "",
    "temperature",
    "temperature top_p",
    "temperature top_k top_p repetition_penalty",
    "temperature min_p xtc_probability xtc_threshold",
    "repetition_penalty penalty_window",
    "temperature presence_penalty frequency_penalty penalty_window",
    "temperature logit_bias",
    "presence_penalty logit_bias",
    "temperature top_k top_p min_p xtc_probability repetition_penalty frequency_penalty "
    "penalty_window logit_bias",
)


class Request(NamedTuple):
    prompt: list[int]
    sampling: SamplingOptions
    options: GenerationOptions


class Answer(NamedTuple):
    tokens: list[int]
    text: str
    reason: str | None  # None: it was cancelled, and is compared as far as it came


class Maker:
    """Draw random requests for an engine."""

    def __init__(self, engine: Engine, rng: random.Random, most: int = 32) -> None:
        self.engine, self.random, self.most = engine, rng, most
        self.context = engine.config.max_context_length
        # texts that several prompts begin with
        self.shared = [self.ids(self.context // 2) for _ in range(3)]

    def ids(self, count: int) -> list[int]:
        return [BOS, *(self.random.randrange(3, self.engine.vocab) for _ in range(count - 1))]

    def prompt(self) -> list[int]:
        """Return a prompt that is new, begins as another does, or quotes itself.

        It has one token, or few, or as many as a block of a cache, or fills the context.
        """
        pick, between = self.random.choice, self.random.randint
        blocks = (pick((63, 64, 65, 127, 128, 129)), pick((240, 255, 256, 257)))
        few = [between(3, 60) for _ in range(6)]
        count = pick((1, 2, *few, *blocks, self.context - between(0, self.most)))
        count = min(count, self.context)
        if self.random.random() < 0.3:
            words = self.ids(between(2, 12))
            return (words * (count // len(words) + 1))[:count]
        if self.random.random() < 0.5:
            return (pick(self.shared)[: between(1, count)] + self.ids(count))[:count]
        return self.ids(count)

    def sampling(self) -> SamplingOptions:
        between, integer, vocab = self.random.uniform, self.random.randint, self.engine.vocab
        values: dict[str, Callable[[], Any]] = {
            "temperature": lambda: between(0.2, 1.5),
            "top_k": lambda: integer(1, 50),
            "top_p": lambda: between(0.3, 0.98),
            "min_p": lambda: between(0.01, 0.3),
            "xtc_probability": lambda: between(0.2, 1.0),
            "xtc_threshold": lambda: between(0.02, 0.4),
            "repetition_penalty": lambda: between(1.05, 1.6),
            "presence_penalty": lambda: between(-0.5, 1.0),
            "frequency_penalty": lambda: between(-0.3, 0.6),
            "penalty_window": lambda: self.random.choice((5, 8, 50)),
            "logit_bias": lambda: {
                token: between(-8, 4) for token in self.random.sample(range(vocab), integer(1, 5))
            },
        }
        chosen = {name: values[name]() for name in self.random.choice(FILTERS).split()}
        seed, stream = self.random.randrange(2**40), self.random.choice((0, 0, 1, 7))
        return SamplingOptions(**chosen, seed=seed, stream=stream)

    def options(self) -> GenerationOptions:
        stop = (self.random.randrange(self.engine.vocab),) if self.random.random() < 0.2 else ()
        return GenerationOptions(
            max_tokens=self.random.choice((1, 2, 8, self.most, self.most, 2 * self.most)),
            ignore_eos=self.random.random() < 0.8,
            stop_tokens=stop,
            logprobs=self.random.choice((*[None] * 7, 2)),
        )

    def request(self) -> Request:
        return Request(self.prompt(), self.sampling(), self.options())


def alone(
    engine: Engine,
    request: Request,
    how: EngineOptions,
    cancel_after: int | None = None,
    **settings: Any,
) -> Answer:
    """Run a request through `stream_generate`; `settings` are its keywords."""
    tokens: list[int] = []
    text, reason = "", None
    with closing(stream_generate(engine, *request, engine_options=how, **settings)) as events:
        for event in events:
            text, reason = text + event.text, event.finish_reason
            tokens.append(event.token)
            if len(tokens) == cancel_after:
                break
    return Answer(tokens, text, reason)


def random_model(
    seed: int,
    vocab: int = 64,
    dim: int = 64,
    layers: int = 2,
    spread: float = 2.0,
    noise: float = 0.0,
) -> OpenELM:
    """Return a model of a few thousand random weights.

    `spread` scales the logits, so that the choice is neither flat nor certain. `noise` is how far
    its head is from that of the same seed without, as a draft model is from its target.
    """
    config = OpenELMConfig(
        vocab_size=vocab,
        model_dim=dim,
        head_dim=32,
        num_transformer_layers=layers,
        num_gqa_groups=2,
        share_input_output_layers=False,
        qkv_multipliers=(1.0, 2.0),
        ffn_multipliers=(1.0, 2.0),
        ffn_dim_divisor=32,
        max_context_length=512,
    )
    mx.random.seed(seed)
    model = OpenELM(config)
    head = mx.random.normal((vocab, dim)) * spread / dim**0.5
    if noise:
        head = head * (1 + noise * mx.random.normal((vocab, dim)))
    model.load_weights([("lm_head.weight", head)], strict=False)
    mx.eval(model.parameters())
    return model


def random_engine(
    like: Engine, seed: int, *shape: int, dtype: mx.Dtype = mx.float32, **more: float
) -> Engine:
    """Return an engine of random weights with the tokenizer of another.

    The rest is passed on to `random_model`.
    """
    model = random_model(seed, *shape, **more)  # type: ignore[arg-type]
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return Engine(model, like.tokenizer, model.args, f"random-{seed}", BUNDLED)
