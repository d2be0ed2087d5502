"""The body of a request is read strictly, in place of the way of FastAPI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from openelm_mlx.server.neutral import parsed


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
