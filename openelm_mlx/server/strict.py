"""Requests are read strictly: JSON of which nothing is guessed or lost, objects of known fields.

A field that would be ignored is refused by name, unless its value changes nothing, as the
`"tools": []` that clients send does: such values are neutral. null is the same as leaving a field
out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, WrapValidator, model_validator
from pydantic_core import from_json

from openelm_mlx.fields import shown

Neutral = Mapping[str, tuple[Any, ...]]  # names of fields, and their values that ask for nothing

SHARED: Neutral = {  # by chat and responses
    "metadata": ({},),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
CHAT: Neutral = {
    **SHARED,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION: Neutral = {"best_of": (1,), "suffix": ("",)}
RESPONSE: Neutral = {
    **{name: values for name, values in SHARED.items() if name != "metadata"},
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({},),
    "truncation": ("disabled",),
}
MESSAGE: Neutral = {  # a client sends back an answer as it came
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}


def describe_neutral(schema: dict[str, Any], kind: type[Any]) -> None:
    """Add the fields that ask for nothing to the JSON schema of an object."""
    for name, values in kind.NEUTRAL.items():
        allowed = {"enum": [None, *values]}
        note = "not supported; a value that asks for nothing is accepted"
        schema.setdefault("properties", {})[name] = {"description": note, **allowed}


class Strict(BaseModel):
    """An object whose fields have exactly their types, and that has no others."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=describe_neutral
    )
    NEUTRAL: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        """Leave out what asks for nothing."""
        return without(data, cls) if isinstance(data, dict) else data


def without(data: dict[str, Any], kind: type[Strict]) -> dict[str, Any]:
    """Return an object without what is null, and without what asks for nothing in this kind.

    Of unknown fields only the first is left, which the error names: there may be 100,000.
    """
    own = {field.alias or name for name, field in kind.model_fields.items()}
    kept, known = dict[str, Any](), True
    for name, value in data.items():
        values = kind.NEUTRAL.get(name)
        if value is None:
            dropped = values is not None or name in own
        else:
            dropped = any(value == one and type(value) is type(one) for one in values or ())
        if not dropped and (known or name in own):
            kept[name] = value
            known = known and name in own
    return kept


def one_by_one(value: Any, check: Callable[[Any], Any]) -> Any:
    """Check a dict's items up to the first that is wrong: there may be 100,000 of them."""
    if not isinstance(value, dict):
        return check(value)
    return {key: one for item in value.items() for key, one in check(dict([item])).items()}


EACH = WrapValidator(one_by_one)


def parsed(data: bytes) -> Any:
    """Return what JSON in UTF-8 says.

    Raises `ValueError` for other text, NaN, numbers beyond float64, lone surrogates, more than 200
    levels, and an object that has a name twice, as one of its values would be ignored.
    """
    from_json(data, allow_inf_nan=False)
    return json.loads(data, object_pairs_hook=distinct, parse_float=finite)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises `ValueError` for a name that it has twice."""
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the name {shown(twice)} twice")
    return made


def finite(text: str) -> float:
    """Return a number. Raises `ValueError` for one that float64 does not have."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
