"""The routes: what is asked at which address, and by which object it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from openelm_mlx import __version__
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.engine.sampling import new_seed
from openelm_mlx.errors import OpenELMError
from openelm_mlx.server.answers import Answer, ChatAnswer, Choice, CompletionAnswer
from openelm_mlx.server.asked import Asked, asked_of_chat, asked_of_completion, tokens_of
from openelm_mlx.server.bodies import ChatBody, CompletionBody, GenerationBody
from openelm_mlx.server.errors import ApiError, api_error, invalid_body
from openelm_mlx.server.metrics import Metered, Metrics, show
from openelm_mlx.server.models import Model, Models
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.page import front_page
from openelm_mlx.server.stream import Exchange
from openelm_mlx.server.worker import Sink, Ticket, Worker

T = TypeVar("T")
LONG = 4096  # bytes of a body from which on its prompt is encoded beside the event loop


def build_app(
    names: Sequence[str],
    options: ServerOptions,
    loading: ModelOptions | None = None,
    running: EngineOptions | None = None,
) -> FastAPI:
    """Return the application that serves the models `names`.

    It starts to load them when its lifespan starts, and answers 503 until then.
    """
    models = Models(names, options, loading or ModelOptions(), running or EngineOptions())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.worker = worker = Worker(options.request_seconds)
        app.state.loading = task = asyncio.create_task(models.load(worker))
        yield
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        for ticket in list(worker.tickets):
            worker.cancel(ticket)
        if models.ready:
            await models.close()

    app = FastAPI(
        title="openelm-mlx", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.models, app.state.options = models, options
    app.state.metrics = metrics = Metrics(app)
    app.add_middleware(Metered, app, metrics)
    add_errors(app)
    add_routes(app)
    return app


def add_errors(app: FastAPI) -> None:
    """Answer every error with OpenAI's envelope."""

    async def known(request: Request, error: Exception) -> Response:
        request.state.error = error
        return answer_of(api_error(error))

    async def invalid(request: Request, error: Exception) -> Response:
        return answer_of(invalid_body(error))

    async def of_http(request: Request, error: Exception) -> Response:
        status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
        return answer_of(ApiError(status, f"{request.method} {request.url.path}: {detail}"))

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(OpenELMError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    for status in (404, 405):
        app.add_exception_handler(status, of_http)


def answer_of(error: ApiError) -> Response:
    return JSONResponse(error.envelope, error.status, error.headers)


def add_routes(app: FastAPI) -> None:
    """Add all addresses."""
    app.post("/v1/chat/completions")(chat)
    app.post("/v1/completions")(completions)
    app.get("/v1/models")(list_models)
    app.get("/health")(health)
    app.get("/metrics", response_class=PlainTextResponse)(show)
    app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(front_page)


async def chat(body: ChatBody, request: Request) -> Any:
    """Answer a conversation, as https://platform.openai.com/docs/api-reference/chat says."""
    return await answered(request, body, partial(asked_of_chat, body), ChatAnswer)


async def completions(body: CompletionBody, request: Request) -> Any:
    """Continue texts, as https://platform.openai.com/docs/api-reference/completions says."""
    asked = partial(asked_of_completion, body)
    return await answered(request, body, asked, CompletionAnswer)


async def list_models(request: Request) -> Any:
    """List the models and their adapters, loaded or not."""
    models: Models = request.app.state.models
    return {"object": "list", "data": models.described()}


async def health(request: Request) -> Any:
    """Say whether requests are answered: 503 while a model is being loaded."""
    ready = request.app.state.models.ready
    return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)


async def answered(
    request: Request,
    body: GenerationBody,
    ask: Callable[[], Asked],
    kind: type[Answer],
) -> Any:
    """Run what a body asks; return the response, or the ASGI application that streams it."""
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
        prepared = await run(partial(prepare, model, asked))
        choices = [
            Choice(text_of(model, prompt) if asked.echo else "")
            for prompt, _ in prepared
            for _ in range(asked.n)
        ]
        answer = kind(asked, served.name, model.engine, choices)
        request.state.answer = answer  # for the log
        exchange = Exchange(worker, answer, options.keep_alive)
        owner = getattr(request.state, "owner", "")
        tickets = tickets_for(model, asked, prepared, owner, exchange, state.metrics)
        model.check_room(worker, len(tickets))  # others have come meanwhile
        exchange.start(tickets, stack.pop_all())
    if asked.stream:
        return Streamed(exchange)
    whole = await exchange.whole(request.receive)
    return Response(status_code=499) if whole is None else JSONResponse(whole)


async def at_once(function: Callable[[], T]) -> T:
    """Return `function()`, run on the event loop: quicker than to change the thread."""
    return function()


async def beside(function: Callable[[], T]) -> T:
    """Return `function()`, run beside the event loop: grammars and long prompts take a while."""
    return await asyncio.to_thread(function)


def prepare(model: Model, asked: Asked) -> list[tuple[list[int], int]]:
    """Return the ids of each prompt and how many tokens may follow."""
    return [tokens_of(model.engine, prompt, asked) for prompt in asked.prompts]


def text_of(model: Model, tokens: list[int]) -> str:
    """Return the text of a prompt."""
    return model.engine.tokenizer.decode(tokens)


def tickets_for(
    model: Model,
    asked: Asked,
    prepared: Sequence[tuple[list[int], int]],
    owner: str,
    exchange: Exchange,
    metrics: Metrics,
) -> list[Ticket]:
    """Return a ticket for each choice; those of one prompt have streams of one seed."""
    requests = asked.requests(prepared, model.engine.chat_sampling, new_seed())

    def sink(index: int) -> Sink:
        put = partial(exchange.inbox.put, index)
        return metrics.watched(model.name, index % asked.n == 0, put)

    return [
        Ticket(model.batch, *request, owner, sink(index)) for index, request in enumerate(requests)
    ]


class Streamed(Response):
    """A response whose body is an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.exchange(scope, receive, send)
