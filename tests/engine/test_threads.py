"""A generation may be driven from any thread and from asyncio, and the process ends cleanly
afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
from other_thread import elsewhere, settle
from small import random_model

from openelm_mlx.device import mx
from openelm_mlx.engine.threads import MAIN, asynchronous, compiled, device, device_work, on_device

T = TypeVar("T")


def powers(closed: list[str]) -> Generator[float, None, None]:
    """1, 2, 4, ... the next one never evaluated when one is yielded."""
    value = mx.array(1.0)
    try:
        while True:
            value, now = value * 2, value
            yield on_device(now.item)
    finally:
        closed.append(threading.current_thread().name)


def test_the_main_thread_works_itself_and_others_share_one_worker() -> None:
    assert on_device(threading.get_ident) == MAIN
    first, second = (elsewhere(lambda: on_device(threading.current_thread)) for _ in range(2))
    assert first is second and first.daemon and first.ident != MAIN


def test_an_unfinished_computation_goes_on_in_any_thread() -> None:
    kept = {"x": mx.ones(3)}

    @device_work
    def double() -> None:
        kept["x"] = kept["x"] * 2  # not evaluated, so it needs the stream it was made on

    for there in (True, False, True, True, False, False):
        elsewhere(double) if there else double()
    assert (
        on_device(kept["x"].tolist) == [64.0] * 3
        and elsewhere(lambda: on_device(kept["x"].tolist)) == [64.0] * 3
    )


def test_errors_travel_and_the_worker_goes_on() -> None:
    def wrong(error: BaseException) -> None:
        raise error

    for error in (ValueError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            elsewhere(lambda error=error: on_device(lambda: wrong(error)))  # type: ignore[misc]
        assert caught.value is error
    assert elsewhere(lambda: on_device(lambda: 7)) == 7


def test_work_within_work_is_a_plain_call() -> None:
    def nested() -> tuple[int, int]:
        return threading.get_ident(), on_device(threading.get_ident)

    for here, inner in (on_device(nested), elsewhere(lambda: on_device(nested))):
        assert here == inner


def between(call: Callable[[], T]) -> T:
    """Call in the worker, where a piece of work has ended and the next one has not begun."""
    begin, made = threading.Event(), Future[T]()
    device.hand_over(lambda: begin.wait(30)).add_done_callback(lambda _: made.set_result(call()))
    begin.set()
    return made.result(30)


def test_the_collector_may_close_a_generation_in_the_midst_of_work_and_after_it() -> None:
    class Abandoned:
        """A cycle: only the collector ends it."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            closed.append(on_device(threading.get_ident))

    for run in (on_device, lambda call: elsewhere(lambda: on_device(call)), between):
        closed: list[int] = []
        Abandoned()
        thread = run(lambda: (gc.collect(), threading.get_ident())[1])
        assert closed == [thread]


def test_the_main_thread_lines_up_behind_others() -> None:
    begun, done, lengths = threading.Event(), threading.Event(), []

    def occupy() -> bool:
        begun.set()
        return done.wait(30)

    def release() -> None:
        for _ in range(1000):
            if len(device.line) == 2:
                break
            threading.Event().wait(0.001)
        lengths.append(len(device.line))
        done.set()

    with ThreadPoolExecutor(2) as pool:
        pool.submit(on_device, occupy)
        begun.wait(30)
        pool.submit(release)
        assert on_device(threading.get_ident) != MAIN
    assert lengths == [2]


def test_one_works_at_a_time() -> None:
    order: list[str] = []
    other = threading.Thread(target=lambda: on_device(lambda: order.append("other")))

    def first() -> None:
        other.start()
        other.join(0.1)  # in vain
        order.append("first")

    on_device(first)
    other.join()
    assert order == ["first", "other"]


def test_a_compiled_function_never_runs_the_trace_of_an_earlier_one() -> None:
    """MLX finds traces by the address of the function, and functions that are made anew get the
    same one. A number alone would be part of the kernel, and each a kernel of its own.
    """
    ones = mx.ones(2)
    for number in range(50):
        weight = mx.array([float(number)] * 2)
        add = compiled(lambda x, weight=weight: x * 2 + weight)
        work = device_work(partial(lambda add: add(ones).tolist(), add))
        assert [work(), elsewhere(work)] == [[2.0 + number] * 2] * 2


def test_an_idle_worker_refers_to_nothing() -> None:
    class Big:
        pass

    def ends(error: bool) -> None:
        big = Big()
        kept.append(weakref.ref(big))
        if error:
            raise ValueError(big)

    kept: list[Any] = []
    elsewhere(lambda: on_device(lambda: ends(False)))
    with pytest.raises(ValueError):
        elsewhere(lambda: on_device(lambda: ends(True)))
    settle()
    assert [ref() for ref in kept] == [None, None]


def test_several_streams_share_an_event_loop() -> None:
    closed: list[str] = []

    async def first(count: int) -> list[float]:
        taken = []
        async for value in asynchronous(lambda: powers(closed)):
            taken.append(value)
            if len(taken) == count:
                break
        return taken

    async def main() -> list[list[float]]:
        return await asyncio.gather(*(first(count) for count in (3, 5, 4)))

    assert asyncio.run(main()) == [[2.0**n for n in range(count)] for count in (3, 5, 4)]
    settle()
    assert len(closed) == 3


def test_the_event_loop_is_free_while_the_device_works() -> None:
    released = threading.Event()

    def waits() -> Generator[bool, None, None]:
        yield released.wait(30)

    async def main() -> list[bool]:
        asyncio.get_running_loop().call_later(0, released.set)
        return [value async for value in asynchronous(waits)]

    assert asyncio.run(main()) == [True]


@pytest.mark.parametrize("how", ["cancelled", "closed", "never started"])
def test_a_stream_that_is_given_up_closes_its_generation(how: str) -> None:
    closed: list[str] = []

    async def main() -> None:
        events = asynchronous(lambda: powers(closed))
        if how == "never started":
            await events.aclose()
            return
        assert [await anext(events), await anext(events)] == [1.0, 2.0]
        if how == "closed":
            await events.aclose()
        else:
            task = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert closed == ["openelm-device"]

    asyncio.run(main())
    assert closed == ([] if how == "never started" else ["openelm-device"])


def test_an_error_of_a_stream_is_raised_where_it_is_awaited() -> None:
    def refused() -> Generator[int, None, None]:
        raise ValueError("refused")

    def breaks() -> Generator[int, None, None]:
        yield 1
        raise ValueError("broken")

    async def main(start: Callable[[], Generator[int, None, None]]) -> None:
        async for _ in asynchronous(start):
            pass

    for start, text in ((refused, "refused"), (breaks, "broken")):
        with pytest.raises(ValueError, match=text):
            asyncio.run(main(start))


PROMPT = [1, 50, 60, 10]


def test_a_pass_that_was_never_evaluated_leaves_nothing_of_its_thread() -> None:
    """What modules keep besides their weights is made by whoever comes first."""
    model = random_model(1)
    elsewhere(lambda: [model(mx.array([PROMPT[:1]]))].clear())
    wanted = random_model(1)(mx.array([[5, 6, 7]])).tolist()
    assert on_device(lambda: model(mx.array([[5, 6, 7]])).tolist()) == wanted
