"""Answers of a given form: how long a mask takes, and what becomes of answers to generated JSON
schemas.

    python -m openelm_mlx.benchmarks.scripts.grammar_mask [MODEL] [--schemas 1000] [--pieces 32000] [--seed 1] [--open]

First random walks through as many schemas, over a tokenizer of 32,000 pieces made of Python's own
library: the time of one mask and of accepting one token. Then answers of at most 256 tokens: each
must be a document of its schema, or the beginning of one where it was cut. With --open, no object
says that it has no further properties.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from openelm_mlx import GenerationOptions, SamplingOptions, batch_generate, load
from openelm_mlx.engine.grammar import Constraint, constraint
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.model.config import EOS

WORDS = ("name", "age", "kind", "colour", "tags", "title", "when", "size", "note", "owner")
VALUES = ("red", "green", "a king", "12", "yes", "no", "old", "the sea", "Tom", "ready")
PROMPT = "Here is what is known of it, as JSON:"
LENGTH = 256


def schema(rng: random.Random, more: bool, depth: int = 0) -> dict[str, Any]:
    """Return a random schema: an object at the top, with texts, numbers, lists and objects in it.

    `more` leaves it to the model to add properties.
    """
    kinds = (
        "text",
        "short",
        "enum",
        "whole",
        "range",
        "number",
        "boolean",
        "null",
        "list",
        "object",
    )
    kind = "object" if depth == 0 else rng.choice(kinds if depth < 3 else kinds[:8])
    if kind == "list":
        bounds = {"minItems": rng.randrange(2), "maxItems": rng.randrange(2, 5)}
        return {"type": "array", "items": schema(rng, more, depth + 1)} | bounds
    if kind == "object":
        names = rng.sample(WORDS, rng.randrange(1, 5))
        properties = {name: schema(rng, more, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.8]
        made: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
        return made if more else made | {"additionalProperties": False}
    low = rng.randrange(100)
    scalars: dict[str, dict[str, Any]] = {
        "text": {"type": "string"},
        "short": {"type": "string", "maxLength": rng.randrange(5, 40)},
        "enum": {"enum": rng.sample(VALUES, 3)},
        "whole": {"type": "integer"},
        "range": {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)},
        "number": {"type": "number"},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
    }
    return scalars[kind]


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Tell whether a document is one of a schema that `schema` made."""
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
        length = range(schema["minItems"], schema["maxItems"] + 1)
        return (
            isinstance(value, list)
            and len(value) in length
            and all(fits(schema["items"], part) for part in value)
        )
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema.get("maxLength", len(value))
    if kind in ("integer", "number"):
        types = int if kind == "integer" else (int, float)
        low, high = schema.get("minimum", -np.inf), schema.get("maximum", np.inf)
        return isinstance(value, types) and not isinstance(value, bool) and low <= value <= high
    return value is None if kind == "null" else isinstance(value, bool)


def common_pieces(count: int) -> list[bytes]:
    """Return control tokens, all bytes, and the commonest words and their beginnings in Python's
    library.
    """
    seen: Counter[str] = Counter()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:150]:
        for word in re.findall(
            r" ?\w+| ?[^\w\s]+|\s+", path.read_text(encoding="utf-8", errors="replace")
        ):
            seen.update(word[:length] for length in range(1, len(word) + 1))
    texts = sorted(seen, key=lambda text: (-seen[text], text))
    pieces = [
        b"",
        b"",
        b"",
        *(bytes([byte]) for byte in range(256)),
        *(text.encode() for text in texts),
    ]
    return pieces[:count]


def walk(found: Constraint, pieces: list[bytes], rng: random.Random) -> list[float]:
    """Return the seconds of each mask and acceptance on a random way through one document."""
    marks = np.array([any(mark in piece for mark in b'"]}') for piece in pieces])
    times: list[float] = []
    for _ in range(LENGTH):
        begun = time.perf_counter()
        mask = found.mask()
        taken = time.perf_counter() - begun
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(pieces)].astype(bool)
        ending = np.flatnonzero(allowed & marks)
        # a fifth of the tokens may close a text, a list or an object: by chance alone none would
        # end
        tokens = ending if len(ending) and rng.random() < 0.2 else np.flatnonzero(allowed)
        token = int(rng.choice(tokens))
        if token == 2:
            return [*times, taken]
        begun = time.perf_counter()
        found.accept(token)
        times.append(taken + time.perf_counter() - begun)
    return times


def measure_masks(schemas: list[dict[str, Any]], count: int, seed: int) -> None:
    pieces, rng = common_pieces(count), random.Random(seed)
    tokenizer = Tokenizer(pieces, lambda text, continued: [], Path(), "")
    config = SimpleNamespace(eos_token_ids=(EOS,))
    engine: Any = SimpleNamespace(tokenizer=tokenizer, vocab=len(pieces), config=config)
    times, built = [], []
    for one in schemas:
        options = GenerationOptions(json_schema=json.dumps(one))
        begun = time.perf_counter()
        found: Any = constraint(engine, options)
        built.append(time.perf_counter() - begun)
        times += walk(found, pieces, rng)
    micros, millis = np.array(times) * 1e6, np.array(built) * 1e3
    print(
        f"{len(times):,} masks over {len(pieces):,} pieces: median {np.median(micros):.1f} us, "
        f"p99 {np.percentile(micros, 99):.0f} us, longest {micros.max():.0f} us; "
        f"a grammar is ready in {np.median(millis):.1f} ms (p99 {np.percentile(millis, 99):.1f}; "
        f"the first, with the tokenizer's index, {millis[0]:.0f})",
        flush=True,
    )


def measure_answers(engine: Engine, schemas: list[dict[str, Any]], seed: int) -> bool:
    """Say how many answers ended by themselves; tell whether all that did are documents of their
    schemas.
    """
    options = [GenerationOptions(LENGTH, json_schema=json.dumps(one)) for one in schemas]
    sampling = [
        SamplingOptions(temperature=1.0, seed=seed + place) for place in range(len(schemas))
    ]
    results = batch_generate(engine, [PROMPT] * len(schemas), sampling, options)
    wrong, cut, beginnings = [], 0, 0
    for one, result in zip(schemas, results, strict=True):
        if result.error is not None:
            raise result.error
        if result.finish_reason == "length":
            cut += 1
            beginnings += begins(one, result.text)
        elif not fits(one, json.loads(result.text)):
            wrong.append((one, result.text))
    ended = len(schemas) - cut
    print(
        f"{len(schemas):,} answers of at most {LENGTH} tokens: {ended / len(schemas):.1%} ended by themselves, "
        f"{ended - len(wrong):,} of these {ended:,} are documents of their schemas, "
        f"{beginnings:,} of {cut:,} that were cut are beginnings of one"
    )
    for one, text in wrong:
        print(f"wrong: {json.dumps(one)}\n  {text}")
    return not wrong and beginnings == cut


def begins(schema: dict[str, Any], text: str) -> bool:
    """Tell whether a text is the beginning of a document: byte by byte, by a fresh constraint."""
    pieces = [b"", b"", b"", *(bytes([byte]) for byte in range(256))]
    tokenizer = Tokenizer(pieces, lambda text, continued: [], Path(), "")
    config = SimpleNamespace(eos_token_ids=(EOS,))
    engine: Any = SimpleNamespace(tokenizer=tokenizer, vocab=len(pieces), config=config)
    found: Any = constraint(engine, GenerationOptions(json_schema=json.dumps(schema)))
    tokens = [3 + byte for byte in text.removesuffix("\ufffd").encode()]
    return found.along(tokens)[1] == len(tokens)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="grammar_mask", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="openelm-tiny")
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--pieces", type=int, default=32_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--open", action="store_true", help="objects may have further properties")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    schemas = [schema(rng, args.open) for _ in range(args.schemas)]
    measure_masks(schemas, args.pieces, args.seed)
    return 0 if measure_answers(load(args.model), schemas, args.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
