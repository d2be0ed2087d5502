"""A run: several processes, one after another, each of which loads and times the models.

`run` starts the processes and merges their documents; `Run` does the work of one of them. After
Ctrl-C the document has all trials that were finished.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from openelm_mlx.benchmarks import peers
from openelm_mlx.benchmarks.measure import harness, machine
from openelm_mlx.benchmarks.measure.harness import Entry, Tick
from openelm_mlx.benchmarks.measure.suites import BenchmarkOptions, Point, Suite, work
from openelm_mlx.benchmarks.measure.weights import (
    Weights,
    groups,
    last_part,
    losses,
    open_engine,
    open_weights,
)
from openelm_mlx.benchmarks.peers.on_mlx import OurSession, prompt_ids
from openelm_mlx.benchmarks.results import OURS
from openelm_mlx.benchmarks.results.compare import merge
from openelm_mlx.benchmarks.results.document import Document, completed
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import BenchmarkError, OpenELMError

CHILD = """import pickle, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the first process's
sys.path[:] = {}
from openelm_mlx.benchmarks.measure.run import child
child({}, *pickle.loads({}))"""


def run(options: BenchmarkOptions, tick: Tick | None = None) -> Document:
    """Measure what `options` ask for. Ctrl-C ends the run; the document is then partial.

    A model that cannot be loaded or run is left out with a note, unless it is the only one: then
    its `OpenELMError` is raised. Raises `BenchmarkError` if nothing could be measured.
    """
    load_average, throttled = os.getloadavg()[0], machine.throttle_count()
    hot, tick = machine.thermal_pressure(), tick or (lambda label, work: None)
    if options.chosen().processes == 1:
        document = Run(options, tick).document()
    else:
        document = in_processes(options, tick)
    before = replace(document.machine, load_average=load_average, thermal_pressure=hot)
    heat = None if throttled is None else (machine.throttle_count() or 0) - throttled
    notes = [
        *machine.method(options, document),
        *document.notes,
        *machine.rest_notes(before, machine.thermal_pressure(), heat),
    ]
    document = replace(document, machine=before, notes=tuple(dict.fromkeys(notes)))
    return machine.without_home(machine.with_trial_notes(document))


def failed(document: Document) -> bool:
    """Return whether a soak of the document saw a failure."""
    return any(note.startswith("failed: ") for row in document.rows for note in row.notes)


# --- processes


def in_processes(options: BenchmarkOptions, tick: Tick) -> Document:
    """Measure in one process after another, and merge their documents.

    After Ctrl-C or an error in a later process the finished processes are kept; after Ctrl-C in the
    first one, its finished trials.
    """
    documents: list[Document] = []
    count = options.chosen().processes
    while len(documents) < count:
        try:
            new = one_process(options, len(documents), tick)
            merge([*documents, new])  # raises if, say, the sources were changed meanwhile
            documents.append(new)
            if new.partial:
                break
        except (KeyboardInterrupt, OpenELMError) as error:
            if not documents:
                raise
            why = f"the next one failed: {error}" if str(error) else "interrupted"
            notes = (*documents[0].notes, f"{why}; {len(documents)} of {count} processes are here")
            documents[0] = replace(documents[0], partial=True, notes=notes)
            break
    return merge(documents)


def one_process(options: BenchmarkOptions, number: int, tick: Tick) -> Document:
    """Return the document of a new process. Raises its `OpenELMError`.

    After Ctrl-C it removes its folders, and the first process hands over its finished trials; a
    second Ctrl-C ends it at once. It is a command of its own, because a process of
    `multiprocessing` imports the caller's main module, and a script without
    `if __name__ == "__main__"` would start itself again.
    """
    pipe, theirs = Pipe(duplex=False)
    code = CHILD.format(sys.path, theirs.fileno(), pickle.dumps((options, number)))
    command, inherited = [sys.executable, "-P", "-c", code], [theirs.fileno()]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=inherited)
    theirs.close()

    def received() -> Document:
        while True:
            message = pipe.recv()
            if isinstance(message, Document):
                return message
            if isinstance(message, OpenELMError):
                raise message
            label, work = message
            if label is not None:
                tick(f"{number + 1}/{options.chosen().processes} {label}", work)
            elif number == 0:  # each process is as long as the first
                tick(None, work * options.chosen().processes)

    try:
        return received()
    except KeyboardInterrupt:
        process.terminate()
        try:
            document = received()
        except EOFError:  # it had not begun
            raise KeyboardInterrupt from None
        if number:
            raise
        return document
    except EOFError:
        what = f"process {number + 1} ended with status {process.wait()}"
        raise BenchmarkError(f"{what}; its own message is above") from None
    finally:
        process.kill()
        process.wait()


def child(descriptor: int, options: BenchmarkOptions, number: int) -> None:
    """Measure as one process of several; send progress and the document through the descriptor."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pipe = Connection(descriptor, readable=False)
    try:
        pipe.send(Run(options, lambda *words: pipe.send(words), number).document())
    except OpenELMError as error:
        pipe.send(error)


# --- one process


class Run:
    """The work of one process: it collects entries, which have the trials, and notes."""

    def __init__(self, options: BenchmarkOptions, tick: Tick, number: int = 0) -> None:
        self.options, self.tick, self.number = options, tick, number
        self.suite: Suite = options.chosen()
        self.points = options.points()
        self.first_token = Point(self.points[0].prompt_tokens, 1)  # the case of a start-up
        self.trials = self.suite.trials_of_a_process
        self.entries: list[Entry] = []
        self.drafts: dict[str, Engine] = {}
        self.versions = machine.versions()
        obstacles = {name: peers.why_not(name) for name in options.peers}
        self.peers = [name for name, why in obstacles.items() if why is None]
        self.notes = [f"{name} was left out: {why}" for name, why in obstacles.items() if why]

    def document(self) -> Document:
        facts, interrupted = machine.machine(), False
        commit, dirty = machine.commit(Path(__file__).resolve().parents[2])
        try:
            if self.suite.speed:
                copy, read = machine.bandwidth()
                facts = replace(facts, copy_bytes_per_second=copy, read_bytes_per_second=read)
            self.tick(None, self.planned())
            for model in self.suite.models:
                self.model(model)
        except KeyboardInterrupt:
            interrupted = True
            self.notes.append("interrupted: only the trials that were finished are here")
        rows = tuple(map(harness.row_of, self.entries))
        if not rows and not interrupted:
            raise BenchmarkError("; ".join(self.notes) or "nothing was measured")
        return completed(
            Document(
                created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
                command=self.options.command,
                rows=rows,
                suite=self.options.suite,
                partial=interrupted,
                machine=facts,
                versions=self.versions,
                commit=commit,
                dirty=dirty,
                notes=tuple(self.notes),
                ratios=tuple(harness.ratios_of(self.entries)),
            )
        )

    def planned(self) -> float:
        """Return the work of this process, as the harness counts it; that of a soak in seconds."""
        suite, peers = self.suite, len(self.peers)
        simple = [point for point in self.points if point.simple]
        speed = suite.speed * (work(self.points) + peers * work(simple))
        startup = suite.startup * (1 + peers) * work([self.first_token])
        soak = suite.soak * 60 * self.options.minutes
        models = len(suite.models) * len(suite.bits)
        return models * ((speed + startup) * (self.trials + 1) + soak)

    def model(self, model: str) -> None:
        """Measure a model in all its numbers of bits; note if one of several models cannot be."""
        try:
            for group in groups(model, self.options, len(self.peers), self.notes):
                self.measure(model, group)
        except OpenELMError as error:
            if len(self.suite.models) == 1:
                raise
            self.notes.append(f"{last_part(model)} was left out: {error}")

    def measure(self, model: str, group: Sequence[int | None]) -> None:
        """Load a model in these numbers of bits, and time every point."""
        options = self.options
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="openelm-")))
            random = bool(options.random_weights)
            loaded = [
                open_weights(model, self.suite.dtype, bits, options.group_size, random, scratch)
                for bits in group
            ]
            if self.suite.speed:
                found = [self.cases(weights, stack) for weights in loaded]
                entries = [entry for cases in found for entry in cases]
                self.entries += entries
                harness.measure(entries, self.trials, self.tick)
                if self.suite.loss and self.number == 0:  # it is the same in every process
                    self.losses(model, loaded, found)
            if self.suite.startup:
                entries = [entry for weights in loaded for entry in self.startups(weights)]
                self.entries += entries
                harness.measure(entries, self.trials, self.tick)
            for weights in loaded if self.suite.soak else ():
                self.soak(weights)

    def soak(self, weights: Weights) -> None:
        """Run a soak, and add a row with its probes' figures, its failures and its summary."""
        from openelm_mlx.benchmarks.checks import soak

        seen = soak.Soak()
        try:
            soak.soak(weights.engine, self.options.minutes, tick=self.tick, seen=seen)
        finally:
            entry = Entry(weights.case(Point(*soak.PROBE)), OurSession(weights.engine), [])
            for timed in seen.probes:
                for name, value in harness.figures(timed, entry.case).items():
                    entry.values.setdefault(name, []).append(value)
            entry.trials, entry.warm = len(seen.probes), next(iter(seen.probes), None)
            entry.notes = [f"failed: {failure}" for failure in seen.failures] + seen.summary()
            self.entries.append(entry)

    def cases(self, weights: Weights, stack: ExitStack) -> list[Entry]:
        """Return entries: our engine at all points that fit the context, peers at simple ones."""
        attempts = (self.open_peer(name, weights) for name in self.peers)
        opened = [session for session in attempts if session is not None]
        for peer in opened:
            stack.callback(peer.close)
        found: list[Entry] = []
        limit = weights.engine.config.max_context_length
        for point in self.points:
            if point.prompt_tokens + point.generation_tokens - 1 > limit:
                lengths = f"{point.prompt_tokens} + {point.generation_tokens} tokens"
                what = f"{lengths} left out, its context is {limit} tokens"
                self.notes.append(f"{last_part(weights.engine.name)}: {what}")
                self.tick(lengths, work([point]) * (self.trials + 1))
                continue
            prompt, moved = prompt_ids(weights.engine, point.prompt_tokens), weights.moved(point)
            seconds, draft = weights.load_seconds or 0.0, self.draft(point.draft)
            session = OurSession(weights.engine, seconds, point.settings, point.batch_size, draft)
            stack.callback(session.close)
            ours = Entry(weights.case(point), session, prompt, bytes_per_token=moved)
            ours.beside = partial(session.reused, prompt)
            found.append(ours)
            for peer in opened if point.simple else ():
                case = weights.case(point, peer.engine)
                found.append(Entry(case, peer, prompt, ours, bytes_per_token=moved))
        for first in {entry.case.engine: entry for entry in reversed(found)}.values():
            if seconds := first.session.load_seconds:
                first.values["load_seconds"] = [seconds]
        return found

    def draft(self, name: str | None) -> Engine | None:
        """Return the model that drafts, loaded once."""
        if name is not None and name not in self.drafts:
            self.drafts[name] = open_engine(name, self.suite.dtype, None)[0]
        return None if name is None else self.drafts[name]

    def open_peer(self, name: str, weights: Weights) -> peers.Session | None:
        try:
            session = peers.open_peer(name, weights.written(), weights.dtype)
        except OpenELMError as error:
            self.notes.append(f"{name} was left out: {error}")
            return None
        self.versions[name] = session.version
        return session

    def startups(self, weights: Weights) -> list[Entry]:
        """Return the entries of start-ups: our engine's and each peer's.

        A peer's file is converted beforehand, because that does not belong to its start-up.
        """
        folder, path = weights.written(), weights.engine.tokenizer.path
        tokenizer = path if path.exists() else None
        prompt = prompt_ids(weights.engine, self.first_token.prompt_tokens)
        found: list[Entry] = []
        for name in (OURS, *self.peers):
            try:
                place = peers.prepared(name, folder, weights.dtype, weights.scratch)
            except OpenELMError as error:
                self.notes.append(f"{name} was left out: {error}")
                continue
            session = harness.NewProcess(name, place, weights.dtype, tokenizer)
            ours = found[0] if found else None
            case = weights.case(self.first_token, name)
            found.append(Entry(case, session, prompt, ours, harness.startup_figures))
        return found

    def losses(self, model: str, loaded: list[Weights], cases: list[list[Entry]]) -> None:
        """Add the loss against the model as stored to the first case of each number of bits."""
        if self.options.random_weights:
            self.notes.append("no loss is given: that of random weights means nothing")
            return
        first = loaded[0]
        reference = first.engine if first.stored else open_engine(model, self.suite.dtype, None)[0]
        found, tokens = losses(loaded, reference)
        for figures, entries in zip(found, cases, strict=True):
            for entry in entries[:1]:
                entry.values |= {name: [value] for name, value in figures.items()}
        what = f"on {tokens} tokens that it samples itself"
        self.notes.append(f"loss is against the model as stored, {what}")
