"""Run kernels of ours on a GPU: each alone and all together, beside MLX's operations.

    python -m openelm_mlx.benchmarks.scripts.kernel_sets check
    python -m openelm_mlx.benchmarks.scripts.kernel_sets speed --model 270m --bits 4
    MLX_ENABLE_TF32=0 python -m openelm_mlx.benchmarks.scripts.kernel_sets exact --dtype float32

`check` says how each kernel differs from its twin, "" if it does not; `exact` compares logits of
the bundled model with a processor's in float32, and greedy tokens with the twins'; `speed` times
one row of random weights, compiled, by the median of three runs; `attention` times `attend` in
chains of 200, the host's time included. On a processor only the twins run. Nothing here has run on
Metal.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from openelm_mlx import EngineOptions, device, load, stream_generate
from openelm_mlx.benchmarks.measure.weights import random_engine
from openelm_mlx.device import mx
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import OpenELMError
from openelm_mlx.files import check_new
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import CacheKind, Place, halves, resized
from openelm_mlx.model.kernels.attend import attend
from openelm_mlx.model.kernels.kernel import ALL, check_of, runner, running

PROMPT = "Once upon a time there was a little girl"
SLOTS = 256
Set = frozenset[str]
Figure = tuple[str, Any]


def sets() -> dict[str, Set]:
    """Return the sets of kernels to run, by name; on a processor that is the empty one."""
    if device.kind() == "cpu":
        return {"twins": frozenset()}
    return {
        "twins": frozenset(),
        **{name: frozenset({name}) for name in ALL},
        "all": frozenset(ALL),
    }


def fresh(engine: Engine) -> Engine:
    """Return an engine of the same model that has compiled nothing with other kernels."""
    return Engine(engine.model, engine.tokenizer, engine.config, engine.name, engine.path)


def check(options: argparse.Namespace) -> Iterator[Figure]:
    if device.kind() == "cpu":
        print("nothing to compare: only GPUs run kernels of ours", file=sys.stderr)
        return
    for name in ALL:
        yield name, check_of(name)


def tokens(engine: Engine, count: int) -> list[int]:
    events = stream_generate(fresh(engine), PROMPT, max_tokens=count, ignore_eos=True)
    return [event.token for event in events]


def logits(engine: Engine, names: Set, steps: int) -> mx.array:
    """Return the logits after the prompt and after each of some fixed tokens, in float32."""
    cache, kind = KVCache(engine.config), CacheKind()
    ids, found = engine.tokenizer.encode(PROMPT), []
    with running(runner(), names):
        found.append(engine.model(mx.array([ids]), cache)[:, -1])
        buffers = [[resized(array, SLOTS) for array in arrays] for arrays in cache.arrays]
        mx.eval(buffers)
        for step in range(steps):
            caches = step_caches(buffers, mx.array([len(ids) + step]), kind)
            token = mx.array([7 + 31 * step % 900], mx.uint32)
            found.append(engine.model.logits(engine.model.hidden(token, caches, last=True)))
            buffers = [one.arrays for one in caches]
            mx.eval(found[-1], buffers)
    return mx.concatenate(found).astype(mx.float32)


def exact(options: argparse.Namespace) -> Iterator[Figure]:
    engine, where = load("openelm-tiny", dtype=options.dtype), mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with mx.stream(mx.cpu):
            reference = logits(load("openelm-tiny", dtype="float32"), frozenset(), options.tokens)
            mx.eval(reference)
    finally:
        mx.set_default_device(where)
    wanted: list[int] = []
    for name, names in sets().items():
        off = mx.abs(logits(engine, names, options.tokens) - reference)
        yield f"logits, {name}", {"max": off.max().item(), "mean": off.mean().item()}
        with running(runner(), names):
            made = tokens(engine, options.tokens)
        wanted = wanted or made
        pairs = enumerate(zip(made, wanted, strict=True))
        yield (
            f"greedy tokens as the twins', {name}",
            next((at for at, (a, b) in pairs if a != b), len(made)),
        )


def speed(options: argparse.Namespace) -> Iterator[Figure]:
    engine = random_engine(options.model, options.dtype, options.bits)
    for name, names in sets().items():
        with running(runner(), names):
            own = fresh(engine)
            yield f"{name}, tokens/s", median(rates(own, options.tokens, True))
    with running(runner(), sets().get("all", frozenset())):
        yield "not compiled, tokens/s", median(rates(fresh(engine), options.tokens, False))


def rates(engine: Engine, count: int, compiled: bool) -> list[float]:
    """Return the tokens a second of three runs, after one that compiles."""
    how, found = EngineOptions(compiled=compiled), []
    for _ in range(4):
        events = stream_generate(
            engine, PROMPT, max_tokens=count, ignore_eos=True, engine_options=how
        )
        times = [time.perf_counter() for _ in events]
        found.append((len(times) - 1) / (times[-1] - times[0]))
    return found[1:]


def attention(options: argparse.Namespace) -> Iterator[Figure]:
    heads, kv_heads, head_dim, slots, scale = 20, 5, 64, 2048, 0.125
    for filled in (64, 512, 2000):
        keys = mx.random.split(mx.random.key(filled))
        buffer = mx.random.normal((2, 1, kv_heads, slots, head_dim), mx.bfloat16, key=keys[0])
        query = mx.random.normal((1, heads, 1, head_dim), mx.bfloat16, key=keys[1])
        place = Place(mx.array([filled - 1]), CacheKind(), slots)
        mask = place.mask(1)
        mx.eval(buffer, query, mask)
        for name in ("twins", "attend") if device.kind() != "cpu" else ("twins",):

            def one(x: mx.array) -> mx.array:
                return attend(x, [buffer], place, 1, mask, scale)  # noqa: B023 - called at once

            with running(runner(), sets()[name]):
                yield f"{name}, {filled} of {slots} slots, us", chained(one, query)
        k, v = (half[:, :, :filled] for half in halves(buffer))

        def sliced(x: mx.array) -> mx.array:
            return mx.fast.scaled_dot_product_attention(x, k, v, scale=scale)  # noqa: B023

        yield f"a slice, {filled} of {slots} slots, us", chained(sliced, query)


def chained(run: Callable[[mx.array], mx.array], x: mx.array, count: int = 200) -> float:
    """Return the microseconds of one of `count` calls, each of which waits for the one before."""
    found = []
    for _ in range(6):
        start, end = time.perf_counter(), x
        for _ in range(count):
            end = run(end)
        mx.eval(end)
        found.append(1e6 * (time.perf_counter() - start) / count)
    return median(found[1:])


SECTIONS = {"check": check, "exact": exact, "speed": speed, "attention": attention}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m openelm_mlx.benchmarks.scripts.kernel_sets",
        description=(__doc__ or "").split("\n")[0],
    )
    add = parser.add_argument
    add("section", choices=SECTIONS)
    add("--model", default="270m", help="a published size (default: 270m)")
    add("--dtype", choices=FLOATS, help="of the activations (default: the device's)")
    add("--bits", type=int, help="of the weights (default: unquantized)")
    add("--tokens", type=int, default=200, help="to generate (default: 200)")
    add("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args(arguments)
    facts = device.facts()
    report = {name: facts[name] for name in ("openelm_mlx", "mlx", "chip", "backend")}
    report["command"] = " ".join(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.json is not None:
            check_new(options.json, "--json")
        for name, figure in SECTIONS[options.section](options):
            report[name] = figure
            print(f"{name}: {json.dumps(figure)}", flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OpenELMError as error:
        parser.exit(2, f"kernel_sets: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
