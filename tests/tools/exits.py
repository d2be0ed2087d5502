"""Programs that end while generations and threads are in every state: their exit code must be 0.

`python tests/tools/exits.py 100` runs each so many times and counts those that died.
"""

from __future__ import annotations

import subprocess
import sys

START = """
import asyncio, sys, threading
from concurrent.futures import ThreadPoolExecutor
from openelm_mlx import load, stream_generate

def start(seed=0, engine=None):
    options = {"max_tokens": 30, "temperature": 0.8, "seed": seed}
    return stream_generate(engine or load(), [1, 500, 600], **options)

def in_threads(count, call):
    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

def take(events, count):
    return [next(events) for _ in range(count)]
"""

PROGRAMS = {
    "threads have ended": "engine = load(); in_threads(3, lambda seed: list(start(seed, engine)))",
    "generations are left": """
engine = load()
left = [start(seed, engine) for seed in range(3)]
in_threads(3, lambda number: take(left[number], 2))
take(left[0], 2)
""",
    "a thread is still at it": """
begun = threading.Event()
def go_on():
    engine = load()
    while True:
        for event in start(1, engine): begun.set()
threading.Thread(target=go_on, daemon=True).start()
begun.wait()
""",
    "streams are left": """
async def main():
    engine = load()
    left.append([engine.stream("Once", max_tokens=20, seed=seed) for seed in range(3)])
    await asyncio.gather(*(anext(events) for events in left[0]))
left = []
asyncio.run(main())
""",
    "main stops in the midst": """
engine = load()
in_threads(1, lambda number: list(start(number, engine)))
for event in start(1, engine): sys.exit(0)
""",
}


def exit_code(program: str) -> int:
    """Run a program; the negative number of a signal where one killed it."""
    command = [sys.executable, "-c", START + PROGRAMS[program]]
    return subprocess.run(command, capture_output=True, timeout=120, check=False).returncode


if __name__ == "__main__":
    for name in PROGRAMS:
        codes = [exit_code(name) for _ in range(int(sys.argv[1]))]
        print(f"{name}: {codes.count(0)} of {len(codes)} clean", set(codes) - {0} or "", flush=True)
