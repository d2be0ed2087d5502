"""Is a request's answer the same however it is run?

    python -m equality [MODEL] [--draft MODEL] [--trials N] [--kv-bits 8] [--dtype float16] [--json FILE]

A trial is a random request: options, seed, lengths, kind of cache. Its answer when it runs alone is
compared with those of other ways: not streamed, on the eager twin, in other chunks, with a reused
prefix, in a batch whose rows come and go, with a draft model, with prompt lookup, with both, with
both in a batch. Where two answers part, scores of an independent pass (reference.py) decide: a
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openelm_mlx import PromptCache, batch_generate, generate, load
from openelm_mlx.benchmarks.checks.judge import Judge, Report
from openelm_mlx.benchmarks.checks.trials import (
    Answer,
    Maker,
    Request,
    alone,
    random_engine,
    together,
)
from openelm_mlx.device import blas
from openelm_mlx.dtypes import DTYPES, FLOATS
from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.model.cache_kinds import CacheKind

RENEW = 100  # trials after which models of random weights are made anew


class Parrot:
    """Drafts what is known to come, with a wrong token now and then: drafts of every length are
    kept in part.
    """

    def __init__(self, texts: list[list[int]], rng: random.Random) -> None:
        self.texts, self.random = texts, rng

    def propose(self, known: list[int], length: int) -> list[int]:
        for text in self.texts:
            if text[: len(known)] == known:
                coming = text[len(known) : len(known) + self.random.randint(0, length)]
                return [
                    self.random.choice(text) if self.random.random() < 0.2 else t for t in coming
                ]
        return [self.random.choice(known) for _ in range(self.random.randint(0, length))]


class Group:
    """Requests under the same options of the engine, run in every way there is."""

    def __init__(
        self,
        judge: Judge,
        maker: Maker,
        draft: Engine | ModelDraft | None,
        how: EngineOptions,
        count: int,
    ) -> None:
        self.judge, self.maker, self.draft, self.how = judge, maker, draft, how
        self.engine, self.random = judge.engine, maker.random
        self.requests = [maker.request() for _ in range(count)]
        self.kind = CacheKind.of(self.engine.config, how)
        self.base = [alone(self.engine, request, how) for request in self.requests]
        texts = [r.prompt + a.tokens for r, a in zip(self.requests, self.base, strict=True)]
        self.parrot = Parrot(texts, self.random)

    def run(self, check: float) -> None:
        """Compare all ways; a share `check` of the answers alone is held against the independent
        pass, too.
        """
        for request, answer in zip(self.requests, self.base, strict=True):
            if self.random.random() < check:
                self.judge.check(request, self.kind, answer)
            for way, other in self.one_by_one(request):
                self.judge.compare(way, request, self.kind, answer, other)
        seed, draft = self.random.random(), self.random.choice((self.draft, self.parrot))
        first = self.batch("a batch", seed)
        self.batch("the same batch again", seed, first)
        self.batch(
            "a batch with drafts and reuse",
            seed + 1,
            lookup=True,
            prompt_cache=PromptCache(),
            draft=draft,
        )

    def batch(
        self, way: str, seed: float, compared: list[Answer] | None = None, **settings: Any
    ) -> list[Answer]:
        found = together(self.engine, self.requests, self.how, random.Random(seed), **settings)
        for request, one, other in zip(self.requests, compared or self.base, found, strict=True):
            self.judge.compare(way, request, self.kind, one, other)
        return found

    def one_by_one(self, request: Request) -> Iterator[tuple[str, Answer]]:
        engine, how, options = self.engine, self.how, self.how.__dict__
        whole = alone(engine, request, how)
        yield "alone again", whole
        text = generate(
            engine, request.prompt, request.sampling, request.options, engine_options=how
        )
        yield "not streamed", Answer(whole.tokens, text, whole.reason)
        result = batch_generate(
            engine, [request.prompt], request.sampling, request.options, engine_options=how
        )[0]
        yield "a batch of one", Answer(list(result.tokens), result.text, result.finish_reason)
        yield (
            "compiled or eager",
            alone(engine, request, EngineOptions(**options | {"compiled": not how.compiled})),
        )
        chunk = self.random.randint(max(1, len(request.prompt) // 20), len(request.prompt))
        yield (
            "other chunks",
            alone(engine, request, EngineOptions(**options | {"prefill_chunk": chunk})),
        )
        yield from (("a reused prefix", answer) for answer in self.reused(request))
        lookup = {
            "prompt_lookup": self.random.randint(1, 3),
            "draft_tokens": self.random.randint(1, 9),
            "adaptive_draft": self.random.random() < 0.5,
        }
        yield "prompt lookup", alone(engine, request, how, **lookup)
        lengths = {name: value for name, value in lookup.items() if name != "prompt_lookup"}
        yield "drafts nearly right", alone(engine, request, how, draft=self.parrot, **lengths)
        if self.draft:
            yield "a draft model", alone(engine, request, how, draft=self.draft, **lengths)
            yield "both drafts", alone(engine, request, how, draft=self.draft, **lookup)

    def reused(self, request: Request) -> Iterator[Answer]:
        """After another text with the same beginning, perhaps left midway; then after itself."""
        cache, maker = PromptCache(), self.maker
        shared = request.prompt[: self.random.randint(1, len(request.prompt))]
        other = Request(
            (shared + maker.ids(20))[: maker.context], maker.sampling(), maker.options()
        )
        alone(self.engine, other, self.how, self.random.choice((None, 1, 3)), prompt_cache=cache)
        for _ in range(2):
            yield alone(self.engine, request, self.how, prompt_cache=cache)


def run(
    engines: Callable[[int], tuple[Engine, Engine | None]],
    trials: int,
    seed: int = 0,
    kv_bits: int | None = None,
    check: float = 0.05,
    tick: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run `trials` requests in every way. `engines` gives a model and its draft, by the number of
    trials done.
    """
    rng, report = random.Random(seed), Report()
    engine: Engine | None = None
    while report.trials < trials:
        made, draft = engines(report.trials)
        if made is not engine:
            engine, judge, maker = made, Judge(made, report), Maker(made, rng)
            drafter = ModelDraft(made, draft) if draft else None
        count = min(rng.randint(1, 6), trials - report.trials)
        group = Group(
            judge, maker, rng.choice((drafter, draft)), maker.engine_options(kv_bits), count
        )
        group.run(check)
        report.trials += count
        tick(report)
    return report


def opened(
    name: str | None, draft: str | None, dtype: str
) -> Callable[[int], tuple[Engine, Engine | None]]:
    """What `run` asks for models."""
    tokenizer_of = load("openelm-tiny")
    held: dict[int, tuple[Engine, Engine | None]] = {}

    def give(done: int) -> tuple[Engine, Engine | None]:
        number = 0 if name else done // RENEW
        if number not in held:
            held.clear()
            if name:
                held[0] = load(name, dtype), load(draft, dtype) if draft else None
            else:
                made = random_engine(tokenizer_of, number, dtype=DTYPES[dtype].mlx)
                held[number] = (
                    made,
                    random_engine(tokenizer_of, number, dtype=DTYPES[dtype].mlx, noise=0.3),
                )
        return held[number]

    return give


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="equality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a name, folder or file; default: random weights")
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model with the same tokenizer")
    parser.add_argument("--trials", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="quantized keys and values")
    parser.add_argument(
        "--dtype", choices=sorted(FLOATS), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--check",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the answers alone, held against the independent pass (default: 0.05)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    start, said = time.monotonic(), 0

    def tick(report: Report) -> None:
        nonlocal said
        print(
            f"\r{report.trials} of {args.trials} trials, {sum(report.compared.values())} answers compared, "
            f"{len(report.differences)} differ, {len(report.failures)} wrong, {time.monotonic() - start:.0f} s",
            end="",
            file=sys.stderr,
            flush=True,
        )
        for failure in report.failures[said:]:
            print(f"\n{failure}", flush=True)
        said = len(report.failures)

    report = run(
        opened(args.model, args.draft, args.dtype),
        args.trials,
        args.seed,
        args.kv_bits,
        args.check,
        tick,
    )
    found = {
        "model": args.model,
        "draft": args.draft,
        "dtype": args.dtype,
        "kv_bits": args.kv_bits,
        "seed": args.seed,
        "blas": blas.path,
        **report.as_json(),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(
        "\n"
        + json.dumps(
            {name: value for name, value in found.items() if name != "differences"}, indent=1
        )
    )
    for difference in report.differences:
        print(difference)
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
