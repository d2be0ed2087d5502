"""Is a request's answer the same however it is run?

    python -m openelm_mlx.benchmarks.equality [MODEL] [--draft MODEL] [--trials N] [--kv-bits 8] [--dtype float16] [--json FILE]

A trial is a random request: options, seed, lengths, kind of cache. Its answer when it runs alone is compared with those of
other ways: not streamed, on the eager twin, in other chunks, with a reused prefix, in a batch whose rows come and go, with
a draft model, with prompt lookup, with both, with both in a batch. Where two answers part, scores of an independent pass
(reference.py) decide: a rounding error may turn a tie, nothing else may. Without MODEL, models of random weights are made.

With quantized keys and values or half types, another order of computing may round otherwise. What computes in the same
order must still be equal; of the rest, the rate of differing tokens and the gaps between their scores are reported.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openelm_mlx.blas import load_blas

load_blas()  # takes effect only before MLX is imported

import mlx.core as mx  # noqa: E402
from openelm_mlx.benchmarks.reference import Reference  # noqa: E402
from openelm_mlx.benchmarks.weights import small_engine  # noqa: E402

from openelm_mlx import BatchEngine, PromptCache, batch_generate, generate, load, stream_generate  # noqa: E402
from openelm_mlx.drafts import ModelDraft  # noqa: E402
from openelm_mlx.kv import CacheKind, Quantized  # noqa: E402
from openelm_mlx.loading import DTYPES, Engine  # noqa: E402
from openelm_mlx.options import EngineOptions, GenerationOptions, SamplingOptions  # noqa: E402

TIE = 1e-5  # two scores of float32 that lie so near may change places
ROUNDED = {8: 1e-2}  # the same with quantized keys and values, by their bits; of others only the rate is told
RENEW = 100  # trials after which models of random weights are made anew

# Which options are on, few sets, as each is a step to compile; their values are random.
SHAPES: tuple[tuple[str, ...], ...] = (
    (),
    ("temperature",),
    ("temperature", "top_p"),
    ("temperature", "top_k", "top_p", "repetition_penalty"),
    ("temperature", "min_p", "xtc_probability", "xtc_threshold"),
    ("repetition_penalty", "penalty_window"),
    ("temperature", "presence_penalty", "frequency_penalty", "penalty_window"),
    ("temperature", "logit_bias"),
    ("presence_penalty", "logit_bias"),
    ("temperature", "top_k", "top_p", "min_p", "xtc_probability", "repetition_penalty", "frequency_penalty", "penalty_window",
     "logit_bias"),
)  # fmt: skip
LAYOUTS: tuple[dict[str, int], ...] = ({}, {}, {"kv_window": 24, "kv_keep": 4}, {"kv_window": 100, "kv_keep": 2})
STRICT = {"not streamed", "alone again", "a batch of one", "the same batch again"}  # compute in the same order as what they repeat


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    sampling: SamplingOptions
    options: GenerationOptions


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    reason: str | None  # None: it was cancelled, and is compared as far as it came


@dataclass(frozen=True)
class Difference:
    """Two answers to one request, and whether rounding explains them."""

    way: str
    place: int  # of the first token that differs
    tokens: tuple[int | None, int | None]
    gap: float  # between the scores of the two
    allowed: bool
    request: str
    kind: str

    def __str__(self) -> str:
        return (f"{'rounding' if self.allowed else 'WRONG'}: {self.way}, token {self.place} is {self.tokens[1]}, alone "
                f"{self.tokens[0]}; scores {self.gap:.2e} apart; {self.kind}; {self.request}")  # fmt: skip


@dataclass
class Report:
    trials: int = 0
    compared: Counter[str] = field(default_factory=Counter)  # answers, by way
    tokens: Counter[str] = field(default_factory=Counter)  # compared, up to the first that differs
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    checked: int = 0  # tokens of answers alone that were held against the independent pass
    farthest: float = 0.0  # score of the likeliest token less that of the drawn one, the largest seen

    @property
    def failures(self) -> list[str]:
        return [*self.errors, *(str(found) for found in self.differences if not found.allowed)]

    def as_json(self) -> dict[str, Any]:
        rates = {way: sum(found.way == way for found in self.differences) / max(count, 1) for way, count in self.tokens.items()}
        return {
            "trials": self.trials, "compared": dict(self.compared), "tokens": dict(self.tokens), "rate_of_differing_tokens": rates,
            "largest_gap": max((found.gap for found in self.differences), default=0.0), "checked_tokens": self.checked,
            "farthest_from_reference": self.farthest, "differences": [vars(found) for found in self.differences],
            "failures": self.failures,
        }  # fmt: skip


class Judge:
    """Compares answers of one engine."""

    def __init__(self, engine: Engine, report: Report) -> None:
        self.engine, self.report = engine, report
        self._reference: Reference | None = None
        self.exact = all(a.dtype == mx.float32 for _, a in floats(engine))

    @property
    def reference(self) -> Reference:
        self._reference = self._reference or Reference(self.engine)
        return self._reference

    def compare(self, way: str, request: Request, kind: CacheKind, one: Answer, other: Answer) -> None:
        """Take note of where `other` differs from `one`."""
        self.report.compared[way] += 1
        place = first_difference(one, other)
        self.report.tokens[way] += len(one.tokens) if place is None else place + 1
        if place is None:
            if one.reason and other.reason and (one.text, one.reason) != (other.text, other.reason):
                self.report.errors.append(f"{way}: the same tokens, but {one.reason} {one.text!r} alone and {other.reason} "
                                          f"{other.text!r}; {request}")  # fmt: skip
            return
        ours, theirs = (answer.tokens[place] if place < len(answer.tokens) else None for answer in (one, other))
        gap, allowed = float("inf"), False
        if ours is not None and theirs is not None:
            gap, allowed = self.weigh(request, kind, one.tokens[:place], (ours, theirs))
        allowed = allowed and (self.exact_for(kind) or way not in STRICT)
        self.report.differences.append(Difference(way, place, (ours, theirs), gap, allowed, str(request), str(kind)))

    def exact_for(self, kind: CacheKind) -> bool:
        return self.exact and not isinstance(kind.store, Quantized)

    def weigh(self, request: Request, kind: CacheKind, answer: list[int], tokens: tuple[int, int]) -> tuple[float, bool]:
        """How far the scores of two tokens are apart, and whether rounding may turn them."""
        logits = self.reference.logits(request.prompt + answer, kind)[-1]
        scores = self.reference.scores(logits, request.sampling, request.prompt, answer)
        gap = float(abs(scores[tokens[0]] - scores[tokens[1]]))
        tolerance = TIE if self.exact_for(kind) else ROUNDED.get(getattr(kind.store, "bits", 0)) if self.exact else None
        if tolerance is None:
            return gap, True
        return gap, self.reference.plausible(logits, request.sampling, request.prompt, answer, tokens, tolerance)

    def check(self, request: Request, kind: CacheKind, answer: Answer) -> None:
        """Hold every token of an answer against the independent pass."""
        start = len(request.prompt)
        logits = self.reference.logits(request.prompt + answer.tokens[:-1], kind)[start - 1 :]
        for place, (token, row) in enumerate(zip(answer.tokens, logits, strict=True)):
            scores = self.reference.scores(row, request.sampling, request.prompt, answer.tokens[:place])
            behind = float(scores.max() - scores[token])
            self.report.checked += 1
            tolerance = 1e-4 if self.exact_for(kind) else 0.1
            pair = (token, int(scores.argmax()))
            if behind <= tolerance:
                self.report.farthest = max(self.report.farthest, behind)
            elif not self.reference.plausible(row, request.sampling, request.prompt, answer.tokens[:place], pair, tolerance):
                self.report.errors.append(f"against the independent pass: token {place} is {token}, {behind:.2e} behind "
                                          f"{pair[1]}; {kind}; {request}")  # fmt: skip
                return


def floats(engine: Engine) -> Iterator[tuple[str, mx.array]]:
    from openelm_mlx.loading import parameters

    return ((name, a) for name, a in parameters(engine.model).items() if mx.issubdtype(a.dtype, mx.floating))


def first_difference(one: Answer, other: Answer) -> int | None:
    """The place of the first token that differs; None where there is none, as far as a cancelled answer came."""
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return place
    if one.reason is None or other.reason is None or len(one.tokens) == len(other.tokens):
        return None
    return min(len(one.tokens), len(other.tokens))


class Maker:
    """Draws requests for an engine."""

    def __init__(self, engine: Engine, rng: random.Random, most: int = 32) -> None:
        self.engine, self.random, self.most = engine, rng, most
        self.context = engine.config.max_context_length
        self.shared = [self.ids(self.context // 2) for _ in range(3)]  # texts that several prompts begin with

    def ids(self, count: int) -> list[int]:
        return [1, *(self.random.randrange(3, self.engine.vocab) for _ in range(count - 1))]

    def prompt(self) -> list[int]:
        """Of one token, around the borders of blocks, up to a full context; new, shared, or one that quotes itself."""
        pick = self.random.choice
        count = pick((1, 2, *(self.random.randint(3, 60) for _ in range(6)), pick((63, 64, 65, 127, 128, 129)),
                      pick((240, 255, 256, 257)), self.context - self.random.randint(0, self.most)))  # fmt: skip
        count = min(count, self.context)
        if self.random.random() < 0.3:
            words = self.ids(self.random.randint(2, 12))
            return (words * (count // len(words) + 1))[:count]
        if self.random.random() < 0.5:
            return (pick(self.shared)[: self.random.randint(1, count)] + self.ids(count))[:count]
        return self.ids(count)

    def sampling(self) -> SamplingOptions:
        between, vocab = self.random.uniform, self.engine.vocab
        values: dict[str, Callable[[], Any]] = {
            "temperature": lambda: between(0.2, 1.5), "top_k": lambda: self.random.randint(1, 50),
            "top_p": lambda: between(0.3, 0.98), "min_p": lambda: between(0.01, 0.3),
            "xtc_probability": lambda: between(0.2, 1.0), "xtc_threshold": lambda: between(0.02, 0.4),
            "repetition_penalty": lambda: between(1.05, 1.6), "presence_penalty": lambda: between(-0.5, 1.0),
            "frequency_penalty": lambda: between(-0.3, 0.6), "penalty_window": lambda: self.random.randint(1, 70),
            "logit_bias": lambda: {self.random.randrange(vocab): between(-8, 4) for _ in range(self.random.randint(1, 5))},
        }  # fmt: skip
        chosen = {name: values[name]() for name in self.random.choice(SHAPES)}
        return SamplingOptions(**chosen, seed=self.random.randrange(2**40), stream=self.random.choice((0, 0, 1, 7)))

    def options(self) -> GenerationOptions:
        stop_tokens = (self.random.randrange(self.engine.vocab),) if self.random.random() < 0.2 else ()
        return GenerationOptions(max_tokens=self.random.choice((1, 2, 8, self.most)), ignore_eos=self.random.random() < 0.8,
                                 stop_tokens=stop_tokens, logprobs=self.random.choice((None, None, None, 0, 2)))  # fmt: skip

    def request(self) -> Request:
        return Request(self.prompt(), self.sampling(), self.options())

    def engine_options(self, kv_bits: int | None) -> EngineOptions:
        return EngineOptions(prefill_chunk=self.chunk(), compiled=self.random.random() < 0.3, kv_bits=kv_bits,
                             **self.random.choice(LAYOUTS))  # fmt: skip

    def chunk(self) -> int:
        return self.random.choice((1, 7, 16, 64, 100, 256, 512))


def alone(engine: Engine, request: Request, how: EngineOptions, cancel_after: int | None = None, **settings: Any) -> Answer:
    """The request through `stream_generate`; `settings` are its keywords."""
    tokens: list[int] = []
    text, reason = "", None
    with closing(
        stream_generate(engine, request.prompt, request.sampling, request.options, engine_options=how, **settings)
    ) as events:
        for event in events:
            text, reason = text + event.text, event.finish_reason
            tokens += [] if event.token is None else [event.token]
            if len(tokens) == cancel_after:
                break
    return Answer(tokens, text, reason)


def together(engine: Engine, requests: list[Request], how: EngineOptions, rng: random.Random, lookup: bool = False,
             **settings: Any) -> list[Answer]:  # fmt: skip
    """The requests through one `BatchEngine`: they join while others run, strangers come and go, some are cancelled."""
    batch = BatchEngine(engine, slots=rng.randint(1, 8), options=how, **settings)
    maker, waiting = Maker(engine, rng, 8), [*enumerate(requests)]
    waiting += [(-1, maker.request()) for _ in range(rng.randint(0, 3))]
    rng.shuffle(waiting)
    numbers: dict[int, int] = {}
    found = [Answer([], "", None) for _ in requests]
    ends = [rng.randint(0, 12) if rng.random() < 0.15 else None for _ in requests]
    try:
        while batch.busy or waiting:
            while waiting and rng.random() < 0.4:
                place, request = waiting.pop()
                drafting = {"prompt_lookup": rng.randint(1, 3)} if lookup and rng.random() < 0.7 else {}
                number = batch.submit(request.prompt, request.sampling, request.options, **drafting)
                numbers[number] = place
            for number, event in batch.step():
                place = numbers[number]
                if place >= 0:
                    tokens = found[place].tokens + ([] if event.token is None else [event.token])
                    found[place] = Answer(tokens, found[place].text + event.text, event.finish_reason)
                if rng.random() < 0.1 if place < 0 else len(found[place].tokens) == ends[place]:
                    batch.cancel(number)
    finally:
        batch.close()
    return found


class Group:
    """Requests under the same options of the engine, run in every way there is."""

    def __init__(self, judge: Judge, maker: Maker, draft: Engine | ModelDraft | None, how: EngineOptions, count: int) -> None:
        self.judge, self.maker, self.draft, self.how = judge, maker, draft, how
        self.engine, self.random = judge.engine, maker.random
        self.requests = [maker.request() for _ in range(count)]
        self.kind = CacheKind.of(self.engine.config, how)
        self.base = [alone(self.engine, request, how) for request in self.requests]

    def run(self, check: float) -> None:
        """Compare all ways; a share `check` of the answers alone is held against the independent pass, too."""
        for request, answer in zip(self.requests, self.base, strict=True):
            if self.random.random() < check:
                self.judge.check(request, self.kind, answer)
            for way, other in self.one_by_one(request):
                self.judge.compare(way, request, self.kind, answer, other)
        seed, drafted = self.random.random(), {"draft": self.draft} if self.draft else {}
        first = self.batch("a batch", seed)
        self.batch("the same batch again", seed, first)
        self.batch("a batch with drafts and reuse", seed + 1, lookup=True, prompt_cache=PromptCache(), **drafted)

    def batch(self, way: str, seed: float, compared: list[Answer] | None = None, **settings: Any) -> list[Answer]:
        found = together(self.engine, self.requests, self.how, random.Random(seed), **settings)
        for request, one, other in zip(self.requests, compared or self.base, found, strict=True):
            self.judge.compare(way, request, self.kind, one, other)
        return found

    def one_by_one(self, request: Request) -> Iterator[tuple[str, Answer]]:
        engine, how, options = self.engine, self.how, self.how.__dict__
        whole = alone(engine, request, how)
        yield "alone again", whole
        text = generate(engine, request.prompt, request.sampling, request.options, engine_options=how)
        yield "not streamed", Answer(whole.tokens, text, whole.reason)
        result = batch_generate(engine, [request.prompt], request.sampling, request.options, engine_options=how)[0]
        yield "a batch of one", Answer(list(result.tokens), result.text, result.finish_reason)
        yield "compiled or eager", alone(engine, request, EngineOptions(**options | {"compiled": not how.compiled}))
        yield "other chunks", alone(engine, request, EngineOptions(**options | {"prefill_chunk": self.maker.chunk()}))
        yield from (("a reused prefix", answer) for answer in self.reused(request))
        lookup = {"prompt_lookup": self.random.randint(1, 3), "draft_tokens": self.random.randint(1, 9),
                  "adaptive_draft": self.random.random() < 0.5}  # fmt: skip
        yield "prompt lookup", alone(engine, request, how, **lookup)
        if self.draft:
            lengths = {name: value for name, value in lookup.items() if name != "prompt_lookup"}
            yield "a draft model", alone(engine, request, how, draft=self.draft, **lengths)
            yield "both drafts", alone(engine, request, how, draft=self.draft, **lookup)

    def reused(self, request: Request) -> Iterator[Answer]:
        """After another text with the same beginning, perhaps left midway; then after itself."""
        cache, maker = PromptCache(), self.maker
        shared = request.prompt[: self.random.randint(1, len(request.prompt))]
        other = Request((shared + maker.ids(20))[: maker.context], maker.sampling(), maker.options())
        alone(self.engine, other, self.how, self.random.choice((None, 1, 3)), prompt_cache=cache)
        for _ in range(2):
            yield alone(self.engine, request, self.how, prompt_cache=cache)


def run(
    engines: Callable[[int], tuple[Engine, Engine | None]], trials: int, seed: int = 0, kv_bits: int | None = None,
    check: float = 0.05, tick: Callable[[Report], None] = lambda report: None,
) -> Report:  # fmt: skip
    """Run `trials` requests in every way. `engines` gives a model and its draft, by the number of trials done."""
    rng, report = random.Random(seed), Report()
    engine: Engine | None = None
    while report.trials < trials:
        made, draft = engines(report.trials)
        if made is not engine:
            engine, judge, maker = made, Judge(made, report), Maker(made, rng)
            drafter = ModelDraft(made, draft) if draft else None
        count = min(rng.randint(1, 6), trials - report.trials)
        group = Group(judge, maker, rng.choice((drafter, draft)), maker.engine_options(kv_bits), count)
        group.run(check)
        report.trials += count
        tick(report)
    return report


def opened(name: str | None, draft: str | None, dtype: str) -> Callable[[int], tuple[Engine, Engine | None]]:
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
                made = small_engine(tokenizer_of, number, dtype=DTYPES[dtype])
                held[number] = made, small_engine(tokenizer_of, number, dtype=DTYPES[dtype], noise=0.3)
        return held[number]

    return give


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="equality", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name, folder or file; default: random weights")
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model with the same tokenizer")
    parser.add_argument("--trials", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="quantized keys and values")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="default: float32")
    parser.add_argument("--check", type=float, default=0.05, metavar="SHARE",
                        help="of the answers alone, held against the independent pass (default: 0.05)")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    start, said = time.monotonic(), 0

    def tick(report: Report) -> None:
        nonlocal said
        print(f"\r{report.trials} of {args.trials} trials, {sum(report.compared.values())} answers compared, "
              f"{len(report.differences)} differ, {len(report.failures)} wrong, {time.monotonic() - start:.0f} s",
              end="", file=sys.stderr, flush=True)  # fmt: skip
        for failure in report.failures[said:]:
            print(f"\n{failure}", flush=True)
        said = len(report.failures)

    report = run(opened(args.model, args.draft, args.dtype), args.trials, args.seed, args.kv_bits, args.check, tick)
    found = {"model": args.model, "draft": args.draft, "dtype": args.dtype, "kv_bits": args.kv_bits, "seed": args.seed,
             "blas": load_blas().path, **report.as_json()}  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n" + json.dumps({name: value for name, value in found.items() if name != "differences"}, indent=1))
    for difference in report.differences:
        print(difference)
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
