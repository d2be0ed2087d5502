"""Half an hour of everything at random: does memory return, does speed hold, is every token still the right one?

Generations of random prompts, sampling, cache kinds, speculation, batches and reused prompts, some cancelled midway.
One in a hundred is run again on the eager twin (`compiled=False`), token by token; what rounds its keys and values, or
computes in a half type, only where both run alone and read the prompt in the same chunks. Between them, a fixed probe
measures speed and memory.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from openelm_mlx.benchmarks.drift import Soak, reference_seconds, resident_bytes
from openelm_mlx.benchmarks.harness import Entry, Tick, figures, row_of
from openelm_mlx.benchmarks.ours import OurSession, prompt_ids
from openelm_mlx.benchmarks.suites import Point

from openelm_mlx import PromptCache
from openelm_mlx.batch import BatchEngine
from openelm_mlx.generation import stream_generate
from openelm_mlx.options import EngineOptions, GenerationOptions, SamplingOptions

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.document import Row
    from openelm_mlx.benchmarks.loaded import Weights

    from openelm_mlx.generation import Event
    from openelm_mlx.loading import Engine

SAMPLE = 0.01  # share of generations that is checked against the eager twin
PROBES = 60  # measurements of speed and memory over the whole time
PROBE = (64, 32)  # tokens of the probe's prompt and answer
WARM_UP = 0.05  # of the time, before the starting level is taken

# few kinds, as each is a step to compile: what is random is which follows which, with what cache and how long
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.2},
)


def soak(
    engine: Engine,
    minutes: float = 30.0,
    seed: int = 0,
    tick: Tick = lambda label, seconds: None,
    clock: Callable[[], float] = time.monotonic,
    seen: Soak | None = None,
) -> Soak:
    """Run for `minutes`, the same requests for the same `seed`. `tick` is told each request and the seconds it took.

    `seen` is filled as it goes. A KeyboardInterrupt passes through; whoever catches it finds nothing in flight.
    """
    seen = Soak() if seen is None else seen
    driver = Driver(engine, random.Random(seed), seen)
    start = clock()
    end, next_probe = start + 60 * minutes, start + WARM_UP * 60 * minutes
    while (now := clock()) < end:
        if now >= next_probe:
            driver.probe()
            next_probe = clock() + 60 * minutes / PROBES
            kind = "probe"
        else:
            kind = driver.request()
        tick(kind, clock() - now)
    driver.probe()
    seen.judge()
    return seen


def soak_row(rows: list[Row], weights: Weights, minutes: float, tick: Tick) -> None:
    """Append a row of the probe's figures; what was seen, and what was wrong with it, are its notes."""
    seen = Soak()
    try:
        soak(weights.engine, minutes, tick=tick, seen=seen)
    finally:
        case = weights.case(Point(*PROBE))
        entry = Entry(case, OurSession(weights.engine), [])
        for timed in seen.probes:
            for name, value in figures(timed, case).items():
                entry.values.setdefault(name, []).append(value)
        failures = [f"failed: {failure}" for failure in seen.failures]
        rows.append(replace(row_of(entry), notes=(*failures, *seen.summary())))


@dataclass(frozen=True)
class Asked:
    """One request, and how it is run."""

    prompt: list[int]
    sampling: SamplingOptions
    options: GenerationOptions
    engine_options: EngineOptions


class Driver:
    """Draws requests and runs them."""

    def __init__(self, engine: Engine, generator: random.Random, seen: Soak) -> None:
        self.engine, self.random, self.seen = engine, generator, seen
        self.session = OurSession(engine)
        self.context = engine.config.max_context_length
        self.float32 = engine.model.transformer.norm.weight.dtype == mx.float32
        self.kinds: tuple[Callable[[], None], ...] = (self.single, self.single, self.lookup, self.turn, self.batch)
        self.turns: tuple[PromptCache, list[int], GenerationOptions, EngineOptions] | None = None
        self.since_check = 0

    def request(self) -> str:
        run = self.random.choice(self.kinds)
        run()
        self.seen.generations[run.__name__] += 1
        return run.__name__

    def probe(self) -> None:
        """Speed and memory with nothing else alive."""
        self.turns = None
        prompt, tokens = prompt_ids(self.engine, min(PROBE[0], self.context // 2)), min(PROBE[1], self.context // 4)
        self.session.generate(prompt, tokens)
        timed = self.session.generate(prompt, tokens)
        self.seen.references.append(reference_seconds())
        gc.collect()
        mx.clear_cache()
        self.seen.probes.append(timed)
        self.seen.arrays.append(mx.get_active_memory())
        self.seen.process.append(resident_bytes())

    def prompt(self, most: int) -> list[int]:
        count = self.random.randint(1, max(1, min(most, self.context // 2)))
        if self.random.random() < 0.5:
            return prompt_ids(self.engine, count, self.random.randrange(200))
        return [self.random.randrange(3, self.engine.vocab) for _ in range(count)]

    def sampling(self) -> SamplingOptions:
        return SamplingOptions(**self.random.choice(SAMPLINGS), seed=self.random.randrange(2**31))

    def options(self, **settings: Any) -> GenerationOptions:
        pick = self.random.choice
        chosen: dict[str, Any] = {
            "max_tokens": self.random.randint(1, 64), "ignore_eos": pick((True, False)), "logprobs": pick((*[None] * 7, 3)),
            "stop": pick(((), (), ("the",))),
        }  # fmt: skip
        return GenerationOptions(**{**chosen, **settings})

    def engine_options(self) -> EngineOptions:
        pick = self.random.choice
        cache = pick(({}, {}, {"kv_bits": 8}, {"kv_bits": 4}, {"kv_window": 32}))
        return EngineOptions(prefill_chunk=pick((16, 64, 512)), **cache)

    def single(self) -> None:
        self.run(Asked(self.prompt(200), self.sampling(), self.options(), self.engine_options()), alike=True)

    def lookup(self) -> None:
        """Prompt lookup, on a prompt that quotes itself."""
        prompt = self.prompt(40) * self.random.randint(1, 3)
        options = self.options(prompt_lookup=self.random.randint(1, 4))
        self.run(Asked(prompt, self.sampling(), options, self.engine_options()))

    def turn(self) -> None:
        """A conversation that goes on, or a new one: the prompt cache is kept between turns."""
        if self.turns is None or len(self.turns[1]) > self.context // 2 or self.random.random() < 0.2:
            self.turns = PromptCache(), [], self.options(logprobs=None), self.engine_options()
        cache, said, options, engine_options = self.turns
        said += self.prompt(24)
        said += self.run(Asked(list(said), self.sampling(), options, engine_options), cache)

    def run(self, asked: Asked, cache: PromptCache | None = None, alike: bool = False) -> list[int]:
        """One generation, perhaps cancelled, perhaps repeated on the eager twin; its tokens."""
        stop_after = self.random.randint(0, 12) if self.random.random() < 0.2 else None
        found: list[int] = []
        with closing(self.events(asked, cache)) as events:
            for event in events:
                if stop_after is not None and len(found) >= stop_after:
                    self.seen.cancelled += 1
                    break
                if event.token is not None:
                    found.append(event.token)
        self.seen.tokens += len(found)
        self.since_check += 1
        if self.random.random() < SAMPLE or self.since_check > 2 / SAMPLE:
            self.check(asked, found, alike)
        return found

    def events(self, asked: Asked, cache: PromptCache | None = None) -> Generator[Event, None, None]:
        return stream_generate(
            self.engine, list(asked.prompt), asked.sampling, asked.options, engine_options=asked.engine_options,
            prompt_cache=cache,
        )  # fmt: skip

    def check(self, asked: Asked, found: list[int], alike: bool = False) -> None:
        """The same on the eager twin, without speculation and without a cache of earlier turns.

        `alike` says that the request, too, ran alone, undrafted and from its first token on.
        """
        if not alike and not (self.float32 and asked.engine_options.kv_bits is None):
            return
        self.since_check = 0
        self.seen.checked += 1
        twin = replace(
            asked, options=replace(asked.options, prompt_lookup=0),
            engine_options=replace(asked.engine_options, compiled=False),
        )  # fmt: skip
        with closing(self.events(twin)) as events:
            expected = [event.token for _, event in zip(found, events, strict=False)]
        if expected != found:
            where = next(i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1])
            self.seen.failures.append(
                f"a wrong token: number {where} is {found[where]}, the eager twin says {expected[where]} (prompt of "
                f"{len(asked.prompt)} tokens, {asked.sampling}, {asked.options}, {asked.engine_options})"
            )

    def batch(self) -> None:
        """Sequences that join and leave while others run, each with its own options; some are cancelled."""
        engine_options = self.engine_options()
        batch = BatchEngine(self.engine, self.random.randint(2, 6), engine_options)
        asked: dict[int, Asked] = {}
        found: dict[int, list[int]] = {}
        waiting = self.random.randint(2, 8)
        try:
            while batch.busy or waiting:
                if waiting and self.random.random() < 0.5:
                    lookup = self.random.choice((0, 0, 2))
                    one = Asked(self.prompt(80), self.sampling(), self.options(prompt_lookup=lookup), engine_options)
                    number = batch.submit(one.prompt, one.sampling, one.options)
                    asked[number], found[number] = one, []
                    waiting -= 1
                for number, event in batch.step():
                    if event.token is not None:
                        found[number].append(event.token)
                if found and self.random.random() < 0.02:
                    self.seen.cancelled += batch.cancel(self.random.choice(list(found)))
        finally:
            batch.close()
        self.seen.tokens += sum(map(len, found.values()))
        if self.random.random() < 5 * SAMPLE:  # as often as its sequences would come up one by one
            number = self.random.choice(list(asked))
            self.check(asked[number], found[number])
