"""Steps that write to their buffers in place, as kernels do: nobody else has a part in a buffer.

The kernel runs in an emulator, which writes to MLX's memory. Answers are those of the twin, which
leaves old arrays as they were.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
from batches import PROMPTS
from kept import KINDS, TOKENS, prefilled
from metal_emulator import Emulator
from small import random_engine, random_model

from openelm_mlx import BatchEngine, PromptCache, batch_generate, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.engine.rows import Rows
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.kernels.kernel import running

pytestmark = pytest.mark.needs("emulated kernels")
ONLY = frozenset({"norm_rope_store"})
SETTINGS = [{}, {"kv_bits": 8}, {"kv_bits": 4}, {"kv_window": 24}, {"kv_window": 24, "kv_bits": 8}]
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=str)
LONG = [1] + [(5 * i * i + 3 * i) % 60 + 3 for i in range(299)]


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


@contextmanager
def in_place():
    emulator = Emulator()
    with running(emulator, ONLY):
        yield
    assert emulator.launches


def alone(engine, prompt, **settings):
    """What the twin draws, without any cache."""
    events = stream_generate(engine, prompt, ignore_eos=True, compiled=False, **settings)
    return [event.token for event in events]


def drawn(batch, steps=999):
    """The tokens of all requests, by number."""
    found: dict[int, list[int]] = {}
    while batch.busy and steps:
        steps -= 1
        for number, event in batch.step():
            found.setdefault(number, []).append(event.token)
    return found


@each_setting
def test_requests_with_the_same_prompt_have_rows_of_their_own(engine, settings):
    """The last two run on when the others have ended, in rows that were the fourth and fifth."""
    draws = [{"temperature": 1.0, "seed": k, "max_tokens": 3 + 9 * (k > 2)} for k in range(5)]
    wanted = [alone(engine, LONG[:256], **one, **settings) for one in draws]
    with in_place():
        batch = BatchEngine(engine, 8, compiled=False, admission=999, **settings)
        numbers = [batch.submit(LONG[:256], ignore_eos=True, **one) for one in draws]
        found = drawn(batch)
    assert [found[number] for number in numbers] == wanted


@each_setting
@pytest.mark.parametrize("slots", [1, 3])
def test_a_cached_prefix_is_used_twice_and_goes_on_itself(engine, settings, slots):
    """Answers fork from a prompt in the store, and go over all that a window has to spare."""
    store, stem, count = PromptCache(), LONG[:70], 40 if "kv_window" in settings else 8
    forks = [[*stem, 7, 8], [*stem, 9], [*stem, 7, 8, 11]]
    wanted = [alone(engine, fork, max_tokens=count, **settings) for fork in forks]
    with in_place():
        list(stream_generate(engine, stem, prompt_cache=store, max_tokens=1, **settings))
        for _ in range(2):
            batch = BatchEngine(engine, slots, compiled=False, prompt_cache=store, **settings)
            more = {"max_tokens": count, "ignore_eos": True}
            numbers = [batch.submit(fork, **more) for fork in forks]
            found = drawn(batch)
            assert [found[number] for number in numbers] == wanted


@each_setting
def test_saving_and_cancelling_while_others_run(engine, settings, tmp_path):
    """What is in the store stays as it was put there, whatever runs on."""
    store, path = PromptCache(), tmp_path / "cache.safetensors"
    prompts = [LONG[:40], LONG[:30], PROMPTS[2]]
    wanted = [alone(engine, prompt, max_tokens=20, **settings) for prompt in prompts]
    with in_place():
        batch = BatchEngine(engine, 4, compiled=False, prompt_cache=store, **settings)
        numbers = [batch.submit(one, max_tokens=20, ignore_eos=True) for one in prompts]
        found = drawn(batch, steps=9)
        batch.cancel(numbers[0])
        kept = store.tokens
        store.save(path, engine)
        found = {number: found[number] + rest for number, rest in drawn(batch).items()}
        assert [found[number] for number in numbers[1:]] == wanted[1:]
        loaded = PromptCache.load(path, engine, EngineOptions(**settings))
        for cache in (loaded, store):
            more = {"max_tokens": 5, "compiled": False, "ignore_eos": True, **settings}
            events = list(stream_generate(engine, [*kept, 5], prompt_cache=cache, **more))
            assert events[-1].stats.reused_tokens == len(kept)
            assert [event.token for event in events] == alone(
                engine, [*kept, 5], max_tokens=5, **settings
            )


@each_setting
def test_a_pass_that_is_run_again(engine, settings):
    """A function of the caller's raises at every third call, of which each row makes one a step."""
    prompts, calls = [LONG[:50], LONG[3:20]], count()
    wanted = [alone(engine, prompt, max_tokens=20, **settings) for prompt in prompts]

    class Guess:
        def propose(self, known, length):
            if next(calls) % 3 == 2:
                raise RuntimeError("mine")
            return [5] * length

    with in_place():
        batch = BatchEngine(engine, 2, compiled=False, draft=Guess(), **settings)
        numbers = [batch.submit(one, max_tokens=20, ignore_eos=True) for one in prompts]
        found: dict[int, list[int]] = {}
        while batch.busy:
            try:
                events = batch.step()
            except RuntimeError:
                continue
            for number, event in events:
                found.setdefault(number, []).append(event.token)
    assert [found[number] for number in numbers] == wanted


def test_a_draft_model_writes_in_place_too(engine):
    draft = random_engine(engine, seed=1, noise=0.3)
    given = {"max_tokens": 20, "ignore_eos": True, "compiled": False, "adaptive_draft": False}
    wanted = [alone(engine, prompt, max_tokens=20) for prompt in PROMPTS[:3]]
    with in_place():
        results = batch_generate(engine, PROMPTS[:3], draft=draft, **given)
    assert [list(result.tokens) for result in results] == wanted


def test_a_cache_that_was_full_and_shrank_is_written_to(engine):
    """A prompt that fills its block to the end leaves views of its heads in place of buffers."""
    kind, found = CacheKind(), []
    for names in frozenset(), ONLY:
        cache, rows = prefilled(engine.model, kind, LONG[:256]), Rows(engine.config, kind)
        cache.offset = 250
        rows.place(0, cache)
        with running(Emulator(), names):
            caches = step_caches(rows.lend([251]), mx.array([250]), kind)
            found.append(engine.model.hidden(mx.array([5]), caches, last=True))
    assert mx.allclose(*found, atol=1e-4).item()


# --- memory


def memory(cache: KVCache | Rows) -> dict[int, mx.array]:
    """The arrays of a cache by the addresses of their buffers."""
    layers = cache.arrays if isinstance(cache, KVCache) else cache.buffers
    mx.eval(layers)
    return {np.asarray(memoryview(a)).ctypes.data: a for layer in layers for a in layer}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_copies_share_no_memory(kind):
    model, rows = random_model(seed=1), Rows(random_model(seed=1).args, kind)
    cache = prefilled(model, kind, TOKENS[:64])
    rows.resize([], 2)
    rows.place(0, cache)
    rows.place(1, cache)
    rows.lend([64, 64])
    held = memory(cache)  # arrays that are held keep their addresses
    arrays, whole = len(held), cache.prefix(64)
    copies = [whole, whole.prefix(64), rows, rows.extract(0, 64), cache.row(0, 64)]
    for change in ([1, 0], 2), ([1], 1), ([0], 2):
        held |= {address: array for copy in copies for address, array in memory(copy).items()}
        arrays += len(copies) * len(memory(cache))
        assert len(held) == arrays
        rows.resize(*change)
        copies = [rows]


@pytest.mark.parametrize("change", ["extract", "cut", "take", "grow", "place"])
@pytest.mark.parametrize("kernel", ["norm_rope_store", "store_and_attend"])
def test_what_a_pass_still_writes_is_waited_for(change, kernel):
    """Where a kernel writes in place, the buffers are ready before anything but a pass reads."""
    model, rows = random_model(seed=1), Rows(random_model(seed=1).args, CacheKind())
    cache, count = prefilled(model, CacheKind(), TOKENS[:40]), 1 if change == "extract" else 2
    rows.resize([], count)
    rows.place(0, cache.prefix(40))
    changes = {
        "extract": lambda: rows.extract(0, 40),
        "cut": lambda: rows.resize([0], 1),
        "take": lambda: rows.resize([1, 0], 2),
        "grow": lambda: rows.lend([200, 0]),
        "place": lambda: rows.place(1, cache),
    }
    written = [[a + 1 for a in arrays] for arrays in rows.buffers]  # by a pass under way
    mx.eval(cache.arrays, rows.buffers)
    held, before = rows.buffers, mx.get_active_memory()
    rows.restore(written)
    with running(Emulator(), frozenset({kernel})):
        changes[change]()
    ready = mx.get_active_memory() - before
    assert ready > 0.9 * sum(a.nbytes for arrays in held for a in arrays)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What is called of rows of keys and values, in order."""
    made: list[str] = []

    def recorded(name):
        real = getattr(Rows, name)

        def call(self, *given):
            made.append(name)
            return real(self, *given)

        monkeypatch.setattr(Rows, name, call)

    for name in ("settle", "lend"):
        recorded(name)
    return made


def test_passes_that_are_forgotten_are_waited_for(engine, calls):
    """They may write to the same slots as those that follow, on which they do not depend."""
    draft = random_engine(engine, seed=1, noise=0.3)
    batch = BatchEngine(engine, 1, compiled=False, draft=draft)
    batch.submit(LONG[:20], max_tokens=20, ignore_eos=True)
    for _ in range(3):
        batch.step()
    batch._lanes[0].restart()
    calls.clear()
    batch.step()
    assert calls[:3] == ["settle", "settle", "lend"]  # the rows, and those of the draft model


def test_what_a_draft_model_reads_by_the_way_is_waited_for(engine, calls):
    """The pass that drafts writes after it, and depends on nothing else that it computes."""
    draft = random_engine(engine, seed=1, noise=0.3)
    given = {"max_tokens": 30, "prompt_lookup": 1, "draft_tokens": 3, "adaptive_draft": False}
    alone(engine, LONG[:60], draft=draft, **given)
    feeds = [at for at, call in enumerate(calls) if call == "settle" and calls[at - 1] == "lend"]
    assert ("feed", False) in draft.steps._made
    assert any(calls[at + 1 : at + 2] == ["lend"] for at in feeds)
