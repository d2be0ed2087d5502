"""One engine in several threads, and in asyncio, gives the tokens that it gives in one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exits import exit_code
from other_thread import elsewhere, settle
from small import random_engine

from openelm_mlx import BatchEngine, Conversation, PromptCache, load, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import OptionError
from openelm_mlx.evaluate.score import score
from openelm_mlx.model.decoder import parameters

PROMPT = [1, 50, 60, 10]


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "filters and penalties": {
        "temperature": 0.8,
        "seed": 3,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "logprobs": 2,
    },
    "drafts": {"prompt_lookup": 2, "adaptive_draft": False},
    "window": {"kv_window": 8, "kv_keep": 2},
    "quantized": {"kv_bits": 8},
}


@pytest.fixture(scope="module")
def small(tiny: Engine) -> Engine:
    return random_engine(tiny, 1)


def tokens_of(engine: Engine, count: int = 10, **settings: Any) -> list[int | None]:
    return [event.token for event in stream_generate(engine, PROMPT, max_tokens=count, **settings)]


@pytest.mark.parametrize("way", WAYS)
def test_every_token_of_a_generation_in_another_thread(small: Engine, way: str) -> None:
    wanted = tokens_of(small, **WAYS[way])
    events = stream_generate(small, PROMPT, max_tokens=10, **WAYS[way])
    threads = (True, False, True, True, False, False, True, False, True, True)
    drawn = [elsewhere(partial(next, events)) if there else next(events) for there in threads]
    assert [event.token for event in drawn] == wanted
    assert (
        elsewhere(lambda: tokens_of(small, **WAYS[way])) == wanted == tokens_of(small, **WAYS[way])
    )


def test_generations_in_several_threads_at_once(small: Engine) -> None:
    def drawn(seed: int) -> list[int | None]:
        return tokens_of(small, 12, temperature=0.8, seed=seed)

    wanted = [drawn(seed) for seed in range(4)]
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(lambda: [drawn(seed) for seed in range(4)]) for _ in range(3)]
        assert [drawn(seed) for seed in range(4)] == wanted
        assert [other.result() for other in others] == [wanted] * 3


def test_one_scheduler_for_several_threads(small: Engine) -> None:
    wanted = [tokens_of(small, 8, temperature=0.8, seed=seed) for seed in range(4)]
    batch, drawn = BatchEngine(small), {}

    def ask(seed: int) -> int:
        return batch.submit(PROMPT, max_tokens=8, temperature=0.8, seed=seed)

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(ask, range(4)))
        while batch.busy:
            step = pool.submit(batch.step).result() if len(drawn) % 2 else batch.step()
            for number, event in step:
                drawn.setdefault(number, []).append(event.token)
    elsewhere(batch.close)
    assert [drawn[number] for number in numbers] == wanted


def test_new_weights_count_in_every_thread(tiny: Engine) -> None:
    """Compiled steps of equal options are made anew, often at the address of those for the weights
    before.
    """
    engine, name, seen = random_engine(tiny, 1), "transformer.norm.weight", []
    norm = parameters(engine.model)[name]
    for seed in range(5):
        noise = mx.random.normal(norm.shape, key=mx.random.key(seed)) * 0.5
        engine.model.load_weights([(name, norm + noise)], strict=False)
        seen.append(tokens_of(engine, compiled=False))
        assert [tokens_of(engine), elsewhere(lambda: tokens_of(engine))] == [seen[-1]] * 2
    assert len(set(map(tuple, seen))) == 5


def test_an_engine_that_was_used_in_two_threads_leaves_no_weights(tiny: Engine) -> None:
    engine = random_engine(tiny, 1, 64, 256)
    size = engine.nbytes
    assert elsewhere(partial(tokens_of, engine)) == tokens_of(engine)
    held = mx.get_active_memory()
    del engine
    gc.collect()
    assert held - mx.get_active_memory() >= size


def test_load_score_and_keep_in_a_thread(tiny: Engine, tmp_path: Path) -> None:
    engine = elsewhere(load)
    assert tokens_of(engine) == tokens_of(tiny)
    assert elsewhere(lambda: score(tiny, [PROMPT])) == score(tiny, [PROMPT])
    cache = PromptCache()
    wanted = elsewhere(lambda: tokens_of(tiny, prompt_cache=cache))
    elsewhere(lambda: cache.save(tmp_path / "kept.safetensors", tiny))
    kept = elsewhere(lambda: PromptCache.load(tmp_path / "kept.safetensors", tiny))
    assert tokens_of(tiny, prompt_cache=kept) == wanted


def test_turns_of_a_conversation_in_different_threads(tiny: Engine) -> None:
    def talk(run: Callable[[Callable[[], str]], str]) -> list[str]:
        conversation = Conversation(tiny, max_tokens=6, seed=1)
        turns = [
            lambda text=text: "".join(e.text for e in conversation.send(text))
            for text in ("Hi", "More", "And?")
        ]
        return [turns[0](), run(turns[1]), turns[2]()]

    assert talk(elsewhere) == talk(lambda turn: turn())


def test_an_interrupted_first_pass_in_a_thread_leaves_nothing_of_it(tiny: Engine) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    engine = load()
    with pytest.raises(KeyboardInterrupt):
        elsewhere(lambda: list(stream_generate(engine, PROMPT, max_tokens=4, progress=interrupt)))
    assert elsewhere(lambda: tokens_of(engine)) == tokens_of(engine) == tokens_of(tiny)


def test_streams_of_an_engine(small: Engine) -> None:
    async def drawn(seed: int) -> list[int | None]:
        settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": seed}
        return [event.token async for event in small.stream(PROMPT, **settings)]

    async def main() -> list[list[int | None]]:
        return await asyncio.gather(*map(drawn, range(4)))

    assert asyncio.run(main()) == [
        tokens_of(small, 12, temperature=0.8, seed=seed) for seed in range(4)
    ]


@pytest.mark.parametrize("how", ["cancel", "aclose", "break"])
def test_a_stream_that_is_given_up_leaves_its_cache(small: Engine, how: str) -> None:
    cache, drawn = PromptCache(), []

    async def take(enough: asyncio.Event) -> None:
        events = small.stream(PROMPT, max_tokens=100, ignore_eos=True, prompt_cache=cache)
        async for event in events:
            drawn.append(event.token)
            if len(drawn) == 3:
                enough.set()
                if how == "break":
                    break
                if how == "aclose":
                    await events.aclose()

    async def main() -> None:
        enough = asyncio.Event()
        task = asyncio.ensure_future(take(enough))
        await enough.wait()
        if how == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await asyncio.wait([task])

    asyncio.run(main())
    settle()
    assert len(drawn) < 6 and cache.tokens[: len(PROMPT) + 2] == [*PROMPT, *drawn[:2]]
    assert tokens_of(small, prompt_cache=cache) == tokens_of(small)


def test_a_stream_refuses_what_a_generation_refuses(small: Engine) -> None:
    async def main() -> None:
        async for _ in small.stream(PROMPT, temprature=1):
            pass

    with pytest.raises(OptionError, match="temprature"):
        asyncio.run(main())


@pytest.mark.parametrize(
    "program", ["threads have ended", "a thread is still at it", "streams are left"]
)
def test_the_process_ends_cleanly(program: str) -> None:
    assert exit_code(program) == 0
