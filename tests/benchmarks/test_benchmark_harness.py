"""Trials are timed as an independent clock times them, in turns, with what disturbed them noted."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import pytest
from bench_sessions import CASE, Sleeper, nothing

from openelm_mlx.benchmarks.measure import harness, machine
from openelm_mlx.benchmarks.measure.harness import Entry, measure, ratios_of, row_of
from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.benchmarks.peers import openelm as ours
from openelm_mlx.benchmarks.peers.openelm import OurSession, prompt_ids
from openelm_mlx.benchmarks.results.document import Metric
from openelm_mlx.engine.generation import Event, stream_generate
from openelm_mlx.errors import BenchmarkError


def true_figures(truth, case):
    """Median first-token seconds and rates of the counted runs, from the independent clock."""
    runs = [[(t - watch[0]) / 1e9 for t in watch[1:]] for watch in truth[1:]]
    return {
        "time_to_first_token_seconds": statistics.median(run[0] for run in runs),
        "prefill_tokens_per_second": statistics.median(case.prompt_tokens / run[0] for run in runs),
        "decode_tokens_per_second": statistics.median(
            (len(run) - 1) / (run[-1] - run[0]) for run in runs
        ),
    }


def close(reported, true, name):
    """Within 2 %, or 1 ms of the time that the figure stands for."""
    if name.endswith("seconds"):
        return abs(reported - true) <= max(0.02 * true, 0.001)
    tokens = CASE.prompt_tokens if name.startswith("prefill") else CASE.generation_tokens - 1
    return abs(reported / true - 1) <= 0.02 or abs(tokens / reported - tokens / true) <= 0.001


def test_figures_are_those_of_an_independent_clock():
    session = Sleeper(step=0.003, first=0.006)
    entry = Entry(CASE, session, [1] * 8)
    measure([entry], 5, nothing)
    row = row_of(entry)
    assert session.calls == 6 and all(len(row.metrics[name].values) == 5 for name in row.metrics)
    for name, true in true_figures(session.truth, CASE).items():
        assert close(row.metrics[name].median, true, name), name
    assert row.metrics["time_to_first_token_seconds"].median >= 0.006
    assert row.metrics["decode_tokens_per_second"].median <= 1 / 0.003


def test_our_session_counts_first_and_last_token_by_an_independent_clock(tiny, monkeypatch):
    truth = []

    def stub(engine, prompt, **settings):
        watch = [time.monotonic_ns()]
        truth.append(watch)
        for i in range(settings["max_tokens"]):
            time.sleep(0.006 if i == 0 else 0.003)
            watch.append(time.monotonic_ns())
            yield Event("", i)

    monkeypatch.setattr(ours, "stream_generate", stub)
    session = OurSession(tiny, settings={"kv_window": 64})  # nothing is reused in a window
    entry = Entry(CASE, session, [1] * 8)
    measure([entry], 5, nothing)
    row = row_of(entry)
    assert all(len(watch) == 10 for watch in truth) and entry.warm.tokens == tuple(range(9))
    for name, true in true_figures(truth, CASE).items():
        assert close(row.metrics[name].median, true, name), name


def test_our_session_agrees_with_the_engines_own_clock_and_tokens(tiny):
    prompt = prompt_ids(tiny, 40)
    events = list(stream_generate(tiny, prompt, max_tokens=24, ignore_eos=True))
    session = OurSession(tiny)
    session.generate(prompt, 24)
    timed = session.generate(prompt, 24)
    assert timed.tokens == tuple(event.token for event in events) and len(timed.seconds) == 24
    assert timed.peak_memory_bytes > tiny.nbytes
    assert 0 < session.generate_reused(prompt) < timed.first  # 8 of 40 tokens are prefilled
    assert len(session._held.tokens) == 40


def test_the_prompt_is_a_novel_cut_to_length_and_the_same_each_time(tiny):
    long = prompt_ids(tiny, 700)
    assert (
        len(long) == 700 and long[0] == tiny.tokenizer.bos_id and long[:50] == prompt_ids(tiny, 50)
    )
    assert tiny.tokenizer.decode(long[1:12]).startswith("Squire Trelaw")


def test_trials_take_turns_and_warm_up_is_not_counted():
    order = []
    sessions = [Sleeper(0.0), Sleeper(0.0)]
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
        Sleeper(0.0),
        Sleeper(0.0, engine="p", tokens=[0, 1, 7, 3, 4, 5, 6, 7, 8]),
        Sleeper(0.0, engine="q"),
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

    good, bad = Sleeper(0.0), Sleeper(0.0)
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
    session = Sleeper(0.0)
    session.generate = lambda prompt, tokens: timed
    with pytest.raises(BenchmarkError, match=text):
        measure([Entry(CASE, session, [1])], 5, nothing)
    with pytest.raises(BenchmarkError, match="trials is 4; allowed is a number from 5 up"):
        measure([], 4, nothing)


def test_an_interrupt_leaves_the_finished_trials():
    session = Sleeper(0.0)
    run = session.generate

    def interrupted(prompt, tokens):
        if session.calls == 4:
            raise KeyboardInterrupt
        return run(prompt, tokens)

    session.generate = interrupted
    entry, later = Entry(CASE, session, [1]), Entry(CASE, Sleeper(0.0), [1])
    with pytest.raises(KeyboardInterrupt):
        measure([entry, later], 9, nothing)
    assert {len(metric.values) for metric in row_of(entry).metrics.values()} == {3}
    with pytest.raises(KeyboardInterrupt):
        measure([entry], 9, nothing)
    never = row_of(Entry(CASE, session, [1]))
    assert never.metrics == {} and never.notes == ("not timed: the run ended before its warm-up",)


def test_notes_on_a_machine_that_is_not_at_rest():
    assert (
        machine.rest_notes(
            {"load_average": 0.4, "cores": 2, "thermal_pressure": "nominal"}, "nominal", 0
        )
        == []
    )
    busy = machine.rest_notes(
        {"load_average": 3.1, "cores": 2, "thermal_pressure": "heavy"}, "moderate", 5
    )
    assert busy == [
        "the machine was busy before the run: load 3.1 on 2 cores",
        "the machine was hot before the run: thermal pressure heavy",
        "the machine was hot after the run: thermal pressure moderate",
        "the processor throttled 5 times during the run",
    ]
    steady, wide = (
        Metric.of([10, 10.1, 10, 9.9, 10], "tokens/s"),
        Metric.of([10, 14, 8, 13, 9], "tokens/s"),
    )
    falling = Metric.of([10, 9.6, 9.3, 9.1, 8.6], "tokens/s")
    assert machine.trial_notes("decode_tokens_per_second", steady) == []
    assert machine.trial_notes("decode_tokens_per_second", wide) == ["decode: quartiles 40% apart"]
    assert machine.trial_notes("decode_tokens_per_second", falling) == [
        "decode: -15% from the first trial to the last"
    ]
    assert machine.read_pressure("com.apple.system.thermalpressurelevel 1\n") == "moderate"
    assert machine.read_pressure("") is None and machine.read_pressure("x 9") is None


def test_a_trial_with_other_tokens_is_noted_once():
    session = Sleeper(0.0)
    run = session.generate
    session.generate = lambda prompt, tokens: replace(
        run(prompt, tokens), tokens=tuple(range(session.calls, session.calls + 9))
    )
    entry = Entry(CASE, session, [1])
    measure([entry], 5, nothing)
    assert [note for note in row_of(entry).notes if "tokens" in note] == [
        f"{harness.UNSTEADY}, from token 0 on"
    ]
