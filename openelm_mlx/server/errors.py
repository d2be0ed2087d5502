"""Errors of requests: a status, and the JSON object that OpenAI's clients expect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.errors import BusyError, OpenELMError, OptionError

RETRY = {"Retry-After": "1"}  # seconds; a row frees within about this time
NAMES = {item.name for kind in (SamplingOptions, GenerationOptions) for item in fields(kind)}
FIELDS = {"stop_tokens": "stop_token_ids"}  # other names here
LONGEST = 80  # characters of a field's name that errors repeat
TAGGED = ("response_format", "format")  # after these pydantic names the kind of an object
LONG = 2000  # characters of a message: pydantic and llguidance repeat what they were given
# the type of an error by its status, where it is not that of a mistake in the request
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "server_error",
}


class ApiError(Exception):
    """A request that is not answered as asked: its status, and what the client is told.

    `param` names the field that is at fault, `code` is for programs, `headers` go with the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, shortened(message)
        self.type = type or TYPES.get(status, "invalid_request_error")
        self.param, self.code, self.headers = param, code, headers or {}

    @property
    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def text(self) -> str:
        """The body as JSON."""
        return json.dumps(self.envelope)

    def encoded(self, **more: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the body and the headers of the answer, `more` among them, as ASGI has them."""
        body = self.text.encode()
        own = {"content-type": "application/json", "content-length": str(len(body))}
        named = (own | self.headers | more).items()
        return body, [(name.lower().encode(), value.encode()) for name, value in named]


def shortened(text: str) -> str:
    """Return a text of at most about `LONG` characters: its beginning and its end."""
    return text if len(text) <= LONG else f"{text[: LONG // 2]} ... {text[-LONG // 2 :]}"


def api_error(error: Exception, schema: str = "response_format") -> ApiError:
    """Return what a client is told about an error; `schema` is the field that has a JSON schema.

    A user's mistake is 400, or 429 if all is busy; anything else is a fault of this program.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="queue_full", headers=RETRY)
    param, message = None, str(error)
    if isinstance(error, OptionError):
        word, _, rest = message.partition(" ")  # the option at fault is named first
        if word in NAMES:
            param = (FIELDS | {"json_schema": schema}).get(word, word)
            message = f"{param} {rest}"
    if isinstance(error, OpenELMError):
        return ApiError(400, message, param=param)
    return ApiError(500, "the server failed with this request; its log says why")


def invalid_body(error: Any) -> ApiError:
    """Return the error of a body that pydantic refused: the first field at fault."""
    first = error.errors()[0]
    name = place_of(first["loc"])
    if first["type"] == "extra_forbidden":
        message, code = f"{name} is not supported here; leave it out", "unsupported_parameter"
    elif not name and first["type"] == "missing":
        message, code = "the request has no body; give a JSON object", None
    elif not name and isinstance(first.get("input"), bytes):
        message, code = "send the body with the header Content-Type: application/json", None
    else:
        message, code = f"{name or 'the body'}: {first['msg']}", None
    return ApiError(400, message, param=name or None, code=code)


def place_of(parts: Sequence[Any]) -> str:
    """Return the place of a field as OpenAI writes it.

    >>> place_of(("body", "messages", 0, "content", "as list", 1, "type"))
    'messages[0].content[1].type'
    """
    place, before = "", None
    for part in parts:
        tag = before in TAGGED and part != "type"
        before = part
        if tag:
            continue
        if isinstance(part, int):
            place += f"[{part}]"
        elif part not in ("body", "[key]") and not part.startswith("as "):
            part = part if len(part) <= LONGEST else f"{part[:LONGEST]}..."
            place += f".{part}" if place else part
    return place
