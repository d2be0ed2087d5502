"""An answer that is sent while it comes waits for its events."""

from __future__ import annotations

import asyncio

import pytest
from serving import SECONDS

from openelm_mlx.engine.request import Event
from openelm_mlx.errors import PromptError
from openelm_mlx.server.stream import ClientLeft, Inbox

EVENT = Event("a", 5)


def test_a_reader_gets_nothing_once_its_patience_ends_and_events_at_once() -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SECONDS):
            inbox, begun = Inbox(0.05), loop.time()
            assert await inbox.get() == [] and await inbox.get() == []
            assert loop.time() - begun >= 0.1
            inbox.put(0, [EVENT])
            inbox.put(1, [EVENT, EVENT])
            assert await inbox.get() == [(0, [EVENT]), (1, [EVENT, EVENT])]
            loop.call_later(0.01, inbox.put, 0, [EVENT])
            assert await inbox.get() == [(0, [EVENT])]
            inbox.close()

    asyncio.run(test())


def test_a_reader_gets_what_came_before_an_error_but_nothing_once_its_client_left() -> None:
    async def test() -> None:
        async with asyncio.timeout(SECONDS):
            inbox = Inbox(SECONDS)
            inbox.put(0, [EVENT])
            inbox.put(0, PromptError("too long"))
            inbox.check()
            assert await inbox.get() == [(0, [EVENT])]
            with pytest.raises(PromptError, match="too long"):
                await inbox.get()
            inbox.close()
            inbox = Inbox(SECONDS)
            inbox.put(0, [EVENT])
            asyncio.get_running_loop().call_soon(inbox.leave)
            assert await inbox.get() == [(0, [EVENT])]
            inbox.put(0, [EVENT])
            await asyncio.sleep(0)
            with pytest.raises(ClientLeft):
                await inbox.get()
            inbox.close()

    asyncio.run(test())
