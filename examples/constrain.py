"""Restrict an answer to a given form; needs the extra `grammar`."""

import json

from openelm_mlx import generate, load

engine = load("openelm-tiny")
print(generate(engine, "The weather is", choices=("fine", "bad")))
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
text = generate(engine, "A child: ", json_schema=json.dumps(schema), max_tokens=64)
print(json.loads(text))
