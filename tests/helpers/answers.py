"""Are answers to generated JSON schemas documents of their schemas?

    python tests/helpers/answers.py [MODEL] [--schemas 1000] [--seed 1] [--open]

An answer has at most 256 tokens. It must be a document of its schema, or the beginning of one where
it was cut. With --open, no object says that it does not have further properties.
"""

from __future__ import annotations

import argparse
import json
import random
from math import inf
from typing import Any

from openelm_mlx import GenerationOptions, SamplingOptions, batch_generate, load
from openelm_mlx.benchmarks.scripts.latency import BYTES_FROM, pieces_engine, random_schema
from openelm_mlx.engine.grammar import constraint
from openelm_mlx.engine.loading import Engine

PROMPT = "Here is what is known of it, as JSON:"
LENGTH = 256


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Tell whether a value is a document of a schema that `random_schema` made."""
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
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--open", action="store_true", help="objects may have further properties")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    schemas = [random_schema(rng, args.open) for _ in range(args.schemas)]
    return 0 if check(load(args.model), schemas, args.seed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
