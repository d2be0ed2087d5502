"""Trials take turns, their figures are those of the clock, and what disturbed them is noted."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace

import pytest
from bench_sessions import CASE, Steady, nothing

from openelm_mlx.benchmarks.measure import harness, machine
from openelm_mlx.benchmarks.measure.harness import Entry, measure, ratios_of, row_of
from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.benchmarks.peers.on_mlx import OurSession, prompt_ids
from openelm_mlx.benchmarks.results.document import Document, Machine, Metric, Row
from openelm_mlx.device import mx
from openelm_mlx.engine.generation import stream_generate
from openelm_mlx.errors import BenchmarkError


def test_figures_are_those_of_the_sessions_clock():
    session = Steady(step=0.25, first=0.5)
    entry = Entry(CASE, session, [1] * 8)
    measure([entry], 5, nothing)
    row = row_of(entry)
    assert session.calls == 6 and all(len(row.metrics[name].values) == 5 for name in row.metrics)
    assert {name: metric.median for name, metric in row.metrics.items()} == {
        "prefill_tokens_per_second": 8 / 0.5,
        "decode_tokens_per_second": 4.0,
        "time_to_first_token_seconds": 0.5,
        "peak_memory_bytes": 1000,
    }


@pytest.mark.parametrize("batch_size", [1, 2])
def test_our_session_reads_the_clock_at_the_start_and_at_every_token(tiny, batch_size):
    session = OurSession(tiny, batch_size=batch_size, clock=itertools.count().__next__)
    timed = session.generate(prompt_ids(tiny, 12), 5)
    assert timed.seconds == (1, 2, 3, 4, 5) and len(timed.tokens) == 5


def test_our_session_agrees_with_the_engines_own_clock_and_tokens(tiny):
    prompt = prompt_ids(tiny, 40)
    events = list(stream_generate(tiny, prompt, max_tokens=24, ignore_eos=True))
    session = OurSession(tiny)
    timed = session.generate(prompt, 24)
    assert timed.tokens == tuple(event.token for event in events) and len(timed.seconds) == 24
    assert timed.peak_memory_bytes > tiny.nbytes
    assert list(session.reused(prompt)) == ["time_to_first_token_reused_seconds"]
    assert len(session.cache.tokens) == 40
    assert OurSession(tiny, settings={"kv_window": 64}).reused(prompt) == {}


def test_our_clock_encloses_that_of_the_engine(tiny, monkeypatch):
    """The session waits for what the engine counts, so its times cannot be shorter."""
    from openelm_mlx.benchmarks.peers import on_mlx

    found = []

    def watched(*args, **settings):
        for event in stream_generate(*args, **settings):
            found.append(event.stats)
            yield event

    monkeypatch.setattr(on_mlx, "stream_generate", watched)
    timed = OurSession(tiny).generate(prompt_ids(tiny, 40), 24)
    stats = found[-1]
    assert timed.seconds[-1] >= stats.total_seconds
    assert timed.first >= stats.time_to_first_token_seconds


def test_the_prompt_is_a_novel_cut_to_length_and_the_same_each_time(tiny):
    long = prompt_ids(tiny, 700)
    assert (
        len(long) == 700 and long[0] == tiny.tokenizer.bos_id and long[:50] == prompt_ids(tiny, 50)
    )
    assert tiny.tokenizer.decode(long[1:12]).startswith("Squire Trelaw")


def test_trials_take_turns_and_warm_up_is_not_counted():
    order = []
    sessions = [Steady(), Steady()]
    for number, session in enumerate(sessions):
        session.generate = lambda prompt, tokens, n=number, run=session.generate: (
            order.append(n) or run(prompt, tokens)
        )
    entries = [Entry(CASE, session, [1]) for session in sessions]
    ticks = []
    measure(entries, 5, lambda label, work: ticks.append(work))
    assert order == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert len(ticks) == 12 and all(
        len(entry.values["decode_tokens_per_second"]) == 5 for entry in entries
    )


def test_a_peer_that_parts_is_not_timed_and_the_row_says_where():
    mine, other, same = (
        Steady(),
        Steady(engine="p", tokens=[0, 1, 7, 3, 4, 5, 6, 7, 8]),
        Steady(engine="q"),
    )
    entry = Entry(CASE, mine, [1])
    peers = [
        Entry(replace(CASE, engine="p"), other, [1], entry),
        Entry(replace(CASE, engine="q"), same, [1], entry),
    ]
    measure([entry, *peers], 5, nothing)
    ours_row, parted, agreed = (row_of(e) for e in (entry, *peers))
    assert (
        other.calls == 1
        and parted.metrics == {}
        and parted.parts_at == 2
        and parted.agrees is False
    )
    assert parted.notes == ("not timed: token 2 is 7, in stub 2",)
    same.notes = ("weights expanded",)
    assert row_of(peers[1]).notes[0] == "weights expanded"
    assert agreed.agrees is True and agreed.metrics and ours_row.agrees is None
    assert {(r.row, r.against) for r in ratios_of([entry, *peers])} == {(0, 2)}


def test_a_peer_that_fails_is_left_out_but_our_own_failure_is_raised():
    def fail(prompt, tokens):
        raise BenchmarkError("out of memory")

    good, bad = Steady(), Steady()
    bad.generate = fail
    entry = Entry(CASE, good, [1])
    peer = Entry(replace(CASE, engine="p"), bad, [1], entry)
    measure([entry, peer], 5, nothing)
    assert row_of(peer).notes == ("not timed: out of memory",) and row_of(peer).agrees is None
    with pytest.raises(BenchmarkError, match="out of memory"):
        measure([Entry(CASE, bad, [1])], 5, nothing)


@pytest.mark.parametrize(
    ("timed", "text"),
    [
        (Timed((1, 2), (0.1, 0.2)), "stub gave 2 tokens at 2 times; 9 were asked for"),
        (Timed(tuple(range(9)), (0.1,) * 8 + (0.05,)), "times that do not rise"),
    ],
)
def test_an_engine_that_does_not_do_as_asked_is_refused(timed, text):
    session = Steady()
    session.generate = lambda prompt, tokens: timed
    with pytest.raises(BenchmarkError, match=text):
        measure([Entry(CASE, session, [1])], 5, nothing)


def test_an_interrupt_leaves_the_finished_trials():
    session = Steady()
    run = session.generate

    def interrupted(prompt, tokens):
        if session.calls == 4:
            raise KeyboardInterrupt
        return run(prompt, tokens)

    session.generate = interrupted
    entry, later = Entry(CASE, session, [1]), Entry(CASE, Steady(), [1])
    with pytest.raises(KeyboardInterrupt):
        measure([entry, later], 9, nothing)
    assert {len(metric.values) for metric in row_of(entry).metrics.values()} == {3}
    with pytest.raises(KeyboardInterrupt):
        measure([entry], 9, nothing)
    never = row_of(Entry(CASE, session, [1]))
    assert never.metrics == {} and never.notes == ("not timed: the run ended before its warm-up",)


def test_a_peer_that_fails_later_keeps_its_trials_and_is_left_out_from_then_on():
    mine, peer = Steady(), Steady(engine="p")
    run = peer.generate

    def fail(prompt, tokens):
        if peer.calls == 4:
            raise BenchmarkError("it hung")
        return run(prompt, tokens)

    peer.generate = fail
    ours = Entry(CASE, mine, [1])
    theirs = Entry(replace(CASE, engine="p"), peer, [1], ours)
    measure([ours, theirs], 6, nothing)
    assert (ours.trials, theirs.trials) == (6, 3)
    assert row_of(theirs).notes == ("failed after 3 trials: it hung",)
    assert [(ratio.row, ratio.against) for ratio in ratios_of([ours, theirs])] == [(0, 1)] * 3


def test_notes_on_a_machine_that_is_not_at_rest():
    rested = Machine(load_average=0.4, cores=2, thermal_pressure="nominal")
    assert list(machine.rest_notes(rested, "nominal", 0)) == []
    busy = Machine(load_average=3.1, cores=2, thermal_pressure="heavy")
    assert list(machine.rest_notes(busy, "moderate", 5)) == [
        "the machine was busy before the run: load 3.1 on 2 cores",
        "the machine was hot before the run: thermal pressure heavy",
        "the machine was hot after the run: thermal pressure moderate",
        "the processor throttled 5 times during the run",
    ]
    assert machine.read_pressure("com.apple.system.thermalpressurelevel 1\n") == "moderate"
    assert machine.read_pressure("") is None and machine.read_pressure("x 9") is None


@pytest.mark.parametrize(
    ("values", "notes"),
    [
        ([10, 10.1, 10, 9.9, 10], ()),
        ([10, 14, 8, 13, 9], ("decode: quartiles 40% apart",)),
        ([10, 9.6, 9.3, 9.1, 8.6], ("decode: -15% from the first trial to the last",)),
    ],
)
def test_a_row_tells_what_its_own_trials_say_against_it(values, notes):
    row = Row(CASE, {"decode_tokens_per_second": Metric.of(values, "tokens/s")})
    (noted,) = machine.with_trial_notes(Document("", "", (row,))).rows
    assert noted.notes == notes


def test_a_trial_with_other_tokens_is_noted_once():
    session = Steady()
    run = session.generate
    session.generate = lambda prompt, tokens: replace(
        run(prompt, tokens), tokens=tuple(range(session.calls, session.calls + 9))
    )
    entry = Entry(CASE, session, [1])
    measure([entry], 5, nothing)
    assert [note for note in row_of(entry).notes if "tokens" in note] == [
        f"{harness.UNSTEADY}, from token 0 on"
    ]


def test_an_engine_that_is_gone_does_not_lower_the_peak_of_the_next(tiny):
    session, clock = OurSession(tiny), itertools.count(1).__next__
    entry = Entry(CASE, session, prompt_ids(tiny, 8))

    def collecting():  # what a run may do at any time
        gc.collect()
        return clock()

    gone: list = [mx.zeros(tiny.nbytes)]
    mx.eval(gone[0])
    gone.append(gone)  # only the collector frees it
    del gone
    session.clock = collecting
    harness.measure([entry], 1, nothing)
    assert entry.warm is not None and entry.warm.peak_memory_bytes > tiny.nbytes
