"""Compare two answers to one request: where they differ, can rounding have made the difference?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any

from openelm_mlx.benchmarks.checks.reference import Reference
from openelm_mlx.benchmarks.checks.trials import Answer, Request
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.model.cache_kinds import CacheKind, Quantized
from openelm_mlx.model.decoder import parameters

TIE = 1e-5  # two scores of float32 that are so near may change places
TIE_8_BITS = (
    1e-2  # the same with keys and values in 8 bits; of other kinds only the rate is reported
)
BEHIND, BEHIND_ROUNDED = 1e-4, 0.1  # how far a drawn token may be from the likeliest one
# these ways compute in the same order as what they repeat
STRICT = {"not streamed", "alone again", "a batch of one", "the same batch again"}


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
        return (
            f"{'rounding' if self.allowed else 'WRONG'}: {self.way}, token {self.place} is "
            f"{self.tokens[1]}, alone {self.tokens[0]}; scores {self.gap:.2e} apart; {self.kind}; "
            f"{self.request}"
        )


@dataclass
class Report:
    """What was compared, and what differed."""

    trials: int = 0
    compared: Counter[str] = field(default_factory=Counter)  # answers, by way
    tokens: Counter[str] = field(default_factory=Counter)  # compared, up to the first that differs
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    checked: int = 0  # tokens of answers alone that were compared with the independent pass
    farthest: float = 0.0  # the largest score of a likeliest token less that of the drawn one

    @property
    def failures(self) -> list[str]:
        return [*self.errors, *(str(found) for found in self.differences if not found.allowed)]

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


class Judge:
    """Compare answers of one engine, and keep a report."""

    def __init__(self, engine: Engine, report: Report) -> None:
        self.engine, self.report = engine, report
        dtypes = {array.dtype for array in parameters(engine.model).values()}
        self.float32 = not dtypes & {mx.float16, mx.bfloat16}

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.engine)

    def exact(self, kind: CacheKind) -> bool:
        """Tell whether all is computed in float32, so that only ties may change places."""
        return self.float32 and not isinstance(kind.store, Quantized)

    def compare(
        self, way: str, request: Request, kind: CacheKind, one: Answer, other: Answer
    ) -> None:
        """Report where `other` differs from `one`."""
        self.report.compared[way] += 1
        place = first_difference(one, other)
        compared = min(len(one.tokens), len(other.tokens))
        self.report.tokens[way] += compared if place is None else place + 1
        if place is None:
            if one.reason and other.reason and (one.text, one.reason) != (other.text, other.reason):
                self.report.errors.append(
                    f"{way}: the same tokens, but {one.reason} {one.text!r} alone and "
                    f"{other.reason} {other.text!r}; {request}"
                )
            return
        ours, theirs = ((*answer.tokens, None)[place] for answer in (one, other))
        gap, allowed = inf, False
        if ours is not None and theirs is not None:
            gap, allowed = self.weigh(request, kind, one.tokens[:place], (ours, theirs))
        allowed = allowed and (self.exact(kind) or way not in STRICT)
        self.report.differences.append(
            Difference(way, place, (ours, theirs), gap, allowed, str(request), str(kind))
        )

    def weigh(
        self, request: Request, kind: CacheKind, answer: list[int], tokens: tuple[int, int]
    ) -> tuple[float, bool]:
        """Return how far the scores of two tokens are apart, and whether rounding may swap them."""
        logits = self.reference.logits(request.prompt + answer, kind)[-1]
        scores = self.reference.scores(logits, request, answer)
        gap = float(abs(scores[tokens[0]] - scores[tokens[1]]))
        in_8_bits = isinstance(kind.store, Quantized) and kind.store.bits == 8
        if self.exact(kind) or (self.float32 and in_8_bits):
            tolerance = TIE if self.exact(kind) else TIE_8_BITS
            return gap, self.reference.plausible(logits, request, answer, tokens, tolerance)
        return gap, True

    def check(self, request: Request, kind: CacheKind, answer: Answer) -> None:
        """Compare every token of an answer with the independent pass."""
        start = len(request.prompt)
        logits = self.reference.logits(request.prompt + answer.tokens[:-1], kind)[start - 1 :]
        tolerance = BEHIND if self.exact(kind) else BEHIND_ROUNDED
        for place, (token, row) in enumerate(zip(answer.tokens, logits, strict=True)):
            before = answer.tokens[:place]
            scores = self.reference.scores(row, request, before)
            behind, likeliest = float(scores.max() - scores[token]), int(scores.argmax())
            self.report.checked += 1
            if behind <= tolerance:
                self.report.farthest = max(self.report.farthest, behind)
                continue
            pair = (token, likeliest)
            if not self.reference.plausible(row, request, before, pair, tolerance):
                self.report.errors.append(
                    f"against the independent pass: token {place} is {token}, {behind:.2e} behind "
                    f"{likeliest}; {kind}; {request}"
                )
                return


def first_difference(one: Answer, other: Answer) -> int | None:
    """Return the place of the first token that differs, as far as a cancelled answer came."""
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return place
    if one.reason is None or other.reason is None or len(one.tokens) == len(other.tokens):
        return None
    return min(len(one.tokens), len(other.tokens))
