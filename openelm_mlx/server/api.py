"""The routes: what is asked at which address, and by which object it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from openelm_mlx import __version__
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions, ModelOptions, SamplingOptions
from openelm_mlx.engine.prompts import encode_messages
from openelm_mlx.errors import OpenELMError, PromptError
from openelm_mlx.server import answer_schemas as schemas
from openelm_mlx.server.answers import ChatAnswer
from openelm_mlx.server.asked import (
    asked_of_chat,
    asked_of_completion,
    asked_of_response,
    messages_of,
    refused,
)
from openelm_mlx.server.bodies import ChatBody, CompletionBody
from openelm_mlx.server.completions import CompletionAnswer
from openelm_mlx.server.errors import ApiError, api_error, invalid_body
from openelm_mlx.server.handler import answered, beside, json_response
from openelm_mlx.server.metrics import Metrics, show
from openelm_mlx.server.models import Models
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.other_bodies import DetokenizeBody, ResponseBody, TokenizeBody
from openelm_mlx.server.page import front_page
from openelm_mlx.server.responses import ResponseAnswer
from openelm_mlx.server.strict import parsed
from openelm_mlx.server.worker import Worker

ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": schemas.ErrorReply, "description": "an error, as OpenAI's API has it"}
}


def build_app(
    names: Sequence[str],
    options: ServerOptions,
    loading: ModelOptions,
    running: EngineOptions,
) -> FastAPI:
    """Return the application that serves the models `names`.

    It starts to load them when its lifespan starts, and answers 503 until then.
    """
    models = Models(names, options, loading, running)

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
    app.state.metrics = Metrics(app)
    app.router.route_class = StrictRoute
    add_errors(app)
    add_routes(app)
    app.openapi = partial(openapi, app)  # type: ignore[method-assign]
    return app


class StrictRoute(APIRoute):
    """A route whose body is read by `parsed`, not by FastAPI's lenient reader."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Any:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


class StrictRequest(Request):
    """A request whose body is read by `parsed`."""

    async def json(self) -> Any:
        try:
            return parsed(await self.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON that can be read: {error}") from None


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return /openapi.json; the defaults of sampling in it are those of the first model."""
    said, models = FastAPI.openapi(app), app.state.models
    bodies, first = said["components"]["schemas"], models.loaded.get(models.names[0])
    chat = SamplingOptions() if first is None else first.engine.chat_sampling
    for name, usual in (("ChatBody", chat), ("ResponseBody", chat), ("CompletionBody", None)):
        for field, schema in bodies[name]["properties"].items():
            value = getattr(usual or SamplingOptions(), field, None)
            if type(value) in (int, float) and field != "stream":
                schema["default"] = value
    return said


def add_errors(app: FastAPI) -> None:
    """Answer every error with OpenAI's envelope."""

    async def known(request: Request, error: Exception) -> Response:
        request.state.error = error
        return answer_of(api_error(error))

    async def invalid(request: Request, error: Exception) -> Response:
        request.state.error = found = invalid_body(error)
        return answer_of(found)

    async def of_http(request: Request, error: Exception) -> Response:
        status, detail = getattr(error, "status_code", 500), getattr(error, "detail", "")
        headers = getattr(error, "headers", None) or {}
        if status != 400:
            what = f"there is no {request.method} {request.url.path}"
            detail = f"{what} here; /openapi.json lists what there is"
        request.state.error = found = ApiError(status, detail, headers=headers)
        return answer_of(found)

    for kind in (ApiError, OpenELMError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    for status in (400, 404, 405):
        app.add_exception_handler(status, of_http)


def answer_of(error: ApiError) -> Response:
    return json_response(error.envelope, error.status, error.headers)


def add_routes(app: FastAPI) -> None:
    """Add all addresses."""

    def described(reply: type, streamed: str = "") -> dict[int | str, dict[str, Any]]:
        """Return the answers of a route for /openapi.json; `streamed` is its stream's events."""
        said: dict[str, Any] = {"model": reply}
        if streamed:
            text = {"type": "string", "description": streamed}
            said["content"] = {"text/event-stream": {"schema": text}}
        return {200: said, **ERRORS}

    of_chat = described(schemas.ChatReply, "with stream: ChatChunk objects, then [DONE]")
    of_completion = described(schemas.CompletionReply, "with stream: the same objects, then [DONE]")
    of_response = described(schemas.ResponseReply, "with stream: OpenAI's typed events")
    app.post("/v1/chat/completions", responses=of_chat)(chat)
    app.post("/v1/completions", responses=of_completion)(completions)
    app.post("/v1/responses", responses=of_response)(responses)
    app.get("/v1/models", responses=described(schemas.ModelsReply))(list_models)
    app.get("/v1/models/{name:path}", responses=described(schemas.ModelReply))(one_model)
    app.post("/tokenize", responses=described(schemas.TokensReply))(tokenize)
    app.post("/detokenize", responses=described(schemas.TextReply))(detokenize)
    busy: dict[int | str, dict[str, Any]] = {
        503: {"model": schemas.HealthReply, "description": "a model is being loaded"}
    }
    app.get("/health", responses={**described(schemas.HealthReply), **busy})(health)
    app.head("/health", include_in_schema=False)(health)  # as monitors ask
    app.get("/metrics", response_class=PlainTextResponse)(show)
    app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)(front_page)


async def chat(body: ChatBody, request: Request) -> Response:
    """Answer a conversation, as https://platform.openai.com/docs/api-reference/chat says."""
    return await answered(request, body, partial(asked_of_chat, body), ChatAnswer)


async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue texts, as https://platform.openai.com/docs/api-reference/completions says."""
    asked = partial(asked_of_completion, body)
    return await answered(request, body, asked, CompletionAnswer)


async def responses(body: ResponseBody, request: Request) -> Response:
    """Answer a text, as https://platform.openai.com/docs/api-reference/responses says."""
    asked, kind = partial(asked_of_response, body), partial(ResponseAnswer, body=body)
    return await answered(request, body, asked, kind)


async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Return the ids that the model is fed for a text or a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise refused("give either prompt or messages", "prompt")
    if body.messages is not None and body.add_special_tokens is not None:
        raise refused("add_special_tokens is for a text; leave it out", "add_special_tokens")
    with ExitStack() as stack:
        model, _ = await request.app.state.models.use(body.model, stack)
        return json_response(await beside(partial(tokens_for, model.engine, body)))


def tokens_for(engine: Engine, body: TokenizeBody) -> dict[str, Any]:
    """Return the ids of a body of /tokenize, also of what no context holds. Raises `ApiError`."""
    if body.prompt is not None:
        ids = engine.tokenizer.encode(body.prompt, bos=body.add_special_tokens is not False)
    else:
        try:
            ids = encode_messages(engine.tokenizer, messages_of(body.messages or ()))
        except PromptError as error:
            raise refused(str(error), "messages") from None
    limit = engine.config.max_context_length
    return {"tokens": ids, "count": len(ids), "context_length": limit}


async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Return the text of ids."""
    with ExitStack() as stack:
        model, _ = await request.app.state.models.use(body.model, stack)
        try:
            text = await beside(partial(model.engine.tokenizer.decode, body.tokens))
        except OpenELMError as error:
            raise refused(str(error), "tokens") from None
    return json_response({"prompt": text})


async def list_models(request: Request) -> Response:
    """List the models and their adapters, loaded or not."""
    models: Models = request.app.state.models
    return json_response({"object": "list", "data": models.described()})


async def one_model(name: str, request: Request) -> Response:
    """Describe a model or an adapter."""
    models: Models = request.app.state.models
    for one in models.described():
        if one["id"] == name:
            return json_response(one)
    with ExitStack() as stack:
        await models.use(name, stack)  # which says why there is none
    raise ApiError(503, f"{name} is being loaded; try again in a few seconds")


async def health(request: Request) -> Response:
    """Say whether requests are answered: 503 while a model is being loaded."""
    ready = request.app.state.models.ready
    return json_response({"status": "ok" if ready else "loading"}, 200 if ready else 503)
