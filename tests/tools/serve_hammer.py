"""Are a server's answers exact under load, and does it forget clients that leave?

    python tests/tools/serve_hammer.py [--exact 1000] [--requests 1000] [--aborts 10000]

The server of a model runs in this process. `--exact` random requests are run alone in
this process, and over HTTP: under load without a prefix cache, and twice with one. Then 12 clients
make `--requests` requests each, over prompts that share beginnings. Last, `--aborts` clients leave
at random moments. Differences that rounding explains are listed, all others end this with status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from hammer import Complaints, Found, Requests, leave_often, memory, rest_of, run
from serving import server_of

from openelm_mlx import load
from openelm_mlx.engine.options import EngineOptions

CLIENTS = 12
POOL = 300  # different requests of the clients


def told(found: Found, start: float) -> None:
    """Print what was compared."""
    total, count = found.answers.total(), len(found.wrong)
    print(f"{total} answers, {len(found.ties)} ties, {count} wrong, {time.time() - start:.0f} s")
    print(json.dumps(found.answers, indent=1))
    print(*(f"tie: {text}" for text in found.ties), sep="\n")
    print(*(f"WRONG: {text}" for text in found.wrong), sep="\n", flush=True)


def exact(name: str, count: int, clients: int, seed: int, how: EngineOptions) -> int:
    """Run random requests in every way; return the number of wrong answers."""
    start, requests = time.time(), Requests(load(name), count, seed)
    everyone = list(range(count))
    with server_of(name, running=how, cache_mb=0) as (_, address):
        asyncio.run(run(address, requests, "under load", everyone, clients))
        asyncio.run(run(address, requests, "one by one", everyone[: count // 10], 1))
    with server_of(name, running=how) as (_, address):
        asyncio.run(run(address, requests, "under load, cached", everyone, clients))
        requests.random.shuffle(everyone)
        asyncio.run(run(address, requests, "under load, cached again", everyone, clients))
    told(requests.found, start)
    return len(requests.found.wrong)


def shared(name: str, each: int, clients: int, seed: int, how: EngineOptions) -> int:
    """Let clients draw requests from a pool; return the number of wrong answers."""
    start, requests = time.time(), Requests(load(name), min(POOL, each), seed, most=8)
    rng = random.Random(seed)
    drawn = [rng.randrange(len(requests.all)) for _ in range(each * clients)]
    with server_of(name, running=how, cache_mb=64) as (_, address):
        asyncio.run(run(address, requests, f"{clients} clients", drawn, clients))
    told(requests.found, start)
    return len(requests.found.wrong)


def aborts(name: str, count: int, seed: int, how: EngineOptions) -> int:
    """Let clients leave; return the number of what is wrong afterwards."""
    start, requests, complaints = time.time(), Requests(load(name), 20, seed, most=16), Complaints()
    logging.getLogger().addHandler(complaints)
    wrong, seen = 0, []
    with server_of(name, running=how, cache_mb=8) as (server, address):
        for _ in range(5):
            tried = asyncio.run(leave_often(address, requests, count // 5))
            rest, used = rest_of(server), memory()
            wrong += sum(rest.values())
            seen.append(used)
            print(f"{dict(tried)}, left {rest}, {used}, {time.time() - start:.0f} s", flush=True)
        asyncio.run(run(address, requests, "afterwards", list(range(20)), 4))
    for what, first in seen[0].items():
        growth = seen[-1][what] / first - 1
        wrong += growth > 0.02
        print(f"{what}: {growth:+.2%} from the first fifth to the last")
    told(requests.found, start)
    print(f"{len(complaints.texts)} errors logged", *complaints.texts[:5], sep="\n", flush=True)
    return wrong + len(complaints.texts) + len(requests.found.wrong)


def main() -> int:
    parser = argparse.ArgumentParser(prog="serve_hammer", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="openelm-tiny", help="default: openelm-tiny; in float32 it is faster")
    add("--exact", type=int, default=1000, help="random requests, each in every way")
    add("--requests", type=int, default=1000, help="requests of each client")
    add("--aborts", type=int, default=10_000, help="clients that leave")
    add("--clients", type=int, default=CLIENTS)
    add("--seed", type=int, default=0)
    add("--eager", action="store_true", help="with steps that are not compiled")
    args = parser.parse_args()
    how, wrong = EngineOptions(compiled=not args.eager), 0
    if args.exact:
        wrong += exact(args.model, args.exact, args.clients, args.seed, how)
    if args.requests:
        wrong += shared(args.model, args.requests, args.clients, args.seed + 1, how)
    if args.aborts:
        wrong += aborts(args.model, args.aborts, args.seed + 2, how)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
