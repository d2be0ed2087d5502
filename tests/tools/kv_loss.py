"""Measure what a kind of cache costs in quality: a text is read through it and through a plain one.

    python tests/tools/kv_loss.py MODEL TEXT [--length 512] [--pieces 8]
    python tests/tools/kv_loss.py MODEL TEXT --answers 40 [--dtype bfloat16]

With --answers each piece is continued greedily, alone and in other ways that round otherwise, to
see how many texts differ.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from openelm_mlx import batch_generate, load, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.evaluate.compare import Comparison, compare
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind

CHUNK = 64  # tokens fed at a time


def kv_loss(
    engine: Engine, pieces: list[list[int]], kind: CacheKind, prompt: int = CHUNK
) -> Comparison:
    """Compare a cache of this kind with a plain one, without the first `prompt` positions."""
    plain, ours = (partial(read, engine, each) for each in (CacheKind(), kind))
    return compare(plain, ours, [mx.array([tokens]) for tokens in pieces], first=prompt)


def read(engine: Engine, kind: CacheKind, tokens: mx.array) -> mx.array:
    """Return the logits [1, length, vocab] of ids [1, length] fed through a cache of this kind."""
    cache, parts = KVCache(engine.config, kind), []
    for start in range(0, tokens.size, CHUNK):
        parts.append(engine.model(tokens[:, start : start + CHUNK], cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


def differences(
    engine: Engine, pieces: list[list[int]], options: EngineOptions, tokens: int
) -> dict[str, int]:
    """Return, by way, how many continuations of `tokens` tokens differ from that of the piece alone
    with its prompt in one chunk.
    """
    how: Any = {"engine_options": options, "max_tokens": tokens, "ignore_eos": True}
    plain = [answer(engine, piece, how | {"prefill_chunk": len(piece)}) for piece in pieces]
    ways: dict[str, list[list[int | None]]] = {
        "in chunks of 7": [answer(engine, piece, how | {"prefill_chunk": 7}) for piece in pieces],
        "in a batch": [[*result.tokens] for result in batch_generate(engine, pieces, **how)],
        "with prompt lookup": [answer(engine, p, how | {"prompt_lookup": 2}) for p in pieces],
    }
    return {
        way: sum(a != b for a, b in zip(plain, found, strict=True)) for way, found in ways.items()
    }


def answer(engine: Engine, prompt: list[int], how: dict[str, Any]) -> list[int | None]:
    return [event.token for event in stream_generate(engine, prompt, **how)]


def cut(engine: Engine, text: Path, length: int, count: int) -> list[list[int]]:
    """Return `count` pieces of a text, each `length` ids from BOS. Raises `BenchmarkError`."""
    if length <= CHUNK:
        raise BenchmarkError(
            f"pieces of {length} tokens are too short: the first {CHUNK} are not compared"
        )
    ids = engine.tokenizer.encode(text.read_text(encoding="utf-8"), bos=False)
    step = len(ids) // count
    if step < length:
        raise BenchmarkError(
            f"the text has {len(ids)} tokens, too few for {count} pieces of {length}"
        )
    bos = engine.tokenizer.bos_id
    return [[bos, *ids[start : start + length - 1]] for start in range(0, count * step, step)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kv_loss", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("text", type=Path)
    add("--length", type=int, default=512)
    add("--pieces", type=int, default=8)
    add("--answers", type=int, metavar="N", help="continue each piece by N tokens, in several ways")
    add("--dtype", help="compute in this type")
    args = parser.parse_args(argv)
    engine, half = load(args.model, args.dtype), args.length // 2
    pieces = cut(engine, args.text, args.length, args.pieces)
    eight, four = EngineOptions(kv_bits=8), EngineOptions(kv_bits=4)
    if args.answers is not None:
        for name, options in (("plain", EngineOptions()), ("8 bits", eight), ("4 bits", four)):
            found = differences(engine, pieces, options, args.answers)
            counts = "; ".join(f"{count} {way}" for way, count in found.items())
            print(f"{name}: of {len(pieces)} texts of {args.answers} tokens differ {counts}")
        return 0
    print("| cache | bytes per token, 16-bit model | mean KL (nats) | same likeliest token |")
    print("|---|---:|---:|---:|")
    for name, options in (
        ("8 bits", eight),
        ("4 bits", four),
        (f"window of {half}", EngineOptions(kv_window=half)),
        (f"window of {half}, 8 bits", EngineOptions(kv_window=half, kv_bits=8)),
    ):
        kind = CacheKind.of(engine.config, options)
        loss, size = kv_loss(engine, pieces, kind), kind.bytes_per_token(engine.config, itemsize=2)
        figures = f"{loss.mean_kl_divergence:.6f} | {loss.top_1_agreement:.2%}"
        print(f"| {name} | {size:,} | {figures} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
