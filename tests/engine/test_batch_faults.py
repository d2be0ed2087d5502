"""A batch that is interrupted or cancelled, or whose caller raises, loses nothing."""

import sys
from dataclasses import replace

import pytest
from batches import OPTIONS, PROMPTS, SAMPLING, alone
from interrupts import InterruptAt, finished
from small import random_engine

from openelm_mlx import BatchEngine, PromptCache, batch_generate, stream_generate
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.request import Request
from openelm_mlx.errors import PromptError


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


def test_cancelling_one_leaves_the_others(engine):
    batch = BatchEngine(engine, slots=2)
    numbers = [batch.submit(PROMPTS[k], SAMPLING[k], OPTIONS[8]) for k in range(4)]
    tokens: dict[int, list] = {number: [] for number in numbers}
    for step in range(300):
        if step == 4:
            assert (
                batch.cancel(numbers[0])
                and batch.cancel(numbers[3])
                and not batch.cancel(numbers[0])
            )
        for number, event in batch.step():
            tokens[number].append(event.token)
        if not batch.busy:
            break
    assert len(tokens[numbers[0]]) == 4 and tokens[numbers[3]] == []
    for k in (1, 2):
        assert tokens[numbers[k]] == [event.token for event in alone(engine, k, options=OPTIONS[8])]
    batch.submit(PROMPTS[0])
    batch.step()
    batch.close()
    assert not batch.busy and alone(engine, 0)


@pytest.mark.parametrize("settings", [{}, {"kv_window": 24}], ids=str)
def test_an_interrupt_anywhere_loses_nothing(engine, settings):
    """Requests go on with the tokens that they get alone, and the prefix cache contains what it
    says.
    """
    draft = random_engine(engine, seed=1, noise=0.3)
    options = [GenerationOptions(max_tokens=4 + 3 * k, ignore_eos=True) for k in range(4)]
    wanted = [[e.token for e in alone(engine, k, options=options[k], **settings)] for k in range(4)]
    for line in range(150, 15000, 587):
        store, interrupt = PromptCache(), InterruptAt(line)
        batch = BatchEngine(engine, 4, draft=draft, prompt_cache=store, **settings)
        for k in range(4):
            batch.submit(PROMPTS[k], SAMPLING[k], options[k])
        assert sorted(finished(batch, interrupt), key=len) == wanted, line
        for entry in list(store._entries)[-2:]:
            longer, more = [*entry.tokens, 7, 8], {"max_tokens": 3, "ignore_eos": True, **settings}
            kept = [e.token for e in stream_generate(engine, longer, prompt_cache=store, **more)]
            assert kept == [e.token for e in stream_generate(engine, longer, **more)], line
        if not interrupt.done:
            break
    assert line > 5000


@pytest.mark.parametrize("what", ["stop", "choices"])
def test_an_interrupt_while_an_event_is_made_loses_nothing(tiny, what):
    """The token is drawn again: tokens, text, reason and counts are those without an interrupt."""
    small = random_engine(tiny, 1, tiny.vocab)

    def events(settings, interrupt=None):
        batch, found = BatchEngine(small, 1), []
        batch.submit(
            "Once upon a time", SamplingOptions(temperature=1.0, seed=2), max_tokens=6, **settings
        )
        while batch.busy:
            try:
                if interrupt is not None and not interrupt.done:
                    sys.settrace(interrupt)
                found += [event for _, event in batch.step()]
            except KeyboardInterrupt:
                continue
            finally:
                sys.settrace(None)
        last = found[-1].stats
        counts = (last.prompt_tokens, last.generation_tokens, last.seed)
        shown = [(one.token, one.text, len(one.top_logprobs), one.finish_reason) for one in found]
        return shown, counts

    settings = {"choices": ("the end", "then the rest"), "logprobs": 2}
    if what == "stop":  # the ends of two tokens begin one, and are held back
        plain = [text for _, text, _, _ in events({})[0]]
        settings = {"stop": tuple(f"{plain[at][-3:]} or more" for at in (2, 4))}
    wanted, line, interrupted = events(settings), 1, True
    assert what != "stop" or [text for _, text, _, _ in wanted[0]] != plain
    while interrupted:
        interrupt = InterruptAt(line, Request.take)
        assert events(settings, interrupt) == wanted, line
        line, interrupted = line + 13, interrupt.done
    assert line > 70


def fails(times, call=lambda *given: None):
    """A function of the caller's that raises so many times, and then does what `call` does."""
    left = iter(range(times))

    def function(*given):
        if next(left, None) is not None:
            raise RuntimeError("mine")
        return call(*given)

    return function


def test_what_functions_of_the_caller_raise_loses_nothing(engine):
    options = GenerationOptions(max_tokens=9, ignore_eos=True)

    class Guess:
        propose = staticmethod(fails(3, lambda known, length: [5] * length))

    batch = BatchEngine(engine, 4, draft=Guess(), admission=1 << 30)
    wanted = [[e.token for e in alone(engine, k, options=options)] for k in range(4)]
    for k in range(4):
        processor = fails(2, lambda logits, newest, positions: logits) if k == 1 else None
        batch.submit(
            PROMPTS[k], replace(SAMPLING[k], processor=processor), options, progress=fails(k)
        )
    assert sorted(finished(batch)) == sorted(wanted)


@pytest.mark.parametrize(
    "rows", [1, 4]
)  # it fails for the first tokens of all, or in a step of several
def test_a_request_that_always_fails_can_be_cancelled(engine, rows):
    def processor(logits, newest, positions):
        if logits.shape[0] >= rows:
            raise RuntimeError("mine")
        return logits

    batch = BatchEngine(engine, 4)
    options = GenerationOptions(max_tokens=9, ignore_eos=True)
    for _ in range(3):
        batch.submit(PROMPTS[0], options=options)
    batch.step()
    failing = batch.submit(PROMPTS[4], SamplingOptions(processor=processor), options)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="mine"):
            for _ in range(9):
                batch.step()
    assert batch.cancel(failing)
    batch.step()
    assert len(finished(batch)) == 3


def test_a_prompt_that_is_cancelled_is_prefilled_no_further(engine):
    batch = BatchEngine(engine, 4, prompt_cache=PromptCache(), admission=16)
    batch.submit(PROMPTS[0], max_tokens=40, ignore_eos=True)
    batch.step()
    long = batch.submit(PROMPTS[8], max_tokens=4)
    batch.step()
    assert batch.cancel(long) and not batch.cancel(long)
    assert batch.prompt_cache.tokens == PROMPTS[8][:16]
    batch.step()
    pair = [batch.submit(PROMPTS[1], max_tokens=4) for _ in range(2)]  # one of several in a pass
    assert batch._queue.begin(8, 99).requests[1].number == pair[1] and batch.cancel(pair[0])
    events = [one for _ in range(8) for one in batch.step()]
    assert {number for number, _ in events} == {1, pair[1]}


def test_a_wrong_prompt_fails_alone(engine):
    results = batch_generate(engine, [PROMPTS[0], "", [1] * 999, PROMPTS[1]], max_tokens=3)
    assert [result.error is None for result in results] == [True, False, False, True]
    assert isinstance(results[1].error, PromptError) and "context is 512" in str(results[2].error)
    assert len(results[3].tokens) == 3
