"""Generated JSON schemas: how long does a mask take, and are answers documents of their schemas?

    python tests/tools/answers.py [MODEL] [--schemas 1000] [--pieces 32000] [--seed 1] [--open]

First random walks through as many schemas, over a tokenizer of pieces made of Python's own library:
the time of a grammar, of a mask and of accepting a token. Then answers of at most 256 tokens. Each
must be a document of its schema, or the beginning of one where it was cut. With --open, no object
says that it does not have further properties.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from collections import Counter
from math import inf
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np

from openelm_mlx import GenerationOptions, SamplingOptions, batch_generate, load
from openelm_mlx.engine.grammar import Constraint, constraint
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.model.config import EOS

PROMPT = "Here is what is known of it, as JSON:"
LENGTH, BYTES_FROM = 256, 3
WORDS = ("name", "age", "kind", "colour", "tags", "title", "when", "size", "note", "owner")
VALUES = ("red", "green", "a king", "12", "yes", "no", "old", "the sea", "Tom", "ready")


def random_schema(rng: random.Random, more: bool, depth: int = 0) -> dict[str, Any]:
    """Return a random schema: an object at the top, with texts, numbers, lists and objects in it.

    `more` leaves it to the model to add properties.
    """
    low = rng.randrange(100)
    scalars: list[dict[str, Any]] = [
        {"type": "string"},
        {"type": "string", "maxLength": rng.randrange(5, 40)},
        {"enum": rng.sample(VALUES, 3)},
        {"type": "integer"},
        {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
    ]
    kinds = ["object", "array", *scalars] if depth < 3 else scalars
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "array":
        bounds = {"minItems": rng.randrange(2), "maxItems": rng.randrange(2, 5)}
        return {"type": "array", "items": random_schema(rng, more, depth + 1)} | bounds
    if isinstance(kind, dict):
        return kind
    names = rng.sample(WORDS, rng.randrange(1, 5))
    properties = {name: random_schema(rng, more, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.8]
    made: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    return made if more else made | {"additionalProperties": False}


def pieces_engine(pieces: list[bytes]) -> Any:
    """Return what a grammar needs of an engine: control tokens, all bytes, then `pieces`."""
    pieces = [b"", b"", b"", *(bytes([byte]) for byte in range(256)), *pieces]
    tokenizer = Tokenizer(pieces, lambda text, continued: [], Path(), "")
    config = SimpleNamespace(eos_token_ids=(EOS,))
    return SimpleNamespace(tokenizer=tokenizer, vocab=len(pieces), config=config)


def common_pieces(count: int) -> list[bytes]:
    """Return the commonest words, and beginnings of words, in Python's library."""
    seen: Counter[str] = Counter()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]:
        text = path.read_text(encoding="utf-8", errors="replace")
        for word in re.findall(r" ?\w+| ?[^\w\s]+|\s+", text):
            seen.update(word[:length] for length in range(1, len(word) + 1))
    texts = sorted(seen, key=lambda text: (-seen[text], text))
    return [text.encode() for text in texts[:count]]


def walk(found: Constraint, ends: Any, rng: random.Random) -> list[float]:
    """Return the seconds of each mask and acceptance on a random way through one document."""
    times: list[float] = []
    for _ in range(LENGTH):
        start = perf_counter()
        mask = found.mask()
        taken = perf_counter() - start
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(ends)].astype(bool)
        ending = np.flatnonzero(allowed & ends)
        # a fifth of the tokens may close a text, a list or an object: by chance alone none would
        tokens = ending if len(ending) and rng.random() < 0.2 else np.flatnonzero(allowed)
        token = int(rng.choice(tokens))
        if token == EOS:
            return [*times, taken]
        start = perf_counter()
        found.accept(token)
        times.append(taken + perf_counter() - start)
    return times


def time_masks(schemas: list[dict[str, Any]], count: int, seed: int) -> str:
    """Time grammars and their masks over `count` pieces; return the figures as text."""
    engine, rng = pieces_engine(common_pieces(count - BYTES_FROM - 256)), random.Random(seed)
    ends = np.array([any(mark in piece for mark in b'"]}') for piece in engine.tokenizer.pieces])
    steps: list[float] = []
    built: list[float] = []
    for schema in schemas:
        start = perf_counter()
        found: Any = constraint(engine, GenerationOptions(json_schema=json.dumps(schema)))
        built.append(perf_counter() - start)
        steps += walk(found, ends, rng)
    micros, millis = 1e6 * np.array(steps), 1e3 * np.array(built)
    return (
        f"{len(steps):,} masks over {engine.vocab:,} pieces: median {np.median(micros):.1f} us, "
        f"p99 {np.percentile(micros, 99):.0f} us, longest {micros.max():.0f} us; a grammar is "
        f"ready in {np.median(millis):.1f} ms (p99 {np.percentile(millis, 99):.1f}; the first, "
        f"with the tokenizer's index, {millis[0]:.0f})"
    )


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Tell whether a value is a document of `schema`, which `random_schema` made."""
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys()
            and ("additionalProperties" not in schema or value.keys() <= known.keys())
            and all(fits(known[name], part) for name, part in value.items() if name in known)
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(fits(schema["items"], part) for part in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema.get("maxLength", len(value))
    if kind in ("integer", "number"):
        types = int if kind == "integer" else (int, float)
        low, high = schema.get("minimum", -inf), schema.get("maximum", inf)
        return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high
    return value is None if kind == "null" else isinstance(value, bool)


def begins(schema: dict[str, Any], text: str) -> bool:
    """Tell whether a text is the beginning of a document: byte by byte, by a fresh constraint."""
    options = GenerationOptions(json_schema=json.dumps(schema))
    found: Any = constraint(pieces_engine([]), options)
    tokens = [BYTES_FROM + byte for byte in text.removesuffix("\ufffd").encode()]
    return found.along(tokens)[1] == len(tokens)


def check(engine: Engine, schemas: list[dict[str, Any]], seed: int) -> bool:
    """Print what became of the answers; return whether all are what they must be."""
    options = [GenerationOptions(LENGTH, json_schema=json.dumps(schema)) for schema in schemas]
    seeds = range(seed, seed + len(schemas))
    sampling = [SamplingOptions(temperature=1.0, seed=each) for each in seeds]
    results = batch_generate(engine, [PROMPT] * len(schemas), sampling, options)
    wrong, cut = [], 0
    for schema, result in zip(schemas, results, strict=True):
        if result.error is not None:
            raise result.error
        cut += result.finish_reason == "length"
        right = begins if result.finish_reason == "length" else fits_text
        if not right(schema, result.text):
            wrong.append((schema, result.text))
    print(
        f"{len(schemas):,} answers of at most {LENGTH} tokens: {len(schemas) - cut:,} ended by "
        f"themselves, {cut:,} were cut; {len(wrong):,} are wrong"
    )
    for schema, text in wrong:
        print(f"wrong: {json.dumps(schema)}\n  {text}")
    return not wrong


def fits_text(schema: dict[str, Any], text: str) -> bool:
    return fits(schema, json.loads(text))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="answers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="openelm-tiny")
    parser.add_argument("--schemas", type=int, default=1000, help="default: 1000")
    parser.add_argument("--pieces", type=int, default=32_000, help="of the tokenizer of the walks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--open", action="store_true", help="objects may have further properties")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    schemas = [random_schema(rng, args.open) for _ in range(args.schemas)]
    print(time_masks(schemas, args.pieces, args.seed), flush=True)
    return 0 if check(load(args.model), schemas, args.seed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
