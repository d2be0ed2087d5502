"""The checks that a request must pass before a route sees it: a pure ASGI application.

In this order: the name it was sent to (a page of another site whose name was rebound to this
machine is refused), the origin it comes from, its key, its method and type, its body. What is
refused gets an answer in OpenAI's form. The body is read here, whole, so that its limits of size
and time hold whatever the routes do.

A request that passes has `owner` in the state of its scope: a hash of its key, "" without keys.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from stat import S_IROTH, S_IWGRP, S_IWOTH
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import OptionError
from openelm_mlx.fields import shown
from openelm_mlx.server.errors import RETRY, ApiError
from openelm_mlx.server.options import ServerOptions, fits_key, is_address

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
OPEN = ("/", "/health")  # they need no key
EVERY_ADDRESS = ("0.0.0.0", "::")
PREFLIGHT_SECONDS = 600  # how long a browser may remember the answer
HOST = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::\d*)?", re.ASCII)
# a name of a header in a preflight, and a request's own id
TOKEN = re.compile(r"[a-z0-9-]{1,64}", re.IGNORECASE | re.ASCII)
# of every answer that does not say otherwise
USUAL = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """Answers for `app` what it must not see. While `closing` is set, that is every request."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app, self.options, self.closing = app, options, False
        self.running = 0  # requests that have passed and not ended
        self.keys = [sha256(key.encode()).digest() for key in keys_of(options)]
        names = ("localhost", options.host, *options.allowed_host)
        self.names = {name.lower() for name in names} | {"127.0.0.1", "::1"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope["headers"])
        state = scope.setdefault("state", {})
        state["request_id"] = request_id(headers)
        send = self.with_headers(scope, headers, send)
        try:
            self.check_host(scope, headers)
            if scope["method"] == "OPTIONS" and headers.one("access-control-request-method"):
                return await self.preflight(headers, send)
            if self.closing:
                raise closing()
            state["owner"] = "" if scope["path"] in OPEN else self.owner(headers)
            check_method(scope["method"], headers)
            self.running += 1
        except ApiError as error:
            return await answer(error, scope, headers, send)
        try:
            try:
                body = await self.body(headers, receive)
            except ApiError as error:
                return await answer(error, scope, headers, send)
            if body is not None:
                await self.app(scope, once(body, receive), send)
        finally:
            self.running -= 1
        return None

    def check_host(self, scope: Scope, headers: Headers) -> None:
        """Refuse a request to a name that is not this server's. Browsers always send a name."""
        hosts = headers.all("host")
        if not hosts and scope["http_version"] == "1.0":
            return
        if len(hosts) != 1:
            raise ApiError(400, f"the request has {len(hosts)} Host headers; send one")
        name = host_name(hosts[0])
        if name in self.names or (self.options.host in EVERY_ADDRESS and is_address(name)):
            return
        what = f"this server is not known as {shown(name)}; if it should be, start it with"
        raise ApiError(421, f"{what} --allowed-host {printable(name)}", code="unknown_host")

    async def preflight(self, headers: Headers, send: Send) -> None:
        """Answer a browser that asks whether a page of another origin may send a request."""
        origin = headers.one("origin")
        if origin not in self.options.cors_origin:
            what = f"pages of {shown(origin)} may not ask this server; if they should, start it"
            raise ApiError(403, f"{what} with --cors-origin", code="unknown_origin")
        asked = headers.one("access-control-request-headers").replace(" ", "").split(",")
        allowed = ", ".join(name.lower() for name in asked if TOKEN.fullmatch(name))
        more = [
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"access-control-allow-headers", allowed.encode()),
            (b"access-control-max-age", str(PREFLIGHT_SECONDS).encode()),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": more})
        await send({"type": "http.response.body", "body": b""})

    def owner(self, headers: Headers) -> str:
        """Return a short hash of the request's key. Every key is compared, in constant time."""
        if not self.keys:
            return ""
        scheme, _, key = headers.one("authorization").partition(" ")
        given = sha256(key.strip().encode()).digest()
        known = sum([compare_digest(given, one) for one in self.keys])
        if scheme.lower() == "bearer" and known:
            return given.hex()[:16]
        what = "the API key is not one of this server's" if key else "there is no API key"
        say = f"{what}; send it in the header Authorization, as in `Bearer KEY`"
        asked = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, say, code="invalid_api_key", headers=asked)

    async def body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read the body. Return None if the client left before its end."""
        most, parts, size = self.options.max_body, [], 0
        declared = headers.one("content-length")
        if declared.isdigit() and (len(declared) > 18 or int(declared) > most):
            raise too_large(most)
        try:
            async with asyncio.timeout(self.options.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            what = f"the body did not arrive within {self.options.body_seconds:g} seconds"
            close = {"Connection": "close"}
            raise ApiError(408, what, code="request_timeout", headers=close) from None

    def with_headers(self, scope: Scope, headers: Headers, send: Send) -> Send:
        """Return `send` with the headers that go with every answer."""
        more = [*USUAL, (b"x-request-id", scope["state"]["request_id"].encode())]
        if self.options.cors_origin:
            more.append((b"vary", b"Origin"))
            origin = headers.one("origin")
            if origin in self.options.cors_origin:
                more.append((b"access-control-allow-origin", origin.encode()))
                more.append((b"access-control-expose-headers", b"x-request-id, retry-after"))

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", ())
                named = {bytes(name).lower() for name, _ in own}
                message["headers"] = [*own, *(one for one in more if one[0] not in named)]
            await send(message)

        return sent


class Headers:
    """The headers of a request by name, in lower case, as text."""

    def __init__(self, raw: Iterable[tuple[bytes, bytes]]) -> None:
        self.found: dict[str, list[str]] = {}
        for name, value in raw:
            self.found.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))

    def all(self, name: str) -> list[str]:
        return self.found.get(name, [])

    def one(self, name: str) -> str:
        """Return the only value, or "" if there is none or are several."""
        values = self.all(name)
        return values[0] if len(values) == 1 else ""


def keys_of(options: ServerOptions) -> list[str]:
    """Return the keys that were given and those of the file. Raises `OptionError`."""
    path = options.api_key_file
    if path is None:
        return list(options.api_key)
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not ASCII text"
        raise OptionError(f"api_key_file {path} cannot be read: {why}") from None
    if mode & (S_IROTH | S_IWOTH | S_IWGRP):
        what = f"api_key_file {path} can be read or changed by other users of this machine"
        raise OptionError(f"{what}; run chmod 600 {path}")
    return [*options.api_key, *keys_in(path, text)]


def keys_in(path: Path, text: str) -> list[str]:
    """Return the keys of a file: one a line; a line that begins with # is a comment."""
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise OptionError(f"api_key_file {path} has no key; write one a line")
    if not all(map(fits_key, keys)):
        raise OptionError(f"api_key_file {path} has a key with a blank in it; write one a line")
    return keys


def host_name(host: str) -> str:
    """Return the name in a Host header, without port, brackets and the dot of a full name.

    >>> host_name("[::1]:8080"), host_name("LocalHost.:80"), host_name("[::1].example.org")
    ('::1', 'localhost', '[::1].example.org')
    """
    found = HOST.fullmatch(host)
    return (found[1] or found[2].removesuffix(".") if found else host).lower()


def printable(name: str) -> str:
    """Return a name from a request if it is one, as part of a command, or what stands for it."""
    return name if re.fullmatch(r"[\w.:-]{1,253}", name, re.ASCII) else "NAME"


def request_id(headers: Headers) -> str:
    """Return the id that the client gave the request, if it is a plain word, or a new one."""
    given = headers.one("x-request-id")
    return given if TOKEN.fullmatch(given) else secrets.token_hex(8)


def check_method(method: str, headers: Headers) -> None:
    """Refuse an unknown method, and a body that is not JSON.

    A page of any site can send a form or plain text unasked, but JSON only after a preflight.
    """
    if method not in METHODS:
        allow = ", ".join(METHODS)
        raise ApiError(
            405, f"the method {printable(method)} is not known", headers={"Allow": allow}
        )
    kind, _, charset = headers.one("content-type").lower().partition(";")
    if method == "POST" and kind.strip() != "application/json":
        what = f"the body is {shown(kind.strip())}" if kind else "the body has no Content-Type"
        say = f"{what}; send the header Content-Type: application/json"
        raise ApiError(415, say, code="unsupported_media_type")
    if method == "POST" and charset.strip() not in ("", "charset=utf-8", 'charset="utf-8"'):
        what = f"the body is in {shown(charset.strip())}; send UTF-8"
        raise ApiError(415, what, code="unsupported_media_type")
    if (encoding := headers.one("content-encoding").lower()) not in ("", "identity"):
        what = f"the body is compressed ({shown(encoding)}); send it as it is"
        raise ApiError(415, what, code="unsupported_media_type")


def too_large(most: int) -> ApiError:
    what = f"the body has more than {most:,} bytes; shorten it, or start the server with --max-body"
    return ApiError(413, what, code="body_too_large")


def closing() -> ApiError:
    """Return what a client is told while the server ends: another one may answer it."""
    again = {**RETRY, "Connection": "close"}
    return ApiError(
        503, "the server is shutting down; ask again", code="shutting_down", headers=again
    )


async def answer(error: ApiError, scope: Scope, headers: Headers, send: Send) -> None:
    """Send an error. A client that waits to be asked for its body gets no such word."""
    scope["state"]["error"] = error
    body, raw = error.encoded(**({"Connection": "close"} if headers.one("expect") else {}))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def once(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body first, and then what the connection says."""
    parts: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return parts.pop() if parts else await receive()

    return received
