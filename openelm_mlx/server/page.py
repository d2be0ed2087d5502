"""The page at `/`: one file, under a policy that lets its own script and style run and no other.

The policy names both by the hash of their text, so that nothing a user or a model writes could run
even if the page took it for HTML. The page speaks to this server only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

FILE = Path(__file__).parents[1] / "assets" / "page" / "index.html"


def policy(html: bytes) -> str:
    """Return the Content-Security-Policy of a page: its inline scripts and styles, by SHA-256."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes(html, b'script')}",
            f"style-src {hashes(html, b'style')}",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # a text that is set as HTML is an error
            "trusted-types 'none'",
        )
    )


def hashes(html: bytes, tag: bytes) -> str:
    """Return the sources that permit the inline elements of this tag, as a policy writes them."""
    texts = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


@cache
def page() -> tuple[bytes, Mapping[str, str]]:
    """Return the page and its headers, read once."""
    html = FILE.read_bytes()
    return html, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy(html),
        "ETag": f'"{hashlib.sha256(html).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # kept, and asked about before each use
    }


async def front_page(request: Request) -> Response:
    """Answer with the page, or with 304 to a browser that has it."""
    html, headers = page()
    known = {
        tag.strip().removeprefix("W/")
        for tag in request.headers.get("If-None-Match", "").split(",")
    }
    if known & {headers["ETag"], "*"}:
        return Response(status_code=304, headers=dict(headers))
    return Response(html, headers=dict(headers))
