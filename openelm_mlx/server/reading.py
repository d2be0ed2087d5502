"""The body of a request is read as JSON (RFC 8259), strictly: nothing of it is guessed or lost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException


class StrictRoute(APIRoute):
    """A route whose body is read by `parsed`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Any:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


class StrictRequest(Request):
    """A request whose body is read by `parsed`."""

    async def json(self) -> Any:
        try:
            return parsed(await self.body())
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON that can be read: {error}") from None


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
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return made


def finite(text: str) -> float:
    """Return a number. Raises `ValueError` for one that float64 does not have."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number
