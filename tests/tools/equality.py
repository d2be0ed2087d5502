"""Is a request's answer the same however it is run?

    python tests/tools/equality.py [MODEL] [--draft MODEL] [--kv-bits 8]

A trial is a random request: options, seed, lengths, kind of cache. Its answer when it runs alone is
compared with those of other ways: not streamed, on the eager twin, in other chunks, with a reused
prefix, in a batch whose rows come and go, with a draft model, with prompt lookup, with both, with
both in a batch. Where two answers part, scores of an independent pass (judge.py) decide: a
rounding error may turn a tie, nothing else may. Without MODEL, models of random weights are made.

With quantized keys and values or half types, another order of computing may round otherwise. What
computes in the same order must still be equal; of the rest, the rate of differing tokens and the
gaps between their scores are reported.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from openelm_mlx import BatchEngine, PromptCache, batch_generate, generate, load
from openelm_mlx.benchmarks.checks import (
    Answer,
    Maker,
    Request,
    alone,
    random_engine,
)
from openelm_mlx.benchmarks.checks.judge import Judge, Report
from openelm_mlx.device import blas
from openelm_mlx.dtypes import DTYPES, FLOATS
from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import KV_BITS, EngineOptions
from openelm_mlx.model.cache_kinds import CacheKind

RENEW = 100  # trials after which models of random weights are made anew
BEHIND, BEHIND_ROUNDED = 1e-4, 0.1  # how far a drawn token may be from the likeliest one
WINDOWS: tuple[dict[str, int], ...] = (
    {},
    {},
    {"kv_window": 24, "kv_keep": 4},
    {"kv_window": 100, "kv_keep": 2},
)


@dataclass
class Trials(Report):
    """What all trials have shown."""

    trials: int = 0
    checked: int = 0  # tokens of answers alone that were compared with the independent pass
    farthest: float = 0.0  # the largest score of a likeliest token less that of the drawn one

    def as_json(self) -> dict[str, Any]:
        differing = Counter(found.way for found in self.differences)
        return {
            "trials": self.trials,
            "compared": dict(self.compared),
            "tokens": dict(self.tokens),
            "rate_of_differing_tokens": {
                way: differing[way] / max(count, 1) for way, count in self.tokens.items()
            },
            "largest_gap": max((found.gap for found in self.differences), default=0.0),
            "checked_tokens": self.checked,
            "farthest_from_reference": self.farthest,
            "differences": [vars(found) for found in self.differences],
            "failures": self.failures,
        }


def check(judge: Judge, report: Trials, request: Request, kind: CacheKind, answer: Answer) -> None:
    """Compare every token of an answer with the independent pass."""
    start, reference = len(request.prompt), judge.reference
    logits = reference.logits(request.prompt + answer.tokens[:-1], kind)[start - 1 :]
    tolerance = BEHIND if judge.exact(kind) else BEHIND_ROUNDED
    for place, (token, row) in enumerate(zip(answer.tokens, logits, strict=True)):
        before = answer.tokens[:place]
        scores = reference.scores(row, request, before)
        behind, likeliest = float(scores.max() - scores[token]), int(scores.argmax())
        report.checked += 1
        if behind <= tolerance:
            report.farthest = max(report.farthest, behind)
        elif not reference.plausible(row, request, before, (token, likeliest), tolerance):
            report.errors.append(
                f"against the independent pass: token {place} is {token}, {behind:.2e} behind "
                f"{likeliest}; {kind}; {request}"
            )
            return


def together(
    engine: Engine,
    requests: list[Request],
    how: EngineOptions,
    rng: random.Random,
    lookup: bool = False,
    **settings: Any,
) -> list[Answer]:
    """Run requests through one `BatchEngine`.

    They join while others run, up to three others come and go, and some are cancelled.
    """
    slots, admission = rng.randint(1, 8), rng.choice((None, 8, 32, 100))
    batch = BatchEngine(engine, slots, how, admission=admission, **settings)
    maker, waiting = Maker(engine, rng, 8), [*enumerate(requests)]
    waiting += [(-1, maker.request()) for _ in range(rng.randint(0, 3))]
    rng.shuffle(waiting)
    numbers: dict[int, int] = {}
    answers = [Answer([], "", None) for _ in requests]
    ends = [rng.randint(0, 12) if rng.random() < 0.15 else None for _ in requests]
    with closing(batch):
        while batch.busy or waiting:
            while waiting and rng.random() < 0.4:
                place, request = waiting.pop()
                length = rng.randint(1, 3) if lookup and rng.random() < 0.7 else 0
                numbers[batch.submit(*request, prompt_lookup=length)] = place
            for number, event in batch.step():
                place = numbers[number]
                if place < 0:
                    cancelled = rng.random() < 0.1
                else:
                    tokens, text, _ = answers[place]
                    tokens = [*tokens, event.token]
                    answers[place] = Answer(tokens, text + event.text, event.finish_reason)
                    cancelled = len(tokens) == ends[place]
                if cancelled:
                    batch.cancel(number)
    return answers


class Parrot:
    """A drafter that knows what comes but errs now and then, so that drafts are kept in part."""

    def __init__(self, texts: list[list[int]], rng: random.Random) -> None:
        self.texts, self.random = texts, rng

    def propose(self, known: list[int], length: int) -> list[int]:
        rng = self.random
        for text in self.texts:
            if text[: len(known)] == known:
                coming = text[len(known) : len(known) + rng.randint(0, length)]
                return [rng.choice(text) if rng.random() < 0.2 else token for token in coming]
        return [rng.choice(known) for _ in range(rng.randint(0, length))]


class Group:
    """Requests under the same options of the engine, run in every way there is."""

    def __init__(
        self,
        judge: Judge,
        report: Trials,
        maker: Maker,
        draft: Engine | ModelDraft | None,
        how: EngineOptions,
        count: int,
    ) -> None:
        self.judge, self.report, self.maker = judge, report, maker
        self.draft, self.how = draft, how
        self.engine, self.random = judge.engine, maker.random
        self.requests = [maker.request() for _ in range(count)]
        self.kind = CacheKind.of(self.engine.config, how)
        self.base = [alone(self.engine, request, how) for request in self.requests]
        texts = [r.prompt + a.tokens for r, a in zip(self.requests, self.base, strict=True)]
        self.parrot = Parrot(texts, self.random)

    def run(self, share: float) -> None:
        """Compare all ways, and a `share` of the answers alone with the independent pass."""
        for request, answer in zip(self.requests, self.base, strict=True):
            if self.random.random() < share:
                check(self.judge, self.report, request, self.kind, answer)
            for way, other in self.one_by_one(request):
                self.judge.compare(way, request, self.kind, answer, other)
        seed, draft = self.random.random(), self.random.choice((self.draft, self.parrot))
        first = self.batch("a batch", seed, self.base)
        self.batch("the same batch again", seed, first)
        drafting: dict[str, Any] = {"lookup": True, "prompt_cache": PromptCache(), "draft": draft}
        self.batch("a batch with drafts and reuse", seed + 1, self.base, **drafting)

    def batch(self, way: str, seed: float, compared: list[Answer], **settings: Any) -> list[Answer]:
        found = together(self.engine, self.requests, self.how, random.Random(seed), **settings)
        for request, one, other in zip(self.requests, compared, found, strict=True):
            self.judge.compare(way, request, self.kind, one, other)
        return found

    def one_by_one(self, request: Request) -> Iterator[tuple[str, Answer]]:
        """Yield the answer of each way to run a request, with the way's name."""
        engine, how, rng = self.engine, self.how, self.random
        again = alone(engine, request, how)
        yield "alone again", again
        text = generate(engine, *request, engine_options=how)
        yield "not streamed", again._replace(text=text)
        (one,) = batch_generate(engine, [request.prompt], *request[1:], engine_options=how)
        yield "a batch of one", Answer(list(one.tokens), one.text, one.finish_reason)
        other = replace(how, compiled=not how.compiled)
        yield "compiled or eager", alone(engine, request, other)
        chunk = rng.randint(max(1, len(request.prompt) // 20), len(request.prompt))
        yield "other chunks", alone(engine, request, replace(how, prefill_chunk=chunk))
        yield from (("a reused prefix", answer) for answer in self.reused(request))
        lookup, lengths = (
            {"prompt_lookup": rng.randint(1, 3)},
            {
                "draft_tokens": rng.randint(1, 9),
                "adaptive_draft": rng.random() < 0.5,
            },
        )
        yield "prompt lookup", alone(engine, request, how, **lookup, **lengths)
        yield "drafts nearly right", alone(engine, request, how, draft=self.parrot, **lengths)
        if draft := self.draft:
            yield "a draft model", alone(engine, request, how, draft=draft, **lengths)
            yield "both drafts", alone(engine, request, how, draft=draft, **lookup, **lengths)

    def reused(self, request: Request) -> Iterator[Answer]:
        """Answer after another text that begins alike, perhaps left midway; then once more."""
        cache, maker = PromptCache(), self.maker
        shared = request.prompt[: self.random.randint(1, len(request.prompt))]
        prompt = (shared + maker.ids(20))[: maker.context]
        other = Request(prompt, maker.sampling(), maker.options())
        alone(self.engine, other, self.how, self.random.choice((None, 1, 3)), prompt_cache=cache)
        for _ in range(2):
            yield alone(self.engine, request, self.how, prompt_cache=cache)


def run(
    engines: Callable[[int], tuple[Engine, Engine | None]],
    trials: int,
    seed: int = 0,
    kv_bits: int | None = None,
    share: float = 0.05,
    tick: Callable[[Trials], None] = lambda report: None,
) -> Trials:
    """Run `trials` requests in every way.

    `engines` gives a model and its draft, by the number of trials done.
    """
    rng, report = random.Random(seed), Trials()
    engine: Engine | None = None
    while report.trials < trials:
        made, draft = engines(report.trials)
        if made is not engine:
            engine, judge, maker = made, Judge(made, report), Maker(made, rng)
            drafter = ModelDraft(made, draft) if draft else None
        count = min(rng.randint(1, 6), trials - report.trials)
        how = EngineOptions(
            prefill_chunk=rng.choice((24, 64, 100, 256, 512)),
            compiled=rng.random() < 0.2,
            kv_bits=kv_bits,
            **rng.choice(WINDOWS),
        )
        Group(judge, report, maker, rng.choice((drafter, draft)), how, count).run(share)
        report.trials += count
        tick(report)
    return report


def open_engines(
    name: str | None, draft: str | None, dtype: str
) -> Callable[[int], tuple[Engine, Engine | None]]:
    """Return what `run` asks for models: those named, or new random ones from time to time."""
    if name is not None:
        named = load(name, dtype), load(draft, dtype) if draft else None
        return lambda done: named
    like, kind = load(), DTYPES[dtype].mlx

    @lru_cache(maxsize=1)
    def make(number: int) -> tuple[Engine, Engine | None]:
        draft = random_engine(like, number, dtype=kind, noise=0.3)
        return random_engine(like, number, dtype=kind), draft

    return lambda done: make(done // RENEW)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="equality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="a name, folder or file; default: random weights")
    add("--draft", metavar="MODEL", help="a smaller model with the same tokenizer")
    add("--trials", type=int, default=1000, help="default: 1000")
    add("--seed", type=int, default=0)
    add("--kv-bits", type=int, choices=KV_BITS, help="quantized keys and values")
    add("--dtype", choices=sorted(FLOATS), default="float32", help="default: float32")
    check = "of the answers alone, compared with the independent pass (default: 0.05)"
    add("--check", type=float, default=0.05, metavar="SHARE", help=check)
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    start, shown = time.monotonic(), 0

    def tick(report: Trials) -> None:
        nonlocal shown
        line = (
            f"\r{report.trials} of {args.trials} trials, {report.compared.total()} answers "
            f"compared, {len(report.differences)} differ, {len(report.failures)} wrong, "
            f"{time.monotonic() - start:.0f} s"
        )
        print(line, end="", file=sys.stderr, flush=True)
        for failure in report.failures[shown:]:
            print(f"\n{failure}", flush=True)
        shown = len(report.failures)

    engines = open_engines(args.model, args.draft, args.dtype)
    report = run(engines, args.trials, args.seed, args.kv_bits, args.check, tick)
    facts = {name: getattr(args, name) for name in ("model", "draft", "dtype", "kv_bits", "seed")}
    found = {**facts, "blas": blas.path, **report.as_json()}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    shorter = {name: value for name, value in found.items() if name != "differences"}
    print(f"\n{json.dumps(shorter, indent=1)}", *report.differences, sep="\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
