"""Trials: each case warmed up once, then measured round by round, so that drift hits all that is
compared alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.benchmarks.measure.machine import trial_notes
from openelm_mlx.benchmarks.measure.suites import MIN_TRIALS
from openelm_mlx.benchmarks.measure.timing import Session, Timed
from openelm_mlx.benchmarks.results.document import METRICS, Case, Metric, Ratio, Row
from openelm_mlx.benchmarks.results.statistics import paired_ratio
from openelm_mlx.errors import BenchmarkError, OpenELMError

RATIOS = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds")

UNSTEADY = "not the same tokens in every trial"

Tick = Callable[
    [str, float], None
]  # what is being run, and how much of the work (in tokens) has been done with it


@dataclass
class Entry:
    """A case on its way to becoming a row."""

    case: Case
    session: Session
    prompt: list[int]
    against: Entry | None = None  # the entry of our engine that this peer must agree with
    warm: Timed | None = None
    values: dict[str, list[float]] = field(default_factory=dict)  # metric -> one value a trial
    parts_at: int | None = None
    failed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def work(self) -> float:
        """Tokens of one trial, a prompt's counted at an eighth: only their proportions matter, for
        the estimate.
        """
        return self.case.batch_size * (self.case.prompt_tokens / 8 + self.case.generation_tokens)

    @property
    def timed(self) -> bool:
        """Whether this entry may be timed: a peer may, once its tokens are ours."""
        return self.warm is not None and self.parts_at is None


def measure(entries: Sequence[Entry], trials: int, tick: Tick) -> None:
    """Warm up and check every entry, then run `trials` rounds; the values land in the entries.

    An interrupt (Ctrl-C) passes through and leaves the finished trials there. Raises
    `BenchmarkError` below 5 trials.
    """
    if trials < MIN_TRIALS:
        raise BenchmarkError(
            f"trials is {trials}; allowed is a number from {MIN_TRIALS} up: fewer say nothing of the spread"
        )
    for entry in entries:
        warm_up(entry)
        tick(str(entry.case), entry.work)
    for number in range(trials):
        # every other round backwards: who comes after whom must not decide either
        for entry in list(entries)[:: -1 if number % 2 else 1]:
            if entry.timed:
                run_trial(entry)
            tick(str(entry.case), entry.work)


def warm_up(entry: Entry) -> None:
    """One run that is not counted: it compiles, fills caches, and gives the tokens to compare.

    A peer that fails is left out and says why; a failure of our own engine is the caller's.
    """
    case = entry.case
    try:
        timed = checked(entry.session.generate(entry.prompt, case.generation_tokens), case)
    except OpenELMError as error:
        if entry.against is None:
            raise
        entry.notes.append(f"not timed: {error}")
        entry.failed = True
        return
    against = None if entry.against is None else entry.against.warm
    if against is not None:
        entry.parts_at = parting(timed.tokens, against.tokens)
        if entry.parts_at is not None:
            entry.notes.append(
                f"not timed: token {entry.parts_at} is {timed.tokens[entry.parts_at]}, "
                f"in {entry.against.case.engine if entry.against else ''} {against.tokens[entry.parts_at]}"
            )
    entry.warm = timed


def run_trial(entry: Entry) -> None:
    """One counted run; its values are kept only once all of it has succeeded."""
    case, session = entry.case, entry.session
    timed = checked(session.generate(entry.prompt, case.generation_tokens), case)
    where = None if entry.warm is None else parting(timed.tokens, entry.warm.tokens)
    if where is not None and not any(note.startswith(UNSTEADY) for note in entry.notes):
        entry.notes.append(f"{UNSTEADY}, from token {where} on")
    found = figures(timed, case)
    if (reused := getattr(session, "generate_reused", None)) is not None and case.batch_size == 1:
        seconds = reused(entry.prompt)
        if seconds is not None:
            found["time_to_first_token_reused_seconds"] = seconds
    if (passes := getattr(session, "tokens_per_pass", None)) is not None:
        found["tokens_per_pass"] = passes
    for name, value in found.items():
        entry.values.setdefault(name, []).append(value)


def figures(timed: Timed, case: Case) -> dict[str, float]:
    """The metrics of one run."""
    found: dict[str, float | None] = {
        "prefill_tokens_per_second": timed.prefill_rate(case.prompt_tokens, case.batch_size),
        "decode_tokens_per_second": timed.decode_rate(case.batch_size),
        "time_to_first_token_seconds": timed.first,
        "peak_memory_bytes": timed.peak_memory_bytes,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def checked(timed: Timed, case: Case) -> Timed:
    """The run itself, if it is one of the case. Raises `BenchmarkError` for an engine that gave
    less or another count.
    """
    if not len(timed.tokens) == len(timed.seconds) == case.generation_tokens:
        raise BenchmarkError(
            f"{case.engine} gave {len(timed.tokens)} tokens at {len(timed.seconds)} times; "
            f"{case.generation_tokens} were asked for"
        )
    if timed.first <= 0 or any(
        b < a for a, b in zip(timed.seconds, timed.seconds[1:], strict=False)
    ):
        raise BenchmarkError(
            f"{case.engine} gave times that do not rise; its clock cannot be trusted"
        )
    return timed


def parting(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def row_of(entry: Entry, extra: dict[str, list[float]] | None = None, **facts: Any) -> Row:
    """The row of an entry: its finished trials summarised, `extra` metrics beside them, notes where
    trials disagree.
    """
    values = {**entry.values, **(extra or {})}
    metrics = {name: Metric.of(values[name], METRICS[name]) for name in METRICS if values.get(name)}
    notes = [*getattr(entry.session, "notes", ()), *entry.notes]
    for name in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        if name in metrics:
            notes += trial_notes(name, metrics[name])
    if entry.timed and not entry.values:
        notes.append("not timed: the run ended before its first trial")
    elif entry.warm is None and not entry.failed:
        notes.append("not timed: the run ended before its warm-up")
    agrees = (
        entry.parts_at is None if entry.against is not None and entry.warm is not None else None
    )
    return Row(
        entry.case, metrics, agrees=agrees, parts_at=entry.parts_at, notes=tuple(notes), **facts
    )


def ratios_of(entries: Sequence[Entry]) -> list[Ratio]:
    """Ours over each peer, metric by metric, from trials of the same rounds."""
    found = []
    for number, peer in enumerate(entries):
        if peer.against is None:
            continue
        ours = peer.against
        for name in RATIOS:
            a, b = ours.values.get(name, []), peer.values.get(name, [])
            if min(len(a), len(b)) >= 2:
                low, middle, high = paired_ratio([a], [b])
                found.append(Ratio(name, list(entries).index(ours), number, middle, low, high))
    return found
