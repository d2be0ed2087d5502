"""Counts and times of the server, as Prometheus reads them at /metrics.

Nothing here asks the device's thread: a request's sink passes through `Metrics.watched` on its way
to the client, which adds the number of its tokens at each step and its statistics at its end, and
what changes without requests is read when Prometheus asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from openelm_mlx.device import mx
from openelm_mlx.engine.request import Event, GenerationStats
from openelm_mlx.server.errors import ApiError, api_error
from openelm_mlx.server.worker import Sink

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# upper bounds in seconds, from a small model on a fast machine to a request at its time limit
FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80)
TOKEN = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1)
WHOLE = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640)
CLIENT_LEFT = 499  # nginx's status of a request whose client did not wait for an answer

disable_created_metrics()  # a second series for each, which nobody asks for


class Metrics:
    """All series of a server, in a registry of their own."""

    def __init__(self, app: FastAPI) -> None:
        self.registry = registry = CollectorRegistry()
        self.generated = 0  # tokens of all models
        self.wake: Callable[[], None] = lambda: None  # called when a request begins

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"openelm_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str, label: str, bounds: tuple[float, ...]) -> Histogram:
            named: Any = {"buckets": bounds, "registry": registry}
            return Histogram(f"openelm_{name}_seconds", about, (label,), **named)

        self.first = seconds(
            "time_to_first_token",
            "Time from a request's submission to its first token, the queue included.",
            "model",
            FIRST,
        )
        self.queue = seconds(
            "request_queue_time", "Time that a request waits for its turn.", "model", FIRST
        )
        self.token = seconds(
            "time_per_output_token",
            "Mean time between two tokens of a request, observed at its end.",
            "model",
            TOKEN,
        )
        self.duration = seconds(
            "request_duration",
            "Time from a request's head to the last byte of its answer.",
            "endpoint",
            WHOLE,
        )
        self.prompt = counter(
            "prompt_tokens", "Prompt tokens of requests that were answered to the end.", "model"
        )
        self.cached = counter(
            "cached_prompt_tokens", "Of these, tokens found in the prefix cache.", "model"
        )
        self.generation = counter(
            "generation_tokens", "Tokens generated, those of aborted requests included.", "model"
        )
        self.drafted = counter(
            "draft_tokens", "Tokens proposed by a draft model or prompt lookup.", "model"
        )
        self.accepted = counter("accepted_draft_tokens", "Of these, tokens kept.", "model")
        self.requests = counter(
            "requests", "HTTP requests by path and status.", "endpoint", "status"
        )
        self.errors = counter("errors", "Errors that clients were told, by their type.", "type")
        self.aborted = counter("aborted_requests", "Requests whose client left before the end.")
        self.state = State(app)
        registry.register(self.state)

    def watched(self, model: str, counts_prompt: bool, sink: Sink) -> Sink:
        """Return a sink that counts what passes to `sink`.

        A prompt with several answers is counted with one of them, as in an answer's usage.
        """
        generation = self.generation.labels(model)
        self.wake()

        def counted(new: list[Event] | Exception) -> None:
            if not isinstance(new, Exception):
                self.generated += len(new)
                generation.inc(len(new))
                if (stats := new[-1].stats) is not None:
                    self._ended(model, stats, counts_prompt)
            sink(new)

        return counted

    def _ended(self, model: str, stats: GenerationStats, counts_prompt: bool) -> None:
        """Add the statistics of a request that has ended."""
        to_first = stats.time_to_first_token_seconds
        self.first.labels(model).observe(stats.waiting_seconds + to_first)
        self.queue.labels(model).observe(stats.waiting_seconds)
        if stats.generation_tokens > 1:
            each = (stats.total_seconds - to_first) / (stats.generation_tokens - 1)
            self.token.labels(model).observe(each)
        if counts_prompt:
            self.prompt.labels(model).inc(stats.prompt_tokens)
            self.cached.labels(model).inc(stats.reused_tokens)
        self.drafted.labels(model).inc(stats.drafted_tokens)
        self.accepted.labels(model).inc(stats.accepted_tokens)
        self.state.peak = max(self.state.peak, stats.peak_memory_bytes)

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return all series and their media type; `accept` is the header of the request."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind


class State(Collector):
    """The state of the moment, read when it is asked for, in no turn of the device's thread."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.peak = 0  # bytes; MLX's own peak begins anew with each request

    def collect(self) -> Iterator[GaugeMetricFamily]:
        models, worker = self.app.state.models, self.app.state.worker
        running = GaugeMetricFamily(
            "openelm_requests_running",
            "Requests that have got their first token.",
            None,
            ("model",),
        )
        waiting = GaugeMetricFamily(
            "openelm_requests_waiting", "Requests in the queue or in prefill.", None, ("model",)
        )
        for name, model in list(models.loaded.items()):
            started = [one.started for one in worker.tickets if one.batch is model.batch]
            running.add_metric([name], sum(started))
            waiting.add_metric([name], len(started) - sum(started))
        yield from (running, waiting)
        self.peak = max(self.peak, mx.get_peak_memory())
        for name, about, value in (
            ("prefix_cache_bytes", "Bytes of the prefix cache.", models.cache.nbytes),
            ("prefix_cache_entries", "Sequences in the prefix cache.", len(models.cache)),
            ("mlx_active_memory_bytes", "Bytes that MLX has in use.", mx.get_active_memory()),
            ("mlx_peak_memory_bytes", "The most bytes that MLX had in use.", self.peak),
            ("models_loaded", "Models in memory.", len(models.loaded)),
        ):
            yield GaugeMetricFamily(f"openelm_{name}", about, value)


class Metered:
    """Counts and times every HTTP request that `app` gets, those it refuses included."""

    def __init__(self, app: ASGIApp, routes: FastAPI, metrics: Metrics) -> None:
        self.app, self.routes, self.metrics = app, routes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status, complete, aborted = perf_counter(), CLIENT_LEFT, False, False

        async def received() -> Message:
            nonlocal aborted
            message = await receive()
            aborted = aborted or (message["type"] == "http.disconnect" and not complete)
            return message

        async def sent(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self.app(scope, received, sent)
        except Exception:
            status = 500
            raise
        finally:
            self.count(scope, status, aborted, perf_counter() - begun)
        return None

    def count(self, scope: Scope, status: int, aborted: bool, seconds: float) -> None:
        """Add a request that has ended."""
        metrics, endpoint = self.metrics, self.endpoint(scope)
        metrics.requests.labels(endpoint, str(status)).inc()
        metrics.duration.labels(endpoint).observe(seconds)
        if aborted:
            metrics.aborted.inc()
        elif (error := scope.get("state", {}).get("error")) is not None:
            metrics.errors.labels(api_error(error).type).inc()
        elif status >= 400:
            metrics.errors.labels(ApiError(status, "").type).inc()

    def endpoint(self, scope: Scope) -> str:
        """Return the path of the route that a request matches, "other" if it matches none."""
        for route in self.routes.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return str(getattr(route, "path", "other"))
        return "other"


async def show(request: Request) -> Response:
    """Answer Prometheus."""
    content, kind = request.app.state.metrics.text(request.headers.get("accept", ""))
    return Response(content, media_type=kind)
