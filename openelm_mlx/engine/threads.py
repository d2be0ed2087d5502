"""The thread that drives the device: the main thread, or one worker that never ends.

Any thread may drive a generation, and another one may go on with it. Three facts of MLX (0.32) call
for this module:

- A thread owns traces of compiled functions and the state of random numbers, Python objects among
  them. When it ends, C++ destroys them after `join` has returned, in a race with the interpreter's
  exit that kills the process.
- An array that is not evaluated yet belongs to the stream that was current when it was made. Each
  thread has a current stream of its own, and another thread cannot evaluate on it.
- Two threads must not use a stream at the same time, nor the arrays that modules make and keep.

So the work of other threads is done by a worker that is never joined; it and the main thread take
turns, and use the same stream.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from functools import cache, partial, wraps
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from openelm_mlx.device import mx

if TYPE_CHECKING:
    from concurrent.futures import Future  # imported late below: the command line has one thread

T = TypeVar("T")
P = ParamSpec("P")

MAIN = threading.main_thread().ident
EXIT_SECONDS = 60.0  # how long the exit of the process waits for the worker's current piece of work


class Device:
    """The device, the thread whose turn it is, and the work that waits for it."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.user: int | None = None  # the thread whose turn it is
        self.worker: int | None = None
        self.line: deque[tuple[Callable[[], Any], Future[Any]]] = deque()  # the worker's work
        self.bell: SimpleQueue[None] = SimpleQueue()  # rung at least once for each piece of work
        self.workers: dict[str, threading.Thread] = {}
        self.at_rest, self.closed = threading.Event(), False

    def run(self, call: Callable[[], T], stream: mx.Stream) -> T:
        """Wait for this thread's turn, and return `call()` with `stream` as the current one."""
        thread = threading.get_ident()
        with self.turn:
            try:
                self.user = thread
                with mx.stream(stream):
                    return call()
            finally:
                self.user = None

    def hand_over(self, call: Callable[[], T]) -> Future[T]:
        """Let the worker make a call, after those that are in line."""
        from concurrent.futures import Future

        if not self.workers:
            worker = threading.Thread(target=self.work, name="openelm-device", daemon=True)
            if self.workers.setdefault("the only one", worker) is worker:  # two threads may be here
                atexit.register(self.rest)
                worker.start()
        future: Future[T] = Future()
        work = partial(self.run, call, shared_stream())
        self.line.append((work, future))
        self.bell.put(None)
        return future

    def work(self) -> None:
        """Do what is in line, until the process ends."""
        self.worker = threading.get_ident()
        while not self.closed:
            self.bell.get()
            while self.line and not self.closed:
                answer(*self.line[0])
                self.line.popleft()  # not before: while anything is in line, the main thread queues
        self.at_rest.set()
        threading.Event().wait()  # for ever, as this thread must not end

    def rest(self) -> None:
        """Stop the worker between two pieces of work; the exit would stop it within one."""
        self.closed = True
        self.bell.put(None)
        self.at_rest.wait(EXIT_SECONDS)


def answer(work: Callable[[], Any], future: Future[Any]) -> None:
    """Do a piece of work. An idle worker keeps no reference to it, because this is a function."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
    del work, future  # the traceback of an error refers to this frame


device = Device()


def shared_stream() -> mx.Stream:
    """Return the stream of all generations on this device; only who has the turn may use it."""
    return stream_of(mx.default_device().type)  # equal devices have different hashes


@cache
def stream_of(kind: mx.DeviceType) -> mx.Stream:
    """Return the one stream for a kind of device."""
    return mx.new_thread_unsafe_stream(mx.Device(kind))


def on_device(call: Callable[[], T]) -> T:
    """Return `call()`, made on the main thread or by the worker; its errors are raised here.

    The main thread makes it itself, unless others are in line. So does a thread within a call, and
    the worker when the garbage collector closes something on it, as it cannot wait for itself.
    """
    thread = threading.get_ident()
    if thread == device.user or (device.closed and thread == MAIN):
        return call()
    if thread == device.worker or (thread == MAIN and not device.line):
        return device.run(call, shared_stream())
    return device.hand_over(call).result()


def device_work(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function or method that runs on the device whichever thread calls it."""

    @wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        return on_device(partial(function, *args, **named))

    return run


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return `mx.compile(function)`, a separate one for each thread that calls it.

    When a compiled function is freed, MLX forgets its traces in the thread that called it last. A
    trace of another thread would be run there for the next function at the same address.
    """
    traced: dict[int, Callable[P, T]] = {}

    @wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> T:
        thread = threading.get_ident()
        if thread not in traced:
            traced[thread] = mx.compile(function)
        return traced[thread](*args, **named)

    return run


async def asynchronous(start: Callable[[], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """Yield from the generator that `start` makes, and leave the event loop free meanwhile.

    When it is cancelled or closed, it closes the generator after the current step, and waits for
    that.
    """
    from asyncio import shield, wrap_future

    made: list[Generator[T, None, None]] = []  # by the worker, as this thread must never wait

    def close() -> None:
        for events in made:
            events.close()

    try:
        await wrap_future(device.hand_over(lambda: made.append(start())))
        while (
            event := await wrap_future(device.hand_over(partial(next, made[0], None)))
        ) is not None:
            yield event
    finally:
        await shield(wrap_future(device.hand_over(close)))
