from __future__ import annotations

import pytest
from batches import OPTIONS, PROMPTS, SAMPLING, alone
from small import random_engine

from openelm_mlx import BatchEngine, batch_generate, stream_generate
from openelm_mlx.engine.admission import Pace
from openelm_mlx.engine.options import EngineOptions, GenerationOptions, SamplingOptions
from openelm_mlx.engine.rows import quarters
from openelm_mlx.errors import BusyError, OptionError, PromptError


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


@pytest.fixture(scope="module")
def singles(engine):
    """The events of each request alone."""
    return [alone(engine, k) for k in range(len(PROMPTS))]


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("compiled", [True, False])
def test_each_sequence_is_its_single_run(engine, singles, slots, compiled):
    """Ragged lengths, own options, seeds and ends; with three slots most of them wait and join
    later.
    """
    results = batch_generate(engine, PROMPTS, SAMPLING, OPTIONS, slots=slots, compiled=compiled)
    for k, (result, events) in enumerate(zip(results, singles, strict=True)):
        assert list(result.tokens) == [event.token for event in events]
        assert (
            result.text == "".join(event.text for event in events)
            and result.finish_reason == "length"
        )
        assert result.stats.generation_tokens == len(events) and result.stats.prompt_tokens == len(
            PROMPTS[k]
        )


def test_a_joining_sequence_changes_nothing_and_events_are_complete(engine, singles):
    batch = BatchEngine(engine, slots=4)
    events: dict[int, list] = {}
    numbers = {}
    for step in range(200):
        if step % 5 == 0 and len(numbers) < len(PROMPTS):
            k = len(numbers)
            numbers[batch.submit(PROMPTS[k], SAMPLING[k], OPTIONS[k])] = k
        for number, event in batch.step():
            events.setdefault(number, []).append(event)
        if len(numbers) == len(PROMPTS) and not batch.busy:
            break
    assert len(events) == len(PROMPTS) and batch.step() == []
    for number, k in numbers.items():
        single = singles[k]
        assert [event.token for event in events[number]] == [event.token for event in single]
        assert [event.logprob for event in events[number]] == pytest.approx(
            [event.logprob for event in single], abs=1e-4
        )
        assert [len(event.top_logprobs) for event in events[number]] == [
            len(event.top_logprobs) for event in single
        ]


@pytest.mark.parametrize("settings", [{}, {"kv_bits": 8}, {"kv_window": 20}], ids=str)
def test_samples_of_a_prompt_share_its_prefill(engine, monkeypatch, settings):
    prompt, passed, hidden = PROMPTS[4], [], type(engine.model).hidden

    def counted(self, tokens, *rest, **named):
        passed.append(tokens.size)
        return hidden(self, tokens, *rest, **named)

    samplings = [SamplingOptions(temperature=0.9, seed=1, stream=k) for k in range(4)]
    settings = {"max_tokens": 6, "ignore_eos": True, **settings}
    alone = [
        [e.token for e in stream_generate(engine, prompt, one, **settings)] for one in samplings
    ]
    with monkeypatch.context() as patched:
        patched.setattr(type(engine.model), "hidden", counted)
        results = batch_generate(engine, [prompt] * 4, samplings, **settings)
    assert [list(one.tokens) for one in results] == alone
    assert passed[0] == len(prompt) and set(passed[1:]) <= {4}
    assert [one.stats.reused_tokens for one in results] == [0] + [len(prompt)] * 3


@pytest.mark.parametrize("admission", [8, 1 << 30])
def test_a_long_prompt_that_joins_stalls_nobody(engine, monkeypatch, admission):
    """A step reads at most `admission` tokens of it beside a token for each row that runs."""
    passed, hidden = [], type(engine.model).hidden

    def counted(self, tokens, *rest, **named):
        passed.append(tokens.size if tokens.ndim == 2 else 0)
        return hidden(self, tokens, *rest, **named)

    batch = BatchEngine(engine, 4, admission=admission, compiled=False)
    running = [
        batch.submit(PROMPTS[k], SAMPLING[k], max_tokens=40, ignore_eos=True) for k in range(2)
    ]
    while len(batch.step()) < 2:
        pass
    prompt = PROMPTS[8]
    monkeypatch.setattr(type(engine.model), "hidden", counted)
    joining, read, found = batch.submit(prompt, SAMPLING[2], max_tokens=3), [], []
    while joining not in found:
        passed.clear()
        found = [number for number, _ in batch.step()]
        read.append(sum(passed))
        assert sorted(set(found) - {joining}) == running
    assert sum(read) == len(prompt) and max(read) == min(admission, len(prompt))


@pytest.mark.parametrize("running, coming, together", [(1, 3, True), (2, 2, False), (0, 4, True)])
def test_those_who_come_late_are_read_together_if_they_are_more(engine, running, coming, together):
    """Else a few steps later, at the pace that suits the rows that run."""
    batch = BatchEngine(engine, 4, compiled=False)
    batch._queue.pace.tokens = 4
    for seed in range(running):
        batch.submit(PROMPTS[3], seed=seed, max_tokens=40, ignore_eos=True)
    while running and not batch._running:
        batch.step()
    assert batch._queue.pace.tokens == 4
    late = {batch.submit([1, *range(5 + k, 29 + k)], max_tokens=4) for k in range(coming)}
    found = {number for number, _ in batch.step()}
    assert (late <= found) == together and late.isdisjoint(found) != together


def test_a_row_is_not_slowed_much_by_those_who_come_and_go(engine, monkeypatch):
    """Of nine steps, one at most reads a whole chunk, and each gives the row a token."""
    batch, read = BatchEngine(engine, 4, compiled=False, prefill_chunk=32), []
    row, admit = batch.submit(PROMPTS[3], max_tokens=40, ignore_eos=True), batch._queue.admit
    batch.step()
    batch._queue.pace.tokens = 4
    monkeypatch.setattr(batch._queue.pace, "learn", lambda seconds, prefilled: None)
    monkeypatch.setattr(batch._queue, "admit", lambda *how: read.append(admit(*how)) or read[-1])
    for _ in range(28):
        while len(batch._queue.waiting) < 3:
            batch.submit([1, *range(5, 34)], max_tokens=1)
        assert row in [number for number, _ in batch.step()]
    assert sum(count > 4 for count in read) == 4 and 0 not in read
    batch.close()  # who comes after a rest does not wait for what was before it
    batch.submit(PROMPTS[3], max_tokens=40, ignore_eos=True)
    batch.step()
    batch.step()
    late = {batch.submit([1, *range(5, 15 + k)], max_tokens=1) for k in range(2)}
    assert late <= {number for number, _ in batch.step()}


def test_prompts_are_read_at_the_pace_of_the_device():
    """From any start, a step with prompt tokens comes to take about four times one without, as far
    as that can be.
    """
    for cost, wanted in ((0.001, (1, 2**30)), (0.5, (4, 8)), (0.1, (22, 36)), (9.0, (4, 4))):
        pace = Pace()
        for step in range(300):
            prefilled = pace.tokens if step % 3 else 0
            pace.learn(1.0 + cost * prefilled, prefilled)
        low, high = wanted
        assert low <= pace.tokens <= high and (cost > 0.001 or pace.tokens > 1000)
    pace = Pace()
    pace.learn(1.0, 0)
    pace.learn(1.1, 5)  # a prompt's last few tokens say nothing of more
    pace.learn(9.0, 512)  # a whole chunk is no measure of what goes beside a step
    assert pace.tokens == Pace.FIRST


def test_the_first_token_is_handed_out_before_a_step_is_built(engine, monkeypatch):
    built, cached = [], type(engine.steps).cached

    def noted(self, key, compiled, make):
        built.append(key)
        return cached(self, key, compiled, make)

    monkeypatch.setattr(type(engine.steps), "cached", noted)
    events = stream_generate(engine, PROMPTS[3], SAMPLING[1], OPTIONS[1])
    next(events)
    assert built == []
    next(events)
    assert built


def test_quantized_caches_and_the_bundled_model_batch_too(tiny, engine):
    results = batch_generate(engine, PROMPTS, kv_bits=8, max_tokens=6)
    for k, result in enumerate(results):
        single = stream_generate(engine, PROMPTS[k], kv_bits=8, max_tokens=6)
        assert list(result.tokens) == [event.token for event in single]
    texts = ["Once upon a time", "The king said", "It was"]
    for text, result in zip(
        texts, batch_generate(tiny, texts, max_tokens=6, stop=("e",)), strict=True
    ):
        assert result.text == "".join(
            event.text for event in stream_generate(tiny, text, max_tokens=6, stop=("e",))
        )


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_batch_grows_from_one_row_to_many_and_back(engine, bits):
    wanted = {
        k: GenerationOptions(max_tokens=length, ignore_eos=True)
        for k, length in enumerate((40, 4, 9, 20))
    }
    batch = BatchEngine(engine, 8, EngineOptions(kv_bits=bits))
    tokens: dict[int, list[int]] = {batch.submit(PROMPTS[0], SAMPLING[0], wanted[0]): []}
    step = 0
    while batch.busy:
        for number, event in batch.step():
            tokens[number].append(event.token)
        step += 1
        if step in (3, 4, 17):
            tokens[
                batch.submit(PROMPTS[len(tokens)], SAMPLING[len(tokens)], wanted[len(tokens)])
            ] = []
    for k, found in enumerate(tokens.values()):
        assert found == [event.token for event in alone(engine, k, options=wanted[k], kv_bits=bits)]


@pytest.mark.parametrize("most", [0, 2])
def test_log_probabilities_of_the_chosen_tokens_alone(engine, most):
    options = [
        GenerationOptions(max_tokens=6, ignore_eos=True, logprobs=wanted)
        for wanted in (0, most, None)
    ]
    batch = BatchEngine(engine, 2)
    events: dict[int, list] = {
        batch.submit(PROMPTS[k], SAMPLING[k], options[k]): [] for k in range(3)
    }
    while batch.busy:
        for number, event in batch.step():
            events[number].append(event)
    for k, found in enumerate(events.values()):
        single = alone(engine, k, options=options[k])
        assert [event.token for event in found] == [event.token for event in single]
        assert {len(event.top_logprobs) for event in (*found, *single)} == {(0, most, 0)[k]}
        for one, other in zip(found, single, strict=True):
            assert one.logprob == (None if k == 2 else pytest.approx(other.logprob, abs=1e-4))


def test_filters_stay_while_any_row_lives_so_that_few_steps_are_traced(engine):
    """Requests come and go beside one that stays: the sets of filters only grow, and the tokens are
    those alone.
    """
    kinds = [
        {"temperature": 1.0, "top_k": 5},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "min_p": 0.1},
        {},
    ]
    kinds = [SamplingOptions(seed=4, **kind) for kind in kinds * 4]
    batch, seen, tokens = BatchEngine(engine, 3), [], {}
    tokens[batch.submit(PROMPTS[0], max_tokens=150, ignore_eos=True)] = []
    alive = 1
    for _ in range(150):
        if len(tokens) <= len(kinds) and alive < 2:
            tokens[batch.submit(PROMPTS[1], kinds[len(tokens) - 1], OPTIONS[0])] = []
            alive += 1
        for number, event in batch.step():
            tokens[number].append(event.token)
            alive -= event.finish_reason is not None
        spec = getattr(batch._lanes[0], "_spec", None)
        seen += [] if spec is None or spec in seen else [spec]
    assert len(tokens) == len(kinds) + 1 and len(seen) == 3
    for kind, found in zip(kinds, list(tokens.values())[1:], strict=True):
        assert found == [
            event.token for event in stream_generate(engine, PROMPTS[1], kind, OPTIONS[0])
        ]


def test_rows_that_nobody_uses_stand_still(engine):
    """Else their positions would run past the buffers, whose slots belong to others there."""
    batch = BatchEngine(engine, 9)
    for k in range(9):  # of twelve rows, three were never used, and one soon is not
        batch.submit(PROMPTS[k], max_tokens=30 if k else 2, ignore_eos=True)
    seen = []
    while batch.busy:
        batch.step()
        lane = batch._lanes[0]
        seen.append(lane._state.position.tolist() if hasattr(lane, "_state") else [])
    assert (
        sorted(late - early for early, late in zip(seen[4], seen[20], strict=True))
        == [0] * 4 + [16] * 8
    )


def test_mistakes(engine):
    for slots in (0, 2.5):
        with pytest.raises(
            OptionError, match=rf"slots is {slots}; allowed is a whole number from 1 up"
        ):
            BatchEngine(engine, slots=slots)
    with pytest.raises(
        OptionError, match="sampling has 2 entries for 1 prompts; give one for all, or one each"
    ):
        batch_generate(engine, ["a"], [SamplingOptions()] * 2)
    with pytest.raises(
        PromptError,
        match=r"prompts is one text; give a list of prompts, also for a single one: \[text\]",
    ):
        batch_generate(engine, "hi")
    for name, value in (("kv_bits", 8), ("prefill_chunk", 7), ("compiled", False)):
        with pytest.raises(
            OptionError,
            match=f"{name} is an option of the engine, not of a request; give it to the Batch",
        ):
            BatchEngine(engine).submit("a", **{name: value})
    with pytest.raises(
        OptionError,
        match="max_tokens is an option of a request, not of the engine; give it to submit",
    ):
        BatchEngine(engine, max_tokens=3)
    with pytest.raises(OptionError, match="draft_tokens is 3, but nothing drafts"):
        BatchEngine(engine).submit("a", draft_tokens=3)
    full = BatchEngine(engine, 1, max_waiting=2)
    full.submit("a"), full.submit("b")
    with pytest.raises(
        BusyError,
        match="2 requests wait already; read events until some have ended, or give a larger",
    ):
        full.submit("c")
    assert [quarters(n) for n in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, 24]
