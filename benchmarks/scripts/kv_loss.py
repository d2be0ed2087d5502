"""What a kind of cache costs in quality: a text read through it, against the same text read through
a plain one.

    python -m openelm_mlx.benchmarks.scripts.kv_loss MODEL TEXT [--length 512] [--pieces 8]
    python -m openelm_mlx.benchmarks.scripts.kv_loss MODEL TEXT --answers 40 [--dtype bfloat16]

With --answers each piece is continued greedily, alone and in other ways that round otherwise: how
many texts part?
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
from openelm_mlx.evaluate.score import Comparison, compare
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind


def kv_loss(
    engine: Engine, pieces: list[list[int]], kind: CacheKind, prompt: int = 64
) -> Comparison:
    """Compare a cache of this kind with a plain one, over the positions after the first `prompt`."""
    plain, ours = (partial(read, engine, each) for each in (CacheKind(), kind))
    return compare(plain, ours, [mx.array([tokens]) for tokens in pieces], first=prompt)


def read(engine: Engine, kind: CacheKind, tokens: mx.array) -> mx.array:
    """Return the logits [1, length, vocab] of ids [1, length], fed 64 at a time through a cache of
    this kind.
    """
    cache, parts = KVCache(engine.config, kind), []
    for start in range(0, tokens.size, 64):
        parts.append(engine.model(tokens[:, start : start + 64], cache))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


def partings(
    engine: Engine, pieces: list[list[int]], options: EngineOptions, tokens: int
) -> dict[str, int]:
    """How many continuations of the pieces, `tokens` each, differ from that alone in one chunk of
    the prompt, by way.
    """
    how: Any = {"engine_options": options, "max_tokens": tokens, "ignore_eos": True}
    plain = [answer(engine, piece, how | {"prefill_chunk": len(piece)}) for piece in pieces]
    ways: dict[str, list[list[int | None]]] = {
        "in chunks of 7": [answer(engine, piece, how | {"prefill_chunk": 7}) for piece in pieces],
        "in a batch": [[*result.tokens] for result in batch_generate(engine, pieces, **how)],
        "with prompt lookup": [
            answer(engine, piece, how | {"prompt_lookup": 2}) for piece in pieces
        ],
    }
    return {
        way: sum(a != b for a, b in zip(plain, found, strict=True)) for way, found in ways.items()
    }


def answer(engine: Engine, prompt: list[int], how: dict[str, Any]) -> list[int | None]:
    return [event.token for event in stream_generate(engine, prompt, **how)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="kv_loss", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument(
        "--answers",
        type=int,
        metavar="N",
        help="continue each piece by N tokens instead, in several ways",
    )
    parser.add_argument("--dtype", help="compute in this type")
    args = parser.parse_args(argv)
    engine = load(args.model, args.dtype)
    ids = engine.tokenizer.encode(args.text.read_text(encoding="utf-8"), bos=False)
    step = len(ids) // args.pieces
    if step < args.length:
        raise BenchmarkError(
            f"the text has {len(ids)} tokens, too few for {args.pieces} pieces of {args.length}"
        )
    pieces = [
        [engine.tokenizer.bos_id, *ids[i * step : i * step + args.length - 1]]
        for i in range(args.pieces)
    ]
    if args.answers is not None:
        for name, bits in (("plain", None), ("8 bits", 8), ("4 bits", 4)):
            parted = partings(engine, pieces, EngineOptions(kv_bits=bits), args.answers)
            counts = "; ".join(f"{count} {way}" for way, count in parted.items())
            print(
                f"{name}: of {len(pieces)} texts of {args.answers} tokens part {counts}", flush=True
            )
        return 0
    print(
        "| cache | bytes per token, 16-bit model | mean KL (nats) | same likeliest token |\n|---|---:|---:|---:|"
    )
    half = args.length // 2
    for name, options in (
        ("8 bits", EngineOptions(kv_bits=8)),
        ("4 bits", EngineOptions(kv_bits=4)),
        (f"window of {half}", EngineOptions(kv_window=half)),
        (f"window of {half}, 8 bits", EngineOptions(kv_window=half, kv_bits=8)),
    ):
        kind = CacheKind.of(engine.config, options)
        loss, size = kv_loss(engine, pieces, kind), kind.bytes_per_token(engine.config, itemsize=2)
        print(
            f"| {name} | {size:,} | {loss.mean_kl_divergence:.6f} | {loss.top_1_agreement:.2%} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
