"""Trials: each case runs once uncounted, then round by round with the others.

So a drift of the machine hits all that is compared alike.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter

from openelm_mlx.benchmarks.measure.suites import Point, work
from openelm_mlx.benchmarks.peers import START_UP, Session, Timed
from openelm_mlx.benchmarks.results.document import METRICS, Case, Metric, Ratio, Row
from openelm_mlx.errors import BenchmarkError, OpenELMError

RATIOS = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_seconds")
UNSTEADY = "not the same tokens in every trial"
TIMEOUT = 600  # seconds that a new process may take to end after its first token

# called with what is being run, and how much of the work (in tokens) was done with it; with None,
# how much there will be
Tick = Callable[[str | None, float], None]


def figures(timed: Timed, case: Case) -> dict[str, float]:
    """Return the metrics of one run."""
    found: dict[str, float | None] = {
        "prefill_tokens_per_second": timed.prefill_rate(case.prompt_tokens, case.batch_size),
        "decode_tokens_per_second": timed.decode_rate(case.batch_size),
        "time_to_first_token_seconds": timed.first,
        "peak_memory_bytes": timed.peak_memory_bytes,
        "tokens_per_pass": timed.tokens_per_pass,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def startup_figures(timed: Timed, case: Case) -> dict[str, float]:
    return {"startup_seconds": timed.first}


@dataclass(eq=False)
class Entry:
    """A case on its way to becoming a row."""

    case: Case
    session: Session
    prompt: list[int]
    against: Entry | None = None  # the entry of our engine that this peer must agree with
    figures: Callable[[Timed, Case], dict[str, float]] = figures
    beside: Callable[[], dict[str, float]] | None = None  # figures measured after each trial
    values: dict[str, list[float]] = field(default_factory=dict)  # of each metric
    bytes_per_token: dict[str, float] | None = None
    warm: Timed | None = None
    trials: int = 0
    parts_at: int | None = None
    failed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def work(self) -> float:
        """The tokens of one trial, as the progress bar counts them."""
        case = self.case
        return work([Point(case.prompt_tokens, case.generation_tokens, case.batch_size)])

    @property
    def timed(self) -> bool:
        """True if this entry may be timed: a peer may once its tokens are ours."""
        return self.warm is not None and self.parts_at is None and not self.failed


def measure(entries: Sequence[Entry], trials: int, tick: Tick) -> None:
    """Warm up and check every entry, then run `trials` rounds; the values go into the entries.

    An interrupt (Ctrl-C) passes through, and the finished trials stay. A peer that fails is left
    out from then on; the error of our own engine is raised.
    """
    gc.collect()  # an earlier engine that is freed during a run would be taken off its memory
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
    """Run once uncounted: that compiles, fills caches, and gives the tokens to compare."""
    entry.warm = attempt(entry)
    against = entry.against
    if entry.warm is None or against is None or against.warm is None:
        return
    theirs, ours = entry.warm.tokens, against.warm.tokens
    entry.parts_at = at = first_difference(theirs, ours)
    if at is not None:
        what = f"token {at} is {theirs[at]}, in {against.case.engine} {ours[at]}"
        entry.notes.append(f"not timed: {what}")


def run_trial(entry: Entry) -> None:
    """Run once; the values are kept only after all of it has succeeded."""
    timed = attempt(entry)
    if timed is None:
        return
    where = None if entry.warm is None else first_difference(timed.tokens, entry.warm.tokens)
    if where is not None and not any(note.startswith(UNSTEADY) for note in entry.notes):
        entry.notes.append(f"{UNSTEADY}, from token {where} on")
    found = entry.figures(timed, entry.case)
    found |= entry.beside() if entry.beside is not None else {}
    for name, value in found.items():
        entry.values.setdefault(name, []).append(value)
    entry.trials += 1


def attempt(entry: Entry) -> Timed | None:
    """Generate; None for a peer that fails, which then says why in its notes."""
    try:
        return checked(entry.session.generate(entry.prompt, entry.case.generation_tokens), entry)
    except OpenELMError as error:
        if entry.against is None:
            raise
        when = f"failed after {entry.trials} trials" if entry.trials else "not timed"
        entry.notes.append(f"{when}: {error}")
        entry.failed = True
        return None


def checked(timed: Timed, entry: Entry) -> Timed:
    """Return the run itself. Raises `BenchmarkError` if it is not what was asked for."""
    engine, wanted = entry.case.engine, entry.case.generation_tokens
    if not len(timed.tokens) == len(timed.seconds) == wanted:
        what = f"{len(timed.tokens)} tokens at {len(timed.seconds)} times"
        raise BenchmarkError(f"{engine} gave {what}; {wanted} were asked for")
    if timed.first <= 0 or list(timed.seconds) != sorted(timed.seconds):
        raise BenchmarkError(f"{engine} gave times that do not rise; its clock cannot be trusted")
    return timed


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)


def row_of(entry: Entry) -> Row:
    """Return the row of an entry: its finished trials, and notes on what went wrong."""
    metrics = {
        name: Metric.of(entry.values[name], unit)
        for name, unit in METRICS.items()
        if entry.values.get(name)
    }
    notes = [*entry.session.notes, *entry.notes]
    if entry.timed and not entry.trials:
        notes.append("not timed: the run ended before its first trial")
    elif entry.warm is None and not entry.failed:
        notes.append("not timed: the run ended before its warm-up")
    compared = entry.against is not None and entry.warm is not None
    return Row(
        entry.case,
        metrics,
        bytes_per_token=entry.bytes_per_token,
        agrees=entry.parts_at is None if compared else None,
        parts_at=entry.parts_at,
        notes=tuple(notes),
    )


def ratios_of(entries: Sequence[Entry]) -> list[Ratio]:
    """Return our metrics over each peer's, as places of entries: trials of the same rounds."""
    return [
        Ratio(name, entries.index(peer.against), number)
        for number, peer in enumerate(entries)
        if peer.against is not None
        for name in RATIOS
        if min(len(one.values.get(name, ())) for one in (peer.against, peer)) >= 2
    ]


class NewProcess:
    """A session whose every generation is a new process, from its start to its first token."""

    load_seconds, version = 0.0, ""

    def __init__(self, engine: str, folder: Path, dtype: str, tokenizer: Path | None) -> None:
        self.engine = engine
        self.notes: tuple[str, ...] = ()
        self.task: dict[str, str | None] = {"engine": engine, "folder": str(folder), "dtype": dtype}
        self.task["tokenizer"] = None if tokenizer is None else str(tokenizer)

    def generate(self, prompt: list[int], tokens: int = 1) -> Timed:
        """Time the first token by the clock of this process, the imports of the new one included.

        Raises `BenchmarkError` with the new process's last line if it fails.
        """
        command = [sys.executable, "-c", START_UP, json.dumps({**self.task, "prompt": prompt})]
        # a pipe for what it says would fill, and hold up a process that says much
        with TemporaryFile("w+", errors="replace") as log:
            start = perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            try:
                line = child.stdout.readline() if child.stdout else ""
                seconds = perf_counter() - start
                child.communicate(timeout=TIMEOUT)
            except subprocess.TimeoutExpired:
                what = f"gave a token, but did not end within {TIMEOUT} seconds"
                raise BenchmarkError(f"{self.engine} {what}") from None
            finally:
                child.kill()
                child.wait()
            log.seek(0)
            errors = log.read()
        words = line.split()
        if child.returncode or len(words) != 2 or words[0] != "token":
            last = errors.strip().splitlines()[-1:] or [f"it ended with status {child.returncode}"]
            raise BenchmarkError(f"{self.engine} did not start up: {last[0]}")
        return Timed((int(words[1]),), (seconds,))

    def close(self) -> None:
        """Do nothing: no process outlives its generation."""
