"""The way from a body to the response that answers it, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from openelm_mlx.engine.sampling import new_seed
from openelm_mlx.evaluate.score import likeliest
from openelm_mlx.server.answers import Answer
from openelm_mlx.server.asked import Asked, prepared
from openelm_mlx.server.bodies import SamplingBody
from openelm_mlx.server.metrics import CLIENT_LEFT, Metrics
from openelm_mlx.server.models import Model
from openelm_mlx.server.stream import Exchange
from openelm_mlx.server.worker import Sink, Ticket

T = TypeVar("T")
LONG = 4096  # bytes of a body from which on its prompt is encoded beside the event loop
WHILE = 0.1  # seconds after which it is worth a look whether the client has left


async def answered(
    request: Request,
    body: SamplingBody,
    ask: Callable[[], Asked],
    kind: Callable[..., Answer],
) -> Response:
    """Run what a body asks; return the response, or the one that streams it.

    The time limit counts from here, so that it holds where a model has to be loaded first.
    """
    worker, began = request.app.state.worker, asyncio.get_running_loop().time()
    limit = asyncio.timeout_at(began + worker.seconds)
    try:
        async with limit:
            exchange = await submitted(request, body, ask, kind, began)
    except TimeoutError:
        if not limit.expired():  # it is one of a file system or a network
            raise
        raise worker.late() from None
    if exchange is None:
        return gone()
    if body.stream:
        await exchange.accepted()
        return Streamed(exchange)
    whole = await exchange.whole()
    return gone() if whole is None else json_response(whole)


async def submitted(
    request: Request,
    body: SamplingBody,
    ask: Callable[[], Asked],
    kind: Callable[..., Answer],
    began: float,
) -> Exchange | None:
    """Find the model of a body, and submit what it asks; return None if the client has left."""
    state = request.app.state
    models, worker, options = state.models, state.worker, state.options
    with ExitStack() as stack:
        model, served = await models.use(body.model, stack)
        model.check_room(worker)  # before anything is done for it
        run = beside if body.restricted or len(await request.body()) > LONG else at_once
        asked = await run(ask)
        model.check_room(worker, len(asked.prompts) * asked.n)
        lookup = options.prompt_lookup if asked.lookup is None else asked.lookup
        asked = replace(asked, adapter=served.adapter, lookup=lookup)
        prompts = await run(partial(prepared, model.engine, asked))
        answer = kind(asked, served.name, model.engine, (tokens for tokens, _ in prompts))
        request.state.answer = answer  # for the log
        scored, scoring = [], model.engine.adapted(asked.adapter)
        for tokens, _ in prompts if asked.scores_prompts else ():
            if await request.is_disconnected():
                return None
            top = asked.options.logprobs or 0
            scored.append(await worker.call(partial(likeliest, scoring, tokens, top)))
        await run(partial(answer.begin, scored))
        exchange = Exchange(worker, answer, options.keep_alive)
        owner = getattr(request.state, "owner", "")
        tickets = tickets_for(model, asked, prompts, owner, began, exchange, state.metrics)
        waited = asyncio.get_running_loop().time() - began > WHILE
        if waited and await request.is_disconnected():
            return None
        model.check_room(worker, len(tickets))  # others have come meanwhile
        exchange.start(tickets, stack.pop_all(), request.receive)
    return exchange


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    """Return a response in JSON, in ASCII so that any text can be sent."""
    return Response(json.dumps(content), status, headers, "application/json")


def gone() -> Response:
    """Return the response to a client that has left; it is for the log only."""
    return Response(status_code=CLIENT_LEFT)


async def at_once(function: Callable[[], T]) -> T:
    """Return `function()`, run on the event loop: quicker than to change the thread."""
    return function()


async def beside(function: Callable[[], T]) -> T:
    """Return `function()`, run beside the event loop: grammars and long prompts take a while."""
    return await asyncio.to_thread(function)


def tickets_for(
    model: Model,
    asked: Asked,
    prompts: Sequence[tuple[list[int], int]],
    owner: str,
    began: float,
    exchange: Exchange,
    metrics: Metrics,
) -> list[Ticket]:
    """Return a ticket for each choice; those of one prompt have streams of one seed."""
    requests = asked.requests(prompts, model.engine.chat_sampling, new_seed())

    def sink(index: int) -> Sink:
        put = partial(exchange.inbox.put, index)
        return metrics.watched(model.name, index % asked.n == 0, put)

    return [
        Ticket(model.batch, *request, owner, sink(index), began)
        for index, request in enumerate(requests)
    ]


class Streamed(Response):
    """A response whose body is an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.exchange(scope, receive, send)
