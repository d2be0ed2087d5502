"""Many clients at random: does memory return, does speed hold, is every token still the right one?

    python -m openelm_mlx.benchmarks.checks.soak [MODEL] [--draft MODEL] [--requests 1000]

Clients ask one thing after the other of one `BatchEngine`: prompts with shared beginnings, random
options, some cancelled midway. Shifts follow each other, each with a kind of cache of its own, with
a draft model or without. One answer in a hundred is compared with that of the request alone, by the
rule of judge.py. Between shifts a fixed probe measures speed and memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from openelm_mlx import BatchEngine, PromptCache, load
from openelm_mlx.benchmarks.checks import Answer, Maker, Request, alone, random_engine
from openelm_mlx.benchmarks.checks.judge import Judge, Report
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.peers.on_mlx import OurSession
from openelm_mlx.device import mx
from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import OpenELMError
from openelm_mlx.files import check_new
from openelm_mlx.model.cache_kinds import CacheKind

if TYPE_CHECKING:
    from openelm_mlx.engine.generation import Event
    from openelm_mlx.engine.loading import Engine

SAMPLE = 0.01  # share of requests that are run again alone
CANCELLED = 0.1  # share of requests
PROBES = 60  # measurements of speed and memory over the whole time, at most
PROBE = (64, 32)  # tokens of the probe's prompt and answer
SHIFT = 10  # requests of a client under one kind of cache
STORE = 16 * 2**20  # bytes of keys and values that are kept between requests
MEMORY_MAY_GROW = 0.02  # arrays from the first probe on, the process from half way on
SPEED_MAY_FALL = 0.10
# few, as each has its own steps to compile
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_bits": 8},
    {"kv_bits": 4},
    {"kv_window": 64},
    {"kv_window": 64, "kv_bits": 8},
)
Tick = Callable[[str, float], None]  # takes what was done, and the seconds it took


@dataclass
class Soak:
    """The findings of a soak; `failures` is empty if all was well."""

    generations: Counter[str] = field(default_factory=Counter)  # by kind
    tokens: int = 0
    cancelled: int = 0
    checked: int = 0
    rounded: int = 0  # answers of `checked` that differ by rounding
    probes: list[Timed] = field(default_factory=list)
    references: list[float] = field(default_factory=list)  # seconds of a fixed work at each probe
    arrays: list[int] = field(default_factory=list)  # bytes of arrays alive at each probe
    process: list[int] = field(default_factory=list)  # bytes of the process at each probe
    failures: list[str] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [rate for probe in self.probes if (rate := probe.decode_rate()) is not None]

    @property
    def half_way(self) -> int:
        """Bytes of the process half way: by then every kind of step has been compiled and kept."""
        return self.process[len(self.process) // 2]

    @property
    def relative(self) -> list[float]:
        """Decode speed against the machine's own at that time.

        Neither heat nor a neighbour's load is the engine's fault.
        """
        return [rate * seconds for rate, seconds in zip(self.rates, self.references, strict=False)]

    def summary(self) -> list[str]:
        """Return what was done and seen, in a few lines."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.generations.items()))
        lines = [
            f"{self.generations.total()} generations ({kinds}), {self.tokens} tokens; "
            f"{self.cancelled} cancelled midway, {self.checked} repeated alone, of which "
            f"{self.rounded} differ by rounding"
        ]
        if self.arrays:
            first, middle, last = (
                f"{size / 1e6:.0f} MB"
                for size in (self.process[0], self.half_way, self.process[-1])
            )
            lines.append(
                f"arrays {self.arrays[0] / 1e6:.1f} MB at the start, {self.arrays[-1] / 1e6:.1f} "
                f"MB at the end; process {first} at the start, {middle} half way, {last} at the end"
            )
        if len(self.relative) >= 9:
            lines.append(
                f"decode speed from the first third of the probes to the last: "
                f"{trend(self.rates)[0]:+.1%}; relative to a fixed work timed beside them "
                f"{trend(self.relative)[0]:+.1%}"
            )
        return lines

    def judge(self) -> None:
        """Add to the failures what memory and speed say."""
        if self.arrays and self.arrays[-1] > self.arrays[0] * (1 + MEMORY_MAY_GROW):
            grown = f"{(self.arrays[-1] - self.arrays[0]) / 1e6:.1f} MB"
            self.failures.append(f"memory did not return: arrays grew by {grown}")
        if self.process and self.process[-1] > self.half_way * (1 + MEMORY_MAY_GROW):
            grown = f"{(self.process[-1] - self.half_way) / 1e6:.0f} MB in the second half"
            self.failures.append(f"memory did not return: the process grew by {grown}")
        change, sure = trend(self.relative)
        if sure and change < -SPEED_MAY_FALL:
            fell = f"decode speed fell by {-change:.0%}"
            self.failures.append(f"{fell} against a fixed work timed beside it")


def trend(rates: list[float]) -> tuple[float, bool]:
    """Return the change from the first third to the last, and whether it is sure.

    It is sure if even the quartiles do not meet.
    """
    if len(rates) < 9:
        return 0.0, False
    third = len(rates) // 3
    first, last = sorted(rates[:third]), sorted(rates[-third:])
    change = last[third // 2] / first[third // 2] - 1
    return change, last[third * 3 // 4] < first[third // 4]


def reference_seconds() -> float:
    """Time a fixed work of many small kernels in a chain, as decoding is, without this engine."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x = mx.ones((1, 256))
        for _ in range(400):
            x = mx.tanh(x)
        mx.eval(x)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def resident_bytes() -> int:
    """Return the memory of this process, as the system counts it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        return 1024 * int(shown.stdout.strip() or 0)


class Client:
    """A client asks one thing after the other, waits for the answer, and now and then gives up."""

    def __init__(self, maker: Maker, left: int) -> None:
        self.maker, self.random, self.left = maker, maker.random, left
        self.number: int | None = None  # of the request that is under way
        self.request, self.answer, self.patience = maker.request(), Answer([], "", None), 0

    def ask(self, batch: BatchEngine) -> None:
        rng = self.random
        self.left -= 1
        self.request, self.answer = self.maker.request(), Answer([], "", None)
        self.patience = rng.randint(0, 16) if rng.random() < CANCELLED else sys.maxsize
        lookup = rng.randint(1, 3) if rng.random() < 0.3 else 0
        prompt, sampling, options = self.request
        self.number = batch.submit(prompt, sampling, options, prompt_lookup=lookup)

    def hear(self, event: Event) -> None:
        tokens, text = [*self.answer.tokens, event.token], self.answer.text + event.text
        self.answer = Answer(tokens, text, event.finish_reason)


class Driver:
    """Run shifts of clients, and probes between them."""

    def __init__(
        self,
        engine: Engine,
        rng: random.Random,
        seen: Soak,
        draft: Engine | None = None,
        clients: int = 12,
    ) -> None:
        self.engine, self.random, self.seen = engine, rng, seen
        self.draft, self.clients = draft, clients
        self.session, self.maker = OurSession(engine), Maker(engine, rng)
        context = engine.config.max_context_length
        self.probed = min(PROBE[0], context // 2), min(PROBE[1], context // 4)
        self.prompt = Maker(engine, random.Random(0)).ids(self.probed[0])
        self.judge = Judge(engine, Report())

    def shift(self, requests: int, tick: Tick, clock: Callable[[], float]) -> None:
        """Let every client ask `requests` times, of one batch."""
        rng, start = self.random, clock()
        how = EngineOptions(**rng.choice(KINDS), prefill_chunk=rng.choice((64, 512)))
        draft = ModelDraft(self.engine, self.draft) if self.draft and rng.random() < 0.5 else None
        kind = CacheKind.of(self.engine.config, how)
        name = f"{kind}, draft" if draft else str(kind)

        def ended(client: Client, label: str) -> None:
            nonlocal start
            client.number = None
            self.seen.generations[name] += 1
            self.seen.tokens += len(client.answer.tokens)
            if rng.random() < SAMPLE:
                self.check(client.request, how, client.answer)
            tick(label, clock() - start)
            start = clock()

        clients = [Client(self.maker, requests) for _ in range(self.clients)]
        rows, store = rng.choice((4, 8, 16)), PromptCache(STORE)
        batch = BatchEngine(self.engine, rows, how, draft=draft, prompt_cache=store)
        try:
            while batch.busy or any(client.left for client in clients):
                for client in clients:
                    if client.number is None and client.left and rng.random() < 0.5:
                        client.ask(batch)
                    elif client.number is not None and len(client.answer.tokens) >= client.patience:
                        self.seen.cancelled += batch.cancel(client.number)
                        ended(client, "cancelled")
                by_number = {client.number: client for client in clients}
                for number, event in batch.step():
                    by_number[number].hear(event)
                    if event.finish_reason:
                        ended(by_number[number], "request")
        finally:
            batch.close()

    def check(self, request: Request, how: EngineOptions, answer: Answer) -> None:
        """Compare an answer with that of the request alone: no draft, nothing reused."""
        self.seen.checked += 1
        kind, report = CacheKind.of(self.engine.config, how), self.judge.report
        before, again = len(report.failures), alone(self.engine, request, how)
        self.judge.compare("a client's answer", request, kind, again, answer)
        self.seen.failures += report.failures[before:]
        self.seen.rounded = sum(found.allowed for found in report.differences)

    def probe(self) -> None:
        """Measure speed and memory with nothing else alive."""
        self.session.generate(self.prompt, self.probed[1])
        timed = self.session.generate(self.prompt, self.probed[1])
        self.seen.references.append(reference_seconds())
        gc.collect()
        mx.clear_cache()
        self.seen.probes.append(timed)
        self.seen.arrays.append(mx.get_active_memory())
        self.seen.process.append(resident_bytes())


def soak(
    engine: Engine,
    minutes: float = 30.0,
    seed: int = 0,
    tick: Tick = lambda label, seconds: None,
    clock: Callable[[], float] = time.monotonic,
    seen: Soak | None = None,
    draft: Engine | None = None,
    clients: int = 12,
    requests: int | None = None,
) -> Soak:
    """Run for `minutes`, or until each client has asked `requests` times.

    The same `seed` gives the same requests. `tick` gets each request and the seconds since the
    last. `seen` is filled as it goes. A KeyboardInterrupt passes through, and nothing is in flight
    then.
    """
    seen = Soak() if seen is None else seen
    driver = Driver(engine, random.Random(seed), seen, draft, clients)
    start, done, probed = clock(), 0, 0.0
    while clock() < start + 60 * minutes if requests is None else done < requests:
        count = SHIFT if requests is None else min(SHIFT, requests - done)
        driver.shift(count, tick, clock)
        done += count
        if requests is not None or clock() >= probed + 60 * minutes / PROBES:
            driver.probe()
            probed = clock()
            tick("probe", 0.0)
    driver.probe()
    seen.judge()
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    model = "a name, folder or file; random: small random weights"
    add("model", nargs="?", default="openelm-tiny", help=model)
    add("--draft", metavar="MODEL", help="a smaller model with the same tokenizer")
    add("--clients", type=int, default=12, help="default: 12")
    add("--requests", type=int, default=1000, help="of each client (default: 1000)")
    add("--dtype", help="compute in this type")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_new(args.json, "--json")
        if args.model == "random":
            engine = random_engine(load(), 0)
            draft: Engine | None = random_engine(engine, 0, noise=0.3)
        else:
            engine = load(args.model, args.dtype)
            draft = load(args.draft, args.dtype) if args.draft else None
    except OpenELMError as error:
        parser.exit(2, f"soak: {error}\n")
    seen, start = Soak(), time.monotonic()

    def tick(label: str | None, seconds: float) -> None:
        line = (
            f"\r{seen.generations.total()} of {args.clients * args.requests} requests, "
            f"{seen.tokens} tokens, {seen.cancelled} cancelled, {seen.checked} checked, "
            f"{len(seen.failures)} failures, {time.monotonic() - start:.0f} s"
        )
        print(line, end="", file=sys.stderr, flush=True)

    size = {"clients": args.clients, "requests": args.requests}
    soak(engine, seed=args.seed, tick=tick, seen=seen, draft=draft, **size)
    print("", *seen.summary(), *seen.failures, sep="\n")
    if args.json:
        found = {**vars(seen), "probes": seen.rates}
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if seen.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
