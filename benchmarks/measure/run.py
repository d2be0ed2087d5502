"""A run: options become cases, cases are loaded, timed and set down in a document, also when it is
cut short.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from openelm_mlx.benchmarks.measure import harness, machine
from openelm_mlx.benchmarks.measure.harness import Entry
from openelm_mlx.benchmarks.measure.suites import (
    BenchmarkOptions,
    Point,
    Suite,
    settings,
    speculation_settings,
    work,
)
from openelm_mlx.benchmarks.results.document import Document, Machine, Ratio, Row
from openelm_mlx.errors import BenchmarkError, OpenELMError

if TYPE_CHECKING:
    from openelm_mlx.benchmarks.measure.loaded import Weights
    from openelm_mlx.benchmarks.measure.timing import Session
    from openelm_mlx.benchmarks.peers.openelm import OurSession
    from openelm_mlx.engine.loading import Engine

OURS = "openelm-mlx"
LOSS_TOKENS = 512  # on which the loss of fewer bits is measured


class Progress(Protocol):
    """Who watches a run: how much work there will be, and what of it is done."""

    def total(self, work: float) -> None: ...
    def tick(self, label: str, work: float) -> None: ...


class Unwatched:
    def total(self, work: float) -> None:
        pass

    def tick(self, label: str, work: float) -> None:
        pass


def run(options: BenchmarkOptions, progress: Progress | None = None) -> Document:
    """Measure what `options` ask for. Ctrl-C ends the run, not the document: that is marked as
    partial.

    Of several models, one that cannot be loaded or run is left out with a note; raises its
    `OpenELMError` where there is only one, and `BenchmarkError` where nothing at all could be
    measured.
    """
    return Run(options, progress or Unwatched()).document()


def failed(document: Document) -> bool:
    """Whether a soak in it has seen something wrong."""
    return any(note.startswith("failed: ") for row in document.rows for note in row.notes)


class Run:
    """Rows, ratios and notes as they come."""

    def __init__(self, options: BenchmarkOptions, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.suite: Suite = options.chosen()
        self.points = options.points()
        self.rows: list[Row] = []
        self.ratios: list[Ratio] = []
        self.notes: list[str] = []
        self.drafts: dict[str, Engine] = {}
        self.bandwidth: float | None = None

    def document(self) -> Document:
        before, throttled = machine.machine(), machine.throttle_count()
        self.peers = self.usable_peers()
        self.versions = machine.versions()
        partial = False
        try:
            before |= self.measure_bandwidth(before)
            self.progress.total(self.planned())
            with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as folder:
                self.scratch = Path(folder)
                for model in self.suite.models:
                    self.model(model)
        except KeyboardInterrupt:
            partial = True
            self.notes.append("interrupted: only the trials that were finished are here")
        heat = None if throttled is None else (machine.throttle_count() or 0) - throttled
        if not self.rows and not partial:
            raise BenchmarkError("; ".join(self.notes) or "nothing was measured")
        notes = [
            *self.method(),
            *self.notes,
            *machine.rest_notes(before, machine.thermal_pressure(), heat),
        ]
        return Document(
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            command=self.options.command,
            suite=self.options.suite,
            partial=partial,
            machine=Machine(**before),
            versions=self.versions,
            notes=tuple(dict.fromkeys(notes)),
            rows=tuple(self.rows),
            ratios=tuple(self.ratios),
        )

    def model(self, model: str) -> None:
        """All widths of one model. One of several models that cannot be measured costs the others
        nothing.
        """
        try:
            for widths in self.groups(model):
                self.measure(model, widths)
        except OpenELMError as error:
            if len(self.suite.models) == 1:
                raise
            self.notes.append(f"{model} was left out: {error}")

    def measure_bandwidth(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What a copy reaches here, and what the maker says where that is known: the ground of
        every bound.
        """
        from openelm_mlx.benchmarks.hardware.chips import nominal_bandwidth
        from openelm_mlx.benchmarks.measure.bandwidth import measure

        if not self.suite.speed:
            return {}
        found = measure()
        self.bandwidth = found.bytes_per_second
        self.notes.append(
            f"bound: {self.bandwidth / 1e9:.1f} GB/s over the bytes that a token must read; {found.assumed}"
        )
        return {
            "copy_bytes_per_second": self.bandwidth,
            "nominal_bytes_per_second": nominal_bandwidth(
                facts.get("chip"), facts.get("gpu_cores")
            ),
        }

    def method(self) -> list[str]:
        """How the figures came about, in the document itself."""
        if self.suite.soak:
            return [
                "figures are those of a fixed probe between random generations, all of it on one engine"
            ]
        lookup = any(point.speculation == "prompt-lookup" for point in self.points)
        return [
            f"medians of {self.suite.trials} trials; one warm-up run of each case comes before them and is not counted",
            "trials of all cases of a model take turns; greedy tokens, end of text ignored, the prompt is part of a novel",
            *[
                "prompt lookup pays where a text quotes itself, which the prompt does from its 267th token on"
            ]
            * lookup,
        ]

    def usable_peers(self) -> list[str]:
        """Of the peers asked for, those that run here; a note says what the others lack."""
        if not self.options.peers:
            return []
        from openelm_mlx.benchmarks.peers import why_not

        found = []
        for name in dict.fromkeys(self.options.peers):
            reason = why_not(name)
            if reason is None:
                found.append(name)
            else:
                self.notes.append(f"{name} was left out: {reason}")
        return found

    def planned(self) -> float:
        """All tokens there are to run, as the harness counts them."""
        simple = [point for point in self.points if point.simple]
        speed = (
            sum(work(self.points)) + len(self.peers) * sum(work(simple))
            if self.suite.speed
            else 0.0
        )
        startup = (
            (1 + len(self.peers)) * self.points[0].prompt_tokens if self.suite.startup else 0.0
        )
        soak = (
            60 * self.options.minutes if self.suite.soak else 0.0
        )  # whose work is counted in seconds
        widths = len(self.suite.models) * len(self.suite.bits)
        return widths * (speed * (self.suite.trials + 1) + startup * self.suite.trials + soak)

    def groups(self, model: str) -> list[tuple[int | None, ...]]:
        """Widths of one model measured in turns: all of them where they fit into half of the
        memory, else one by one.
        """
        from openelm_mlx.benchmarks.measure.weights import facts_of

        facts = facts_of(model, bool(self.options.random_weights))
        widths = tuple(
            bits
            for bits in self.suite.bits
            if bits is None or facts.bits is None or bits < facts.bits
        )
        if widths != self.suite.bits:
            wide = ", ".join(str(bits) for bits in self.suite.bits if bits not in widths)
            self.notes.append(
                f"{model} has {facts.bits}-bit weights already: {wide} bits left out, fewer bits made from those"
            )
        whole = 16 if self.suite.dtype in ("bfloat16", "float16") else 32
        size = (
            facts.config.num_parameters
            * sum((bits or whole) / 8 for bits in widths)
            * (1 + len(self.peers))
        )
        if len(widths) == 1 or size < machine.memory_bytes() / 2:
            return [widths]
        self.notes.append(
            f"{model}: the widths do not fit into memory together and were measured one after the other"
        )
        return [(bits,) for bits in widths]

    def measure(self, model: str, widths: Sequence[int | None]) -> None:
        """Load the model in these widths, time every point, and take down the rows, the last ones
        at an interrupt too.
        """
        from openelm_mlx.benchmarks.checks.soak import soak_row
        from openelm_mlx.benchmarks.measure.loaded import open_weights
        from openelm_mlx.benchmarks.measure.startup import startup_rows

        with ExitStack() as stack:
            dtype, random = self.suite.dtype, bool(self.options.random_weights)
            loaded = [
                open_weights(model, dtype, bits, self.options.group_size, random) for bits in widths
            ]
            entries: list[Entry] = []
            if self.suite.speed:
                entries = [entry for weights in loaded for entry in self.entries(weights, stack)]
            losses: dict[int | None, dict[str, list[float]]] = {}
            try:
                harness.measure(entries, self.suite.trials, self.progress.tick)
                if self.suite.loss:
                    losses = self.losses(model, loaded)
            finally:
                self.take_down(entries, loaded, losses)
            for weights in loaded:
                if self.suite.startup:
                    startup_rows(
                        self.rows,
                        weights,
                        self.scratch,
                        self.points[0].prompt_tokens,
                        self.suite.trials,
                        self.peers,
                        self.progress.tick,
                    )
                if self.suite.soak:
                    soak_row(self.rows, weights, self.options.minutes, self.progress.tick)

    def take_down(
        self,
        entries: list[Entry],
        loaded: list[Weights],
        losses: dict[int | None, dict[str, list[float]]],
    ) -> None:
        from openelm_mlx.benchmarks.measure.loaded import bounded

        start = len(self.rows)
        known: set[tuple[str, int | None]] = (
            set()
        )  # engines and widths that were loaded once for all their cases
        for entry in entries:
            key = (entry.case.engine, entry.case.bits)
            extra = (
                dict(losses.get(entry.case.bits, {})) if key[0] == OURS and key not in known else {}
            )
            if entry.session.load_seconds and key not in known:
                extra["load_seconds"] = [entry.session.load_seconds]
            known.add(key)
            self.rows.append(bounded(harness.row_of(entry, extra), loaded, self.bandwidth))
        self.ratios += [
            replace(ratio, row=ratio.row + start, against=ratio.against + start)
            for ratio in harness.ratios_of(entries)
        ]

    def entries(self, weights: Weights, stack: ExitStack) -> list[Entry]:
        """Our engine at every point that fits the model's context, the peers at those that are
        simple.
        """
        from openelm_mlx.benchmarks.peers.openelm import prompt_ids

        peers = [
            session for name in self.peers if (session := self.open_peer(name, weights)) is not None
        ]
        for session in peers:
            stack.callback(session.close)
        found: list[Entry] = []
        limit = weights.engine.config.max_context_length
        for point in self.points:
            if point.prompt_tokens + point.generation_tokens - 1 > limit:
                lengths = f"{point.prompt_tokens} + {point.generation_tokens} tokens"
                self.notes.append(
                    f"{weights.engine.name}: {lengths} left out, its context holds {limit}"
                )
                self.progress.tick(lengths, sum(work([point])) * (self.suite.trials + 1))
                continue
            prompt = prompt_ids(weights.engine, point.prompt_tokens)
            session = self.our_session(weights, point)
            stack.callback(session.close)
            ours = Entry(weights.case(point), session, prompt)
            found.append(ours)
            if point.simple:
                found += [
                    Entry(weights.case(point, peer.engine), peer, prompt, against=ours)
                    for peer in peers
                ]
        return found

    def our_session(self, weights: Weights, point: Point) -> OurSession:
        from openelm_mlx.benchmarks.peers.openelm import OurSession

        draft = self.draft(speculation_settings(point.speculation)[1])
        return OurSession(
            weights.engine, weights.load_seconds or 0.0, settings(point), point.batch_size, draft
        )

    def draft(self, name: str | None) -> Engine | None:
        """The model that drafts, loaded once."""
        from openelm_mlx.benchmarks.measure.weights import open_engine

        if name is not None and name not in self.drafts:
            self.drafts[name] = open_engine(name, self.suite.dtype, None)[0]
        return None if name is None else self.drafts[name]

    def open_peer(self, name: str, weights: Weights) -> Session | None:
        from openelm_mlx.benchmarks.peers import open_peer

        try:
            session = open_peer(name, weights.written(self.scratch), weights.dtype)
        except OpenELMError as error:
            self.notes.append(f"{name} was left out: {error}")
            return None
        self.versions[name] = session.version
        return session

    def losses(self, model: str, loaded: list[Weights]) -> dict[int | None, dict[str, list[float]]]:
        """Return the metrics of each number of bits against the model as stored, on text that this
        one writes.
        """
        from openelm_mlx.benchmarks.measure.weights import open_engine
        from openelm_mlx.device import mx
        from openelm_mlx.evaluate.score import compare, own_text

        if self.options.random_weights:
            self.notes.append(
                "no loss is given: that of random weights would say nothing of trained ones"
            )
            return {}
        reference = (
            loaded[0].engine if loaded[0].stored else open_engine(model, self.suite.dtype, None)[0]
        )
        unknown = mx.where(mx.arange(reference.config.vocab_size) < reference.vocab, 0.0, -mx.inf)
        length = min(LOSS_TOKENS, reference.config.max_context_length)
        bos = reference.tokenizer.bos_id
        text = own_text(reference.model, [[bos]], length, seed=0, banned=unknown)
        found: dict[int | None, dict[str, list[float]]] = {}
        for weights in loaded:
            if weights.stored:
                continue
            loss = compare(reference.model, weights.engine.model, [text], vocab=reference.vocab)
            found[weights.bits] = {
                "kl_mean": [loss.mean_kl_divergence],
                "top_1_agreement": [loss.top_1_agreement],
            }
        self.notes.append(
            f"loss is against the model as stored, on {length} tokens that it samples itself"
        )
        return found
