"""Many clients at random: does memory return, does speed hold, is every token still the right one?

    python -m openelm_mlx.benchmarks.checks.soak [MODEL] [--draft MODEL] [--clients 12] [--requests 1000] [--json FILE]

Clients ask one thing after the other of one `BatchEngine`: prompts with shared beginnings, random
options, some cancelled midway. Shifts follow each other, each with a kind of cache of its own, with
a draft model or without. One answer in a hundred is compared with that of the request alone, by the
rule of judge.py. Between shifts a fixed probe measures speed and memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx import BatchEngine, PromptCache, load
from openelm_mlx.benchmarks.checks.drift import Soak, reference_seconds, resident_bytes
from openelm_mlx.benchmarks.checks.judge import Judge, Report
from openelm_mlx.benchmarks.checks.trials import Answer, Maker, Request, alone, random_engine
from openelm_mlx.benchmarks.measure.harness import Entry, Tick, figures, row_of
from openelm_mlx.benchmarks.measure.suites import Point
from openelm_mlx.benchmarks.peers.openelm import OurSession
from openelm_mlx.device import mx
from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.model.cache_kinds import CacheKind

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.measure.weights import Weights
    from openelm_mlx.benchmarks.results.document import Row
    from openelm_mlx.engine.generation import Event
    from openelm_mlx.engine.loading import Engine

SAMPLE = 0.01  # share of requests that is run again alone
PROBES = 60  # measurements of speed and memory over the whole time, at most
PROBE = (64, 32)  # tokens of the probe's prompt and answer
SHIFT = 10  # requests of a client under one kind of cache
CANCELLED = 0.1  # share of requests
STORE = 16 * 2**20  # bytes of keys and values that are kept between requests

# few, as each is steps to compile
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_bits": 8},
    {"kv_bits": 4},
    {"kv_window": 64},
    {"kv_window": 64, "kv_bits": 8},
)


class Client:
    """Somebody who asks one thing after the other, waits for the answer, and now and then gives
    up.
    """

    def __init__(self, maker: Maker, left: int) -> None:
        self.maker, self.random, self.left = maker, maker.random, left
        self.number: int | None = None  # of the request that is under way
        self.request, self.answer, self.patience = maker.request(), Answer([], "", None), 0

    def ask(self, batch: BatchEngine) -> None:
        self.left -= 1
        self.request, self.answer = self.maker.request(), Answer([], "", None)
        self.patience = (
            self.random.randint(0, 16) if self.random.random() < CANCELLED else sys.maxsize
        )
        lookup: dict[str, Any] = (
            {"prompt_lookup": self.random.randint(1, 3)} if self.random.random() < 0.3 else {}
        )
        request = self.request
        self.number = batch.submit(request.prompt, request.sampling, request.options, **lookup)

    def hear(self, event: Event) -> None:
        self.answer = Answer(
            [*self.answer.tokens, event.token], self.answer.text + event.text, event.finish_reason
        )


class Driver:
    """Runs shifts of clients, and probes between them."""

    def __init__(
        self,
        engine: Engine,
        rng: random.Random,
        seen: Soak,
        draft: Engine | None = None,
        clients: int = 12,
    ) -> None:
        self.engine, self.random, self.seen, self.clients = engine, rng, seen, clients
        self.session, self.maker = OurSession(engine), Maker(engine, rng)
        context = engine.config.max_context_length
        self.probed = min(PROBE[0], context // 2), min(PROBE[1], context // 4)
        self.prompt = Maker(engine, random.Random(0)).ids(self.probed[0])
        self.judge = Judge(engine, Report())
        self.draft = draft

    def shift(self, requests: int, tick: Tick, clock: Callable[[], float]) -> None:
        """Let every client ask `requests` times, of one batch."""
        rng, start = self.random, clock()
        how = EngineOptions(**rng.choice(KINDS), prefill_chunk=rng.choice((64, 512)))
        draft = ModelDraft(self.engine, self.draft) if self.draft and rng.random() < 0.5 else None
        batch = BatchEngine(
            self.engine, rng.choice((4, 8, 16)), how, draft=draft, prompt_cache=PromptCache(STORE)
        )
        clients = [Client(self.maker, requests) for _ in range(self.clients)]
        try:
            while batch.busy or any(client.left for client in clients):
                for client in clients:
                    if client.number is None and client.left and rng.random() < 0.5:
                        client.ask(batch)
                    elif client.number is not None and len(client.answer.tokens) >= client.patience:
                        self.seen.cancelled += batch.cancel(client.number)
                        self.ended(client, how, draft)
                        tick("cancelled", clock() - start)
                        start = clock()
                by_number = {client.number: client for client in clients}
                for number, event in batch.step():
                    client = by_number[number]
                    client.hear(event)
                    if event.finish_reason:
                        self.ended(client, how, draft)
                        tick("request", clock() - start)
                        start = clock()
        finally:
            batch.close()

    def ended(self, client: Client, how: EngineOptions, draft: ModelDraft | None) -> None:
        """Count the answer, and compare it with that of the request alone now and then."""
        client.number = None
        kind = CacheKind.of(self.engine.config, how)
        self.seen.generations[f"{kind}{', draft' if draft else ''}"] += 1
        self.seen.tokens += len(client.answer.tokens)
        if self.random.random() < SAMPLE:
            self.check(client.request, how, client.answer)

    def check(self, request: Request, how: EngineOptions, found: Answer) -> None:
        """Compare with the request alone: no draft, nothing reused."""
        self.seen.checked += 1
        kind, report = CacheKind.of(self.engine.config, how), self.judge.report
        before = len(report.failures)
        self.judge.compare(
            "a client's answer", request, kind, alone(self.engine, request, how), found
        )
        self.seen.failures += report.failures[before:]
        self.seen.rounded = len(report.differences)

    def probe(self) -> None:
        """Speed and memory with nothing else alive."""
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
    """Run for `minutes`, or until each client has asked `requests` times, the same requests for the
    same `seed`.

    `tick` is told each request and the seconds since the last. `seen` is filled as it goes. A
    KeyboardInterrupt passes through; whoever catches it finds nothing in flight.
    """
    seen = Soak() if seen is None else seen
    driver = Driver(engine, random.Random(seed), seen, draft, clients)
    start, done, last = clock(), 0, 0.0
    while (requests is None and clock() < start + 60 * minutes) or (
        requests is not None and done < requests
    ):
        count = SHIFT if requests is None else min(SHIFT, requests - done)
        driver.shift(count, tick, clock)
        done += count
        if clock() >= last + 60 * minutes / PROBES or requests is not None:
            driver.probe()
            last = clock()
            tick("probe", 0.0)
    driver.probe()
    seen.judge()
    return seen


def soak_row(rows: list[Row], weights: Weights, minutes: float, tick: Tick) -> None:
    """Append a row of the probe's figures; what was seen, and what was wrong with it, are its
    notes.
    """
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="openelm-tiny",
        help="a name, folder or file; random: small random weights",
    )
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model with the same tokenizer")
    parser.add_argument("--clients", type=int, default=12, help="default: 12")
    parser.add_argument("--requests", type=int, default=1000, help="of each client (default: 1000)")
    parser.add_argument("--dtype", help="compute in this type")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    if args.model == "random":
        like = load()
        engine = random_engine(like, 0)
        draft: Engine | None = random_engine(like, 0, noise=0.3)
    else:
        engine = load(args.model, args.dtype)
        draft = load(args.draft, args.dtype) if args.draft else None
    seen, start = Soak(), time.monotonic()

    def tick(label: str, seconds: float) -> None:
        print(
            f"\r{sum(seen.generations.values())} of {args.clients * args.requests} requests, {seen.tokens} tokens, "
            f"{seen.cancelled} cancelled, {seen.checked} checked, {len(seen.failures)} failures, "
            f"{time.monotonic() - start:.0f} s",
            end="",
            file=sys.stderr,
            flush=True,
        )

    soak(
        engine,
        seed=args.seed,
        tick=tick,
        seen=seen,
        draft=draft,
        clients=args.clients,
        requests=args.requests,
    )
    print("", *seen.summary(), *seen.failures, sep="\n")
    if args.json:
        Path(args.json).write_text(
            json.dumps({**vars(seen), "probes": seen.rates}, indent=1), encoding="utf-8"
        )
    return 1 if seen.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
