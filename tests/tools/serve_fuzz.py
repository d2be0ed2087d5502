"""Requests that schemathesis makes from /openapi.json, against a server of the bundled model.

    python tests/tools/serve_fuzz.py 10000

Bodies are made by the schema, and against it. It prints how many requests got which status, and
each one that got another answer than the schema says; a status of 500 and above fails the run.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

LIMITS = {"/v1/responses": "max_output_tokens"}  # the field that limits an answer, by the path
MOST = 3  # tokens of an answer: the server is tried, not the model


def fuzz(address: str, cases: int) -> Counter[int]:
    """Send about `cases` requests and return how many got which status.

    Raises `AssertionError` for a request that the server failed with.
    """
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode

    schema: Any = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [one.ok() for one in schema.get_all_operations()]
    posts = [one for one in operations if one.method.upper() == "POST"]
    statuses = Counter[int]()
    with httpx.Client(base_url=address, timeout=60) as client:
        for operation in posts:
            for mode in GenerationMode:

                @settings(
                    max_examples=max(1, cases // len(posts) // 2),
                    deadline=None,
                    database=None,
                    derandomize=cases < 100,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def check(case: Any) -> None:
                    statuses[send(client, case)] += 1

                check()
    return statuses


def send(client: httpx.Client, case: Any) -> int:
    """Send a request, with an answer of few tokens; return its status."""
    body = case.body
    limit = LIMITS.get(case.path, "max_tokens")
    if isinstance(body, dict) and case.path.startswith("/v1/"):
        body.pop("max_completion_tokens", None)
        if isinstance(body.get("model"), str):
            del body["model"]  # most would be unknown
        if limit not in body or (isinstance(body[limit], int) and body[limit] > MOST):
            body[limit] = MOST
    headers = {"Content-Type": "application/json"}
    if type(body).__name__ == "NotSet":
        body = b""
    text = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.request(case.method, case.path, content=text, headers=headers)
    assert answer.status_code < 500, (case.path, text, answer.text)
    if answer.headers["content-type"].startswith("text/event-stream"):
        assert '"code": "server_error"' not in answer.text, (case.path, text, answer.text)
    return answer.status_code


def main() -> int:
    from serving import serving

    with serving("openelm-tiny") as address:
        statuses = fuzz(address, int(sys.argv[1]) if len(sys.argv) > 1 else 10000)
    for status, count in sorted(statuses.items()):
        print(f"{count} requests got {status}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
