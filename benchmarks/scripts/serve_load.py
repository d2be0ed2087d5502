"""Measure `openelm serve` under load beside `mlx_lm.server` and the scheduler without a server.

    python -m openelm_mlx.benchmarks.scripts.serve_load [MODEL] [--only PART,...] [--json FILE]

All sides have the same weights, take turns at the same prompts, and get them from one client in
this process, so that a busy machine slows all alike. No prompt is sent twice to a side, and each is
one after which the model does not end early. Everything happens on 127.0.0.1.

The parts, each a number of trials:

    streams  so many answers at once: tokens a second, and the server's processor time for a token
    first    one request at a time, on an open connection: seconds until text comes
    equal    five equal requests at once: seconds until text comes, of each
    shared   two conversations with the same system turn: how much of it the second prefills
    health   GET /health while answers are streamed
    start    a new process until its first request is answered

Of existing tools guidellm brings PyTorch, locust leaves server-sent events to one's own code, and
neither takes turns between two servers nor reads their processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openelm_mlx.benchmarks.measure import machine
from openelm_mlx.benchmarks.measure.weights import open_engine, unquantize, write_folder
from openelm_mlx.benchmarks.results.compare import busy
from openelm_mlx.benchmarks.scripts.load_figures import SCHEMA, Trials, figures, lines
from openelm_mlx.benchmarks.scripts.servers import OURS, PEER, Scheduler, Server
from openelm_mlx.benchmarks.scripts.streams import Answer, ask, ask_together
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.engine.loading import load
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.errors import BenchmarkError, OpenELMError
from openelm_mlx.files import check_new

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PARTS = ("streams", "first", "equal", "shared", "health", "start")
WARM_UP = 2  # trials of streams that are not counted
EQUAL = 5
WORDS = 20  # of a prompt
SYSTEM_TOKENS = 900
PROBE_PAUSE = 0.01  # seconds between two GET /health
SEEN = BUNDLED.parent / "verification" / "text.txt"  # prompts are cut from it
Side = Server | Scheduler


class Load:
    """The sides, ready to be asked, and prompts that none of them has had."""

    def __init__(self, sides: Sequence[Side], streams: int, tokens: int) -> None:
        self.servers = [side for side in sides if isinstance(side, Server)]
        self.alone = next(side for side in sides if isinstance(side, Scheduler))
        self.streams, self.tokens = streams, tokens
        self.prompts, self.turn = self.long_ones(), 0

    def long_ones(self) -> Iterator[str]:
        """Yield prompts after which the model does not end before the tokens that are wanted."""
        words = SEEN.read_text(encoding="utf-8").split()
        starts = [7 * number % (len(words) - WORDS) for number in range(len(words))]
        for first in range(0, len(starts), self.streams):
            some = [" ".join(words[at:][:WORDS]) for at in starts[first : first + self.streams]]
            done = self.alone.ask(prompts=some, tokens=self.tokens)["answers"]
            yield from (
                prompt
                for prompt, answer in zip(some, done, strict=True)
                if answer["tokens"] == self.tokens
            )
        raise BenchmarkError("there are no more prompts; ask for fewer trials")

    def take(self, count: int) -> list[str]:
        return [next(self.prompts) for _ in range(count)]

    def sides(self) -> list[Side]:
        """Return all sides in another order at each call."""
        self.turn += 1
        sides: list[Side] = [*self.servers, self.alone]
        cut = self.turn % len(sides)
        return [*sides[cut:], *sides[:cut]]

    async def together(self, server: Server, prompts: Sequence[str], tokens: int) -> list[Answer]:
        return await ask_together(
            server.port, TEXT, [text_body(server, prompt, tokens) for prompt in prompts]
        )

    async def side(self, side: Side, prompts: Sequence[str], tokens: int) -> dict[str, Any]:
        """Run prompts at once; return what they took, and each answer's text, tokens and first."""
        if isinstance(side, Scheduler):
            return side.ask(prompts=prompts, tokens=tokens)
        used, own = side.processor_seconds(), time.process_time()
        answers = await self.together(side, prompts, tokens)
        used, own = side.processor_seconds() - used, time.process_time() - own
        seconds = max(answer.end for answer in answers) - answers[0].start
        took = {"seconds": seconds, "processor_seconds": used, "client_processor_seconds": own}
        return {**took, "answers": [described(answer) for answer in answers]}

    # --- the parts, which return a trial each

    async def streams_trial(self) -> dict[str, Any]:
        prompts, trial, texts = self.take(self.streams), dict[str, Any](), list[list[str]]()
        for side in self.sides():
            done = await self.side(side, prompts, self.tokens)
            answers = done.pop("answers")
            texts.append([answer["text"].strip() for answer in answers])
            trial[side.name] = done | {"tokens": sum(answer["tokens"] for answer in answers)}
        return trial | {"same_texts": sum(len(set(row)) == 1 for row in zip(*texts, strict=True))}

    async def first_trial(self) -> dict[str, Any]:
        (prompt,), trial = self.take(1), dict[str, Any]()
        for side in self.sides():
            if isinstance(side, Server):
                (answer,) = await self.together(side, [prompt], 8)
                trial[side.name] = answer.first
            else:
                trial[side.name] = (await self.side(side, [prompt], 8))["answers"][0]["first"]
        return trial

    async def equal_trial(self) -> dict[str, Any]:
        prompts, trial = self.take(1) * EQUAL, dict[str, Any]()
        for server in self.servers:
            answers = await self.together(server, prompts, self.tokens)
            trial[server.name] = [answer.first for answer in answers]
        return trial

    async def health_trial(self) -> dict[str, Any]:
        trial = dict[str, Any]()
        for server in self.servers:
            found: list[float] = []
            work = asyncio.ensure_future(
                self.together(server, self.take(self.streams), self.tokens)
            )
            while not work.done():
                answer = await ask(server.port, "/health")
                answer.check()
                found.append(answer.end - answer.start)
                await asyncio.sleep(PROBE_PAUSE)
            await work
            trial[server.name] = found
        return trial


def text_body(server: Server, prompt: str, tokens: int) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return body | {"stream": True, "stream_options": {"include_usage": True}, **server.common}


def described(answer: Answer) -> dict[str, Any]:
    return {"text": answer.text, "tokens": answer.tokens, "first": answer.first}


def chat_body(messages: list[dict[str, str]], tokens: int, **more: Any) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": tokens, "temperature": 0, **more}


# --- parts with processes of their own, of the bundled model as it is


async def shared_trial() -> dict[str, Any]:
    """Ask two questions after one system turn; count the tokens that both prompts begin with."""
    engine = load("openelm-tiny")
    ids = engine.tokenizer.encode(SEEN.read_text(encoding="utf-8"), bos=False)
    system = {"role": "system", "content": engine.tokenizer.decode(ids[: SYSTEM_TOKENS - 5])}
    questions = ("Who are you?", "Tell me a story.")
    talks = [[system, {"role": "user", "content": text}] for text in questions]
    first, second = (prompt_tokens(engine, talk) for talk in talks)
    pairs = zip(first, second, strict=False)
    trial: dict[str, Any] = {"tokens": len(second)}
    trial["shared"] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    with Server(OURS, "openelm-tiny") as server:
        await server.ready()
        for talk in talks:
            usage = (await ask(server.port, CHAT, chat_body(talk, 4, **server.common))).json[
                "usage"
            ]
            trial["cached"] = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return trial


async def start_trial(names: Sequence[str]) -> dict[str, Any]:
    """Start the servers one after the other, and ask each until it answers."""
    trial = dict[str, Any]()
    messages = [{"role": "user", "content": "Hello!"}]
    for name in names:
        model = "openelm-tiny" if name == OURS else str(BUNDLED)
        with Server(name, model) as server:
            named = {"model": model} if name == OURS else {}
            answer = await server.first_answer(CHAT, chat_body(messages, 4, **named))
            used = server.processor_seconds()
            trial[name] = {"seconds": answer.end - server.begun, "processor_seconds": used}
    return trial


# --- the whole


def dense_folder(model: str, scratch: Path) -> Path:
    """Write a model with unquantized float32 weights, which all sides compute alike."""
    engine, _ = open_engine(model, "float32", None)
    unquantize(engine.model)
    return write_folder(replace(engine, quantization=None), scratch / f"{engine.name}-float32")


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the document of a run."""
    trials: Trials = {part: [] for part in args.only}
    facts: dict[str, Any] = {}
    under_load = [part for part in args.only if part not in ("shared", "start")]
    partial = True
    with suppress(asyncio.CancelledError):  # Ctrl-C keeps the trials that were finished
        with ExitStack() as stack:
            if under_load:
                folder = str(dense_folder(args.model, scratch))
                sides = [stack.enter_context(Server(name, folder)) for name in args.sides]
                for server in sides:
                    await server.ready()
                alone = stack.enter_context(Scheduler(folder, args.streams))
                load = Load([*sides, alone], args.streams, args.tokens)
                for _ in range(WARM_UP):
                    await load.streams_trial()
                facts["openblas"] = {side.name: side.uses_openblas() for side in load.sides()}
            for part in under_load:
                for number in range(args.trials):
                    trials[part].append(await getattr(load, f"{part}_trial")())
                    print(f"\r{part} {number + 1} of {args.trials} ", end="", file=sys.stderr)
        for _ in range(args.trials if "start" in args.only else 0):
            trials["start"].append(await start_trial(args.sides))
        if "shared" in args.only:
            trials["shared"].append(await shared_trial())
        partial = False
    print("\r", end="", file=sys.stderr)
    return {"partial": partial, "conditions": facts, "trials": trials, "figures": figures(trials)}


def document(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measure, and return the result with the machine, versions and the command."""
    before = machine.machine()
    runner: Any = asyncio.run
    if find_spec("uvloop"):
        import uvloop

        runner = uvloop.run
    with TemporaryDirectory(prefix="openelm-") as scratch:
        found = runner(measure(args, Path(scratch)))
    from openelm_mlx.device import facts

    commit, dirty = machine.commit(Path(__file__).resolve().parents[2])
    versions = machine.versions() | ({"mlx-lm": facts()["mlx_lm"]} if PEER in args.sides else {})
    blas = {name: text for name, text in sorted(os.environ.items()) if "OPENBLAS" in name}
    found["conditions"] |= {"model": args.model, "streams": args.streams, "tokens": args.tokens}
    return {
        "schema": SCHEMA,
        "created": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        # folders concern nobody
        "command": shlex.join(["serve_load", *(word.rpartition("/")[2] for word in argv)]),
        "machine": asdict(before),
        "busy": busy(before),
        "versions": versions,
        "commit": commit,
        "dirty": dirty,
        "environment": blas,
        **found,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serve_load", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    tiny = "a name or folder; measured with unquantized float32 weights (default: openelm-tiny)"
    add("model", nargs="?", default="openelm-tiny", metavar="MODEL", help=tiny)
    add("--only", metavar="PART,...", default=",".join(PARTS), help="default: all")
    add("--streams", type=int, default=16, help="answers at once (default: 16)")
    add("--tokens", type=int, default=64, help="of each answer (default: 64)")
    add("--trials", type=int, default=10, help="of each part (default: 10)")
    add("--sides", metavar="SIDE,...", default=f"{OURS},{PEER}", help="servers (default: both)")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    args.only, args.sides = args.only.split(","), args.sides.split(",")
    if unknown := [name for name in args.sides if name not in (OURS, PEER)]:
        parser.error(f"--sides names {', '.join(unknown)}; known: {OURS}, {PEER}")
    if unknown := [part for part in args.only if part not in PARTS]:
        parser.error(f"--only names {', '.join(unknown)}; known: {', '.join(PARTS)}")
    try:
        if args.json:
            check_new(args.json, "--json")
        if PEER in args.sides and find_spec("mlx_lm") is None:
            raise BenchmarkError(f"mlx-lm is not installed: pip install mlx-lm, or --sides {OURS}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the servers, too
        found = document(args, argv)
    except OpenELMError as error:
        parser.exit(2, f"serve_load: {error}\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(found["figures"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
