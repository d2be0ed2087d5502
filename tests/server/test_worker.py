"""The worker: requests are cancelled at any moment, run out of time, and outlive a failing step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from serving import SECONDS
from small import random_engine

from openelm_mlx import BatchEngine, PromptCache, stream_generate
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.request import Event
from openelm_mlx.server.errors import ApiError
from openelm_mlx.server.worker import Ticket, Worker

PROMPT = [1, 9, 30, 12, 9, 30, 12, 9]
LONG = [1, *(3 + 7 * place % 60 for place in range(300))]
LENGTH = 8


@pytest.fixture(scope="module")
def engine(tiny: Engine) -> Engine:
    return random_engine(tiny, 3)


class Asked:
    """A ticket, and what its sink got."""

    def __init__(
        self, batch: BatchEngine, prompt: list[int] = PROMPT, length: int = LENGTH
    ) -> None:
        self.events: list[Event] = []
        self.errors: list[Exception] = []
        self.bell = asyncio.Event()
        options = GenerationOptions(max_tokens=length, ignore_eos=True)
        self.ticket = Ticket(batch, prompt, SamplingOptions(), options, "", self.put)

    def put(self, new: list[Event] | Exception) -> None:
        if isinstance(new, Exception):
            self.errors.append(new)
        else:
            self.events += new
        self.bell.set()

    @property
    def tokens(self) -> list[int]:
        return [event.token for event in self.events]

    async def until(self, count: int) -> None:
        """Wait until so many events have come, or an error."""
        while len(self.events) < count and not self.errors:
            self.bell.clear()
            await self.bell.wait()


def run(test: Callable[[], Awaitable[Any]]) -> None:
    """Run a test on an event loop of its own."""

    async def limited() -> None:
        async with asyncio.timeout(SECONDS):
            await test()

    asyncio.run(limited())


def alone(engine: Engine, prompt: list[int] = PROMPT, length: int = LENGTH) -> list[int]:
    events = stream_generate(engine, prompt, max_tokens=length, ignore_eos=True)
    return [event.token for event in events]


def test_requests_give_what_they_give_alone(engine: Engine):
    async def test() -> None:
        worker, batch = Worker(), BatchEngine(engine, 2)
        asked = [Asked(batch), Asked(batch, LONG), Asked(batch, PROMPT[:3])]
        for one in asked:
            worker.submit(one.ticket)
        assert (worker.active, worker.waiting, worker.load(batch)) == (0, 3, 3)
        await asked[0].until(1)
        assert worker.active >= 1
        await worker.drain()
        assert [one.tokens for one in asked] == [
            alone(engine),
            alone(engine, LONG),
            alone(engine, PROMPT[:3]),
        ]
        assert (worker.active, worker.waiting, worker.load(batch)) == (0, 0, 0)
        assert all(one.ticket.timer.cancelled() for one in asked)

    run(test)


def test_requests_that_come_together_after_a_rest_get_their_first_tokens_in_one_step(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("openelm_mlx.server.worker.TOGETHER", 0.2)
    monkeypatch.setattr("openelm_mlx.server.worker.TOGETHER_AT_MOST", SECONDS)

    async def test() -> None:
        worker, batch = Worker(), BatchEngine(engine, 3)
        asked = [Asked(batch, length=2) for _ in range(3)]
        for one in asked:
            worker.submit(one.ticket)
            await asyncio.sleep(0.01)
        await asked[0].until(1)
        assert [len(one.events) for one in asked] == [1, 1, 1]

    run(test)


@pytest.mark.parametrize("moment", ["submitted", "waiting", "prefill", "running", "ended"])
def test_a_request_that_is_cancelled_frees_its_place_and_disturbs_no_other(
    engine: Engine, moment: str
):
    async def test() -> None:
        worker = Worker()
        batch = BatchEngine(engine, 1 if moment == "waiting" else 2, admission=8)
        other = Asked(batch, length=40)
        gate = threading.Event()
        one = Asked(batch, LONG if moment == "prefill" else PROMPT[:3])
        worker.submit(other.ticket)
        await other.until(1)
        if moment == "submitted":  # the device's thread is busy with something else
            held = asyncio.ensure_future(worker.call(lambda: gate.wait(SECONDS)))
            await asyncio.sleep(0)
        worker.submit(one.ticket)
        if moment in ("waiting", "prefill"):
            await other.until(len(other.events) + 3)
            assert one.events == [] and one.ticket.number is not None
        elif moment != "submitted":
            await one.until(2 if moment == "running" else LENGTH)
        worker.cancel(one.ticket)
        seen = len(one.events)
        worker.cancel(one.ticket)  # once more changes nothing
        gate.set()
        if moment == "submitted":
            assert await held
        await worker.call(lambda: None)
        assert (one.ticket.number is None) == (moment == "submitted")
        assert worker.load(batch) == (not other.ticket.gone)
        await worker.drain()
        assert len(one.events) == seen and one.errors == []
        assert other.tokens == alone(engine, length=40)
        assert not await worker.call(lambda: batch.busy)

    run(test)


def test_a_request_that_takes_too_long_ends_with_504(engine: Engine):
    async def test() -> None:
        worker, batch = Worker(seconds=1e-3), BatchEngine(engine)
        one = Asked(batch, LONG, 200)
        worker.submit(one.ticket)
        await worker.drain()
        await one.until(201)
        (error,) = one.errors
        assert isinstance(error, ApiError) and error.status == 504
        assert "not complete after 0.001 seconds" in str(error)
        assert not await worker.call(lambda: batch.busy)

    run(test)


def test_a_failing_step_ends_its_requests_and_the_others_go_on(
    engine: Engine, caplog: pytest.LogCaptureFixture
):
    def broken() -> list[tuple[int, Event]]:
        del batch.step  # the next step is sound again
        raise RuntimeError("out of memory")

    batch = BatchEngine(engine, prompt_cache=PromptCache())

    async def test() -> None:
        worker, sound = Worker(), BatchEngine(engine)
        asked = [Asked(batch, length=30), Asked(batch, LONG), Asked(sound, length=30)]
        for one in asked:
            worker.submit(one.ticket)
        await asked[0].until(1)
        await worker.call(lambda: setattr(batch, "step", broken))
        await worker.drain()
        assert [[error.status for error in one.errors] for one in asked] == [[500], [500], []]
        assert asked[2].tokens == alone(engine, length=30)
        assert not await worker.call(lambda: batch.busy or len(batch.prompt_cache))
        again = Asked(batch)
        worker.submit(again.ticket)
        await worker.drain()
        assert again.tokens == alone(engine)

    run(test)
    assert "out of memory" in caplog.text


def test_a_request_that_the_engine_refuses_gets_its_error(engine: Engine):
    async def test() -> None:
        worker, batch = Worker(), BatchEngine(engine)
        one = Asked(batch, [])
        worker.submit(one.ticket)
        await worker.drain()
        assert "the prompt is empty" in str(one.errors[0]) and one.events == []

    run(test)


def test_busy_batches_take_turns(engine: Engine):
    async def test() -> None:
        worker = Worker()
        asked = [Asked(BatchEngine(engine), length=20) for _ in range(2)]
        for one in asked:
            worker.submit(one.ticket)
        await asked[0].until(10)
        assert len(asked[1].events) >= 8
        await worker.drain()

    run(test)
