"""Files of requests in OpenAI's batch format, and what their answers have in common."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
WORDS = ("once", "upon", "a", "time", "there", "was", "a", "fox", "who", "told", "the", "king")


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """Return one request; a chat has a question if none is given."""
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": "Who are you?"}])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, lines: list[Any]) -> Path:
    """Write a file of requests; texts are written as they are."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Return the answers in a file."""
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def stable(answer: dict[str, Any]) -> dict[str, Any]:
    """Return what two runs of a line must have in common: all but ids, times and the cache."""
    body = answer["response"]["body"]
    others = ("id", "created", "created_at", "completed_at", "usage")
    kept = {name: value for name, value in body.items() if name not in others}
    if "output" in body:
        kept["output"] = [{**one, "id": None} for one in body["output"]]
    usage = {name: n for name, n in body.get("usage", {}).items() if name.endswith("_tokens")}
    response = answer["response"] | {"body": kept | {"usage": usage}}
    return answer | {"response": response}


def some(count: int, tokens: int = 6) -> list[dict[str, Any]]:
    """Return short requests of every kind, some of them wrong; chats share three system turns."""
    rng = random.Random(count)
    lines = []
    for number in range(count):
        body: dict[str, Any] = {"max_tokens": rng.randint(1, tokens)}
        if number % 2:
            body |= {"temperature": 0.8}
        if number % 5 == 0:
            body |= {"seed": number}
        if number % 7 == 0:
            body |= {"n": 2}
        if number % 41 == 40:
            body |= {"unknown": 1}
        text = " ".join(rng.choices(WORDS, k=rng.randint(2, 20)))
        if number % 3 == 0:
            lines.append(line(f"line-{number}", TEXT, prompt=text, **body))
        else:
            role = f"Answer as fox {number // 50 % 3}. " + " ".join(WORDS)
            messages = [{"role": "system", "content": role}, {"role": "user", "content": text}]
            lines.append(line(f"line-{number}", messages=messages, **body))
    return lines
