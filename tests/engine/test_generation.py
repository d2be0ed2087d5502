from __future__ import annotations

import random
import time

import numpy as np
import pytest
from small import random_engine

from openelm_mlx import BatchEngine, generate, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.tokenizer import TextFilter
from openelm_mlx.errors import CacheError, OptionError, PromptError
from openelm_mlx.model.cache import KVCache

PROMPT = "Once upon a time"


SAMPLED = {
    "temperature": 0.9,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 7,
}


def tokens_of(engine, prompt=PROMPT, **settings):
    return [event.token for event in stream_generate(engine, prompt, **settings)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 1}, SAMPLED])
def test_compiled_equals_eager(tiny, settings):
    assert tokens_of(tiny, max_tokens=12, **settings) == tokens_of(
        tiny, max_tokens=12, compiled=False, **settings
    )


def test_greedy_equals_argmax_of_full_passes_across_a_cache_block(tiny):
    prompt = tiny.tokenizer.encode(PROMPT * 62)[:250]
    produced = tokens_of(
        tiny, prompt, max_tokens=12, ignore_eos=True
    )  # the 256-token block ends on the way
    logits = tiny.model(mx.array([prompt + produced]))[0, len(prompt) - 1 : -1]
    assert mx.argmax(logits, axis=-1).tolist() == produced


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_prefill_chunks_do_not_matter(tiny, chunk):
    assert tokens_of(tiny, max_tokens=8, prefill_chunk=chunk) == tokens_of(tiny, max_tokens=8)


def test_same_tokens_as_mlx_lm(tiny):
    from mlx_lm import load as their_load
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import KVCache as TheirCache

    model, tokenizer = their_load(str(tiny.path))
    prompt = tiny.tokenizer.encode(PROMPT)
    assert tokenizer.encode(PROMPT) == prompt
    theirs = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=24)]
    assert tokens_of(tiny, max_tokens=24, ignore_eos=True) == theirs
    caches = [TheirCache() for _ in tiny.model.layers]  # and our model, driven through their cache
    whole = tiny.model(mx.array([prompt]))
    parts = [tiny.model(mx.array([[token]]), caches) for token in prompt]
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < 1e-3


def test_reused_prefix_gives_the_same_tokens(tiny):
    cache = PromptCache()
    tokens_of(tiny, max_tokens=10, prompt_cache=cache)
    longer = tiny.tokenizer.encode(PROMPT + " there was a king")
    events = list(stream_generate(tiny, longer, max_tokens=8, prompt_cache=cache))
    assert events[-1].stats.reused_tokens >= len(tiny.tokenizer.encode(PROMPT))
    assert [event.token for event in events] == tokens_of(tiny, longer, max_tokens=8)


def test_closing_midway_leaves_a_true_cache(tiny):
    cache = PromptCache()
    stream = stream_generate(tiny, PROMPT, max_tokens=50, prompt_cache=cache)
    seen = [next(stream).token for _ in range(5)]
    stream.close()
    prompt = tiny.tokenizer.encode(PROMPT)
    assert cache.tokens == prompt + seen
    assert (
        tokens_of(tiny, prompt + seen, max_tokens=5, prompt_cache=cache)
        == tokens_of(tiny, max_tokens=10)[5:]
    )


def test_logprobs_are_the_models_own(tiny):
    event = next(stream_generate(tiny, PROMPT, logprobs=3, max_tokens=2))
    logits = np.array(
        tiny.model(mx.array([tiny.tokenizer.encode(PROMPT)]))[0, -1], dtype=np.float64
    )
    expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert event.logprob == pytest.approx(expected[event.token], abs=1e-3)
    assert [token for token, _ in event.top_logprobs] == np.argsort(-expected)[:3].tolist()


def test_counts_and_reasons(tiny):
    last = list(stream_generate(tiny, PROMPT, max_tokens=5))[-1]
    assert (last.finish_reason, last.stats.generation_tokens) == ("length", 5)
    assert last.stats.prompt_tokens == len(tiny.tokenizer.encode(PROMPT))
    whole = generate(tiny, PROMPT, max_tokens=20)
    word = whole.split()[3]
    assert generate(tiny, PROMPT, max_tokens=20, stop=word) == whole[: whole.index(word)]


def test_the_context_is_used_to_its_last_token(tiny):
    engine = random_engine(tiny, seed=1)
    last = list(
        stream_generate(
            engine, [5] * (engine.config.max_context_length - 2), max_tokens=50, ignore_eos=True
        )
    )[-1]
    assert (last.finish_reason, last.stats.generation_tokens) == (
        "length",
        3,
    )  # the third is never fed


class Letters:
    """A decoder whose tokens are characters."""

    def push(self, token):
        return chr(token)

    def flush(self):
        return ""


def test_stop_strings_are_held_back_until_decided():
    text = TextFilter(Letters(), ("END",))
    assert [text.push(ord(c)) for c in "aENbEND"] == [
        "a",
        "",
        "",
        "ENb",
        "",
        "",
        "",
    ] and text.stopped
    text = TextFilter(Letters(), ("END",))
    assert "".join(text.push(ord(c)) for c in "xEN") + text.flush() == "xEN"


def test_the_earliest_match_in_the_text_wins_however_it_is_cut():
    generator = random.Random(1)

    class Cuts(Letters):
        def push(self, token):
            return token

    for _ in range(3000):
        text = "".join(generator.choice("aabbc") for _ in range(generator.randint(0, 10)))
        stop = tuple(
            "".join(generator.choice("abc") for _ in range(generator.randint(1, 4)))
            for _ in range(3)
        )
        first = min((text.index(one) for one in stop if one in text), default=None)
        filtered, shown, left = TextFilter(Cuts(), stop), "", text
        while left and not filtered.stopped:
            size = generator.randint(1, 4)
            shown, left = shown + filtered.push(left[:size]), left[size:]
            assert text.startswith(shown)
        shown += filtered.flush()
        assert (shown, filtered.stopped) == (text[:first], first is not None), (text, stop)


class Slow:
    """`time.perf_counter` with a reader that needs ten seconds for every event, without anybody
    waiting for them.
    """

    def __init__(self, monkeypatch):
        self.seconds, real = 0.0, time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() + self.seconds)

    def read(self, events):
        for event in events:
            self.seconds += 10
            yield event


@pytest.mark.parametrize("settings", [{}, {"prompt_lookup": 1}])
def test_a_slow_reader_does_not_lower_the_rate(tiny, monkeypatch, settings):
    stats = list(Slow(monkeypatch).read(stream_generate(tiny, PROMPT, max_tokens=20, **settings)))[
        -1
    ].stats
    assert (
        stats.total_seconds > 190 and stats.generation_tokens_per_second > 1
    )  # 0.1 with the reader's time


def test_a_request_of_a_batch_is_timed_from_when_it_runs(tiny, monkeypatch):
    slow, batch = Slow(monkeypatch), BatchEngine(tiny, slots=1)
    numbers = [batch.submit(PROMPT, max_tokens=8) for _ in range(2)]
    found = {}
    while batch.busy:
        found |= {number: event.stats for number, event in slow.read(batch.step())}
    first, second = (found[number] for number in numbers)
    assert first.waiting_seconds < 1 and second.waiting_seconds > 70
    assert max(first.time_to_first_token_seconds, second.time_to_first_token_seconds) < 5
    assert min(first.generation_tokens_per_second, second.generation_tokens_per_second) > 1


def test_the_peak_of_memory_outlives_the_start_of_a_neighbour(tiny):
    long = stream_generate(tiny, PROMPT, max_tokens=8)
    next(long)
    big = mx.zeros((40 << 20,), mx.uint8)
    mx.eval(big)
    del big
    mx.clear_cache()
    short = list(stream_generate(tiny, PROMPT, max_tokens=2))[-1].stats
    assert list(long)[-1].stats.peak_memory_bytes - short.peak_memory_bytes > 30 << 20


def test_random_numbers_are_those_of_the_whole_text(tiny):
    """A model without context: its tokens are the noise alone, so that a dropped turn must change
    nothing.
    """
    flat = random_engine(tiny, seed=1, spread=0.0)
    settings = {"temperature": 1.0, "seed": 4, "max_tokens": 12, "ignore_eos": True}
    whole = tokens_of(flat, [1] * 30, **settings)
    for drafted in ({}, {"draft": random_engine(tiny, seed=2), "draft_tokens": 2}):
        long, short = (
            tokens_of(flat, [1] * n, position_offset=30 - n, **settings, **drafted)
            for n in (30, 11)
        )
        assert long == short and (drafted or long == whole)
    with pytest.raises(
        OptionError, match="position_offset is -1; allowed is a whole number from 0 up"
    ):
        stream_generate(flat, [1], position_offset=-1)


def test_padding_ids_are_never_sampled(tiny):
    padded = random_engine(tiny, seed=1, vocab=tiny.tokenizer.vocab_size + 1000)
    for settings in ({"temperature": 50.0, "seed": 0}, {"prompt_lookup": 1, "draft_tokens": 2}):
        found = [
            e.token
            for e in stream_generate(padded, PROMPT, max_tokens=64, ignore_eos=True, **settings)
        ]
        assert max(found) < padded.vocab == tiny.tokenizer.vocab_size


def test_mistakes(tiny):
    with pytest.raises(PromptError, match="the prompt is empty"):
        stream_generate(tiny, "")
    with pytest.raises(PromptError, match="context is 1024"):
        stream_generate(tiny, [5] * 1025)
    with pytest.raises(PromptError, match="token id 5000 is outside"):
        stream_generate(tiny, [5000])
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        stream_generate(tiny, PROMPT, temprature=1)
    with pytest.raises(OptionError, match="top_p is 1.5; allowed is a number from 0.0 to 1.0"):
        stream_generate(tiny, PROMPT, top_p=1.5)
    with pytest.raises(OptionError, match="allowed is a text of at least one character"):
        stream_generate(tiny, PROMPT, stop=("",))
    with pytest.raises(
        OptionError,
        match=r"stop is 'caf\\udce9'; that is not valid UTF-8, so no generated text contains it",
    ):
        stream_generate(tiny, PROMPT, stop="caf\udce9")
    with pytest.raises(CacheError, match="entries for a model of 8 layers"):
        tiny.model(mx.array([[1]]), KVCache(tiny.config).layers[:1])
