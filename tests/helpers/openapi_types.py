"""Answers are checked against what /openapi.json says of them."""

from __future__ import annotations

from typing import Any

import httpx

from openelm_mlx.server.answer_schemas import Reply


def checked(answer: httpx.Response | dict[str, Any], kind: type[Reply]) -> dict[str, Any]:
    """Return an answer, which is exactly of a kind."""
    said = answer if isinstance(answer, dict) else answer.json()
    kind.model_validate(said)
    return said
