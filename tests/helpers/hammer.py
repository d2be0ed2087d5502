"""Many requests over HTTP at once: random ones, shared beginnings, and clients that leave.

An answer is compared with what the engine gives in this process, alone. Where two texts part, an
independent pass of the model (judge.py) decides whether rounding may have turned a tie there.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import resource
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from serving import SECONDS

from openelm_mlx.benchmarks.checks import Answer, Maker, Request, alone
from openelm_mlx.benchmarks.checks.judge import TIE, Judge, Report, near
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions, SamplingOptions
from openelm_mlx.engine.tokenizer import StreamingDecoder
from openelm_mlx.model.cache_kinds import CacheKind

PATH = "/v1/completions"
LONGEST = 200  # prompt tokens
PATIENCE = 10 * SECONDS  # of a client, as many others wait too


@dataclass
class Found:
    """The findings of a run."""

    answers: Counter[str] = field(default_factory=Counter)  # compared, by way
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Requests:
    """Random requests whose prompts share beginnings, and the answer of each alone."""

    def __init__(self, engine: Engine, count: int, seed: int, most: int = 32) -> None:
        self.engine, self.random = engine, random.Random(seed)
        maker = Maker(engine, self.random, most)
        maker.context = LONGEST
        maker.shared = [maker.ids(LONGEST // 2) for _ in range(3)]
        self.all = [plain(maker.request()) for _ in range(count)]
        how = EngineOptions(compiled=False)
        self.alone = [alone(engine, request, how) for request in self.all]
        self.found, self.kind = Found(), CacheKind.of(engine.config, how)
        self.judge = Judge(engine, Report())

    def compare(self, way: str, place: int, text: str, reason: str | None) -> None:
        """Note whether an answer is that of its request alone."""
        one, request = self.alone[place], self.all[place]
        self.found.answers[way] += 1
        if (one.text, one.reason) == (text, reason):
            return
        ties = self.ties(request, one, text)
        what = f"{way}: {text!r} ({reason}), alone {one.text!r} ({one.reason}); {request}"
        (self.found.ties if ties else self.found.wrong).append(f"{what}; ties: {ties}")

    def ties(self, request: Request, one: Answer, text: str) -> list[tuple[int, int]]:
        """Return places and tokens that rounding could have drawn, where the texts may part."""
        reference, start = self.judge.reference, len(request.prompt)
        rows = reference.logits(request.prompt + one.tokens[:-1], self.kind)[start - 1 :]
        decoder, shown, found = StreamingDecoder(self.engine.tokenizer), "", []
        for place, (token, row) in enumerate(zip(one.tokens, rows, strict=True)):
            if not text.startswith(shown.strip()) and not text.startswith(shown):
                break
            for options in near(request.sampling, TIE):
                scores = reference.scores(row, request, one.tokens[:place], options)
                likely = (scores >= scores.max() - TIE).nonzero()[0].tolist()
                found += [(place, other) for other in likely if other != token]
            shown += decoder.push(token)
        return found


def plain(request: Request) -> Request:
    """Return a request as HTTP can state it: without a stream of noise of its own."""
    drawn = {item.name: getattr(request.sampling, item.name) for item in fields(SamplingOptions)}
    return request._replace(sampling=SamplingOptions(**{**drawn, "stream": 0}))


def body_of(request: Request) -> dict[str, Any]:
    """Return the body of a request."""
    sampling, options = request.sampling, request.options
    names = {item.name for item in fields(SamplingOptions)} - {"processor", "stream", "logit_bias"}
    body = {name: getattr(sampling, name) for name in names}
    body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}
    about = {"max_tokens": options.max_tokens, "ignore_eos": options.ignore_eos}
    about |= {"stop_token_ids": list(options.stop_tokens), "logprobs": options.logprobs}
    return {"prompt": request.prompt, **body, **about}


async def ask(http: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> tuple[str, str]:
    """Return the text and the reason of an answer."""
    if not stream:
        answer = await http.post(PATH, json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["text"], choice["finish_reason"]
    text, reason = "", ""
    async with http.stream("POST", PATH, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[len("data: ") :])
                assert "choices" in chunk, chunk
                text += chunk["choices"][0]["text"]
                reason = chunk["choices"][0]["finish_reason"] or reason
    return text, reason


async def run(address: str, requests: Requests, way: str, places: list[int], clients: int) -> None:
    """Let clients ask for these requests, at random streamed or not, and compare each answer."""
    line, limits = iter(places), httpx.Limits(max_connections=clients)

    async def client() -> None:
        for place in line:
            stream = requests.random.random() < 0.5
            got = await ask(http, body_of(requests.all[place]), stream)
            requests.compare(f"{way}{', streamed' if stream else ''}", place, *got)

    async with (
        httpx.AsyncClient(base_url=address, timeout=PATIENCE, limits=limits) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(client())


MOMENTS = ("connect", "head", "queue", "prefill", "decode", "last")


async def leave(address: str, body: dict[str, Any], moment: str, rng: random.Random) -> None:
    """Ask for a stream, and close the connection at a moment of its way."""
    place = urlsplit(address)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    sent = json.dumps({**body, "stream": rng.random() < 0.8}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(sent)}\r\n\r\n"
    data = head.encode() + sent
    try:
        if moment != "connect":
            writer.write(data[: rng.randrange(len(data))] if moment == "head" else data)
            await writer.drain()
        if moment == "queue" and rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.02)
        if moment in ("prefill", "decode", "last"):
            await reader.readuntil(b"\r\n\r\n")
        if moment == "decode":
            for _ in range(rng.randrange(1, 5)):
                await reader.readline()
        if moment == "last":
            while (line := await reader.readline()) and b'"length"' not in line:
                pass
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # with a reset
        else:
            writer.close()


async def leave_often(
    address: str, requests: Requests, count: int, clients: int = 24
) -> Counter[str]:
    """Let clients leave at random moments; return how often each moment was tried."""
    tried, line, rng = Counter[str](), iter(range(count)), requests.random

    async def client() -> None:
        for _ in line:
            moment = rng.choice(MOMENTS)
            tried[moment] += 1
            body = body_of(rng.choice(requests.all)) | {
                "logprobs": None,
                "n": rng.choice((1, 1, 3)),
            }
            async with asyncio.timeout(PATIENCE):
                await leave(address, body, moment, rng)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return tried


def rest_of(server: Any, seconds: float = SECONDS) -> dict[str, Any]:
    """Wait until a server has nothing to do, and return what it still has: numbers that are 0."""
    state = server.app.state

    async def idle() -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            await state.worker.drain()
            while server.guard.running:
                await asyncio.sleep(0.01)
        batches = [model.batch for model in state.models.loaded.values()]
        rows = await state.worker.call(lambda: [batch.busy or batch.nbytes for batch in batches])
        used = sum(state.models._users.values())
        return {"tickets": len(state.worker.tickets), "rows": sum(map(int, rows)), "users": used}

    return asyncio.run_coroutine_threadsafe(idle(), server.loop).result(seconds + 1)


def memory() -> dict[str, int]:
    """Return the bytes of MLX's arrays and of the process, when all garbage is gone."""
    gc.collect()
    mx.clear_cache()
    status = Path("/proc/self/statm")
    if status.exists():
        resident = int(status.read_text().split()[1]) * resource.getpagesize()
    else:  # the largest so far
        scale = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"mlx": mx.get_active_memory(), "resident": resident}


class Complaints(logging.Handler):
    """Keeps errors that are logged, tracebacks among them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))
