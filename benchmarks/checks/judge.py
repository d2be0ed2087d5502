"""Two answers to one request: are they the same, and where they are not, may rounding have made the
difference?
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.benchmarks.checks.reference import Reference
from openelm_mlx.benchmarks.checks.trials import Answer, Request
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine, parameters
from openelm_mlx.model.cache_kinds import CacheKind, Quantized

TIE = 1e-5  # two scores of float32 that lie so near may change places
ROUNDED = {
    8: 1e-2
}  # the same with quantized keys and values, by their bits; of others only the rate is told
STRICT = {
    "not streamed",
    "alone again",
    "a batch of one",
    "the same batch again",
}  # compute in the same order as what they repeat


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
            f"{'rounding' if self.allowed else 'WRONG'}: {self.way}, token {self.place} is {self.tokens[1]}, alone "
            f"{self.tokens[0]}; scores {self.gap:.2e} apart; {self.kind}; {self.request}"
        )


@dataclass
class Report:
    trials: int = 0
    compared: Counter[str] = field(default_factory=Counter)  # answers, by way
    tokens: Counter[str] = field(default_factory=Counter)  # compared, up to the first that differs
    differences: list[Difference] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    checked: int = 0  # tokens of answers alone that were held against the independent pass
    farthest: float = (
        0.0  # score of the likeliest token less that of the drawn one, the largest seen
    )

    @property
    def failures(self) -> list[str]:
        return [*self.errors, *(str(found) for found in self.differences if not found.allowed)]

    def as_json(self) -> dict[str, Any]:
        rates = {
            way: sum(found.way == way for found in self.differences) / max(count, 1)
            for way, count in self.tokens.items()
        }
        return {
            "trials": self.trials,
            "compared": dict(self.compared),
            "tokens": dict(self.tokens),
            "rate_of_differing_tokens": rates,
            "largest_gap": max((found.gap for found in self.differences), default=0.0),
            "checked_tokens": self.checked,
            "farthest_from_reference": self.farthest,
            "differences": [vars(found) for found in self.differences],
            "failures": self.failures,
        }


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

    def compare(
        self, way: str, request: Request, kind: CacheKind, one: Answer, other: Answer
    ) -> None:
        """Take note of where `other` differs from `one`."""
        self.report.compared[way] += 1
        place = first_difference(one, other)
        compared = min(len(one.tokens), len(other.tokens))
        self.report.tokens[way] += compared if place is None else place + 1
        if place is None:
            if one.reason and other.reason and (one.text, one.reason) != (other.text, other.reason):
                self.report.errors.append(
                    f"{way}: the same tokens, but {one.reason} {one.text!r} alone and {other.reason} "
                    f"{other.text!r}; {request}"
                )
            return
        ours, theirs = (
            answer.tokens[place] if place < len(answer.tokens) else None for answer in (one, other)
        )
        gap, allowed = float("inf"), False
        if ours is not None and theirs is not None:
            gap, allowed = self.weigh(request, kind, one.tokens[:place], (ours, theirs))
        allowed = allowed and (self.exact_for(kind) or way not in STRICT)
        self.report.differences.append(
            Difference(way, place, (ours, theirs), gap, allowed, str(request), str(kind))
        )

    def exact_for(self, kind: CacheKind) -> bool:
        return self.exact and not isinstance(kind.store, Quantized)

    def weigh(
        self, request: Request, kind: CacheKind, answer: list[int], tokens: tuple[int, int]
    ) -> tuple[float, bool]:
        """How far the scores of two tokens are apart, and whether rounding may turn them."""
        logits = self.reference.logits(request.prompt + answer, kind)[-1]
        scores = self.reference.scores(logits, request.sampling, request.prompt, answer)
        gap = float(abs(scores[tokens[0]] - scores[tokens[1]]))
        tolerance = (
            TIE
            if self.exact_for(kind)
            else ROUNDED.get(getattr(kind.store, "bits", 0))
            if self.exact
            else None
        )
        if tolerance is None:
            return gap, True
        return gap, self.reference.plausible(
            logits, request.sampling, request.prompt, answer, tokens, tolerance
        )

    def check(self, request: Request, kind: CacheKind, answer: Answer) -> None:
        """Hold every token of an answer against the independent pass."""
        start = len(request.prompt)
        logits = self.reference.logits(request.prompt + answer.tokens[:-1], kind)[start - 1 :]
        for place, (token, row) in enumerate(zip(answer.tokens, logits, strict=True)):
            scores = self.reference.scores(
                row, request.sampling, request.prompt, answer.tokens[:place]
            )
            behind = float(scores.max() - scores[token])
            self.report.checked += 1
            tolerance = 1e-4 if self.exact_for(kind) else 0.1
            pair = (token, int(scores.argmax()))
            if behind <= tolerance:
                self.report.farthest = max(self.report.farthest, behind)
            elif not self.reference.plausible(
                row, request.sampling, request.prompt, answer.tokens[:place], pair, tolerance
            ):
                self.report.errors.append(
                    f"against the independent pass: token {place} is {token}, {behind:.2e} behind "
                    f"{pair[1]}; {kind}; {request}"
                )
                return


def floats(engine: Engine) -> Iterator[tuple[str, mx.array]]:

    return (
        (name, a)
        for name, a in parameters(engine.model).items()
        if mx.issubdtype(a.dtype, mx.floating)
    )


def first_difference(one: Answer, other: Answer) -> int | None:
    """The place of the first token that differs; None where there is none, as far as a cancelled
    answer came.
    """
    for place, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return place
    if one.reason is None or other.reason is None or len(one.tokens) == len(other.tokens):
        return None
    return min(len(one.tokens), len(other.tokens))
