"""Answers are checked against what /openapi.json says of them."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from openelm_mlx.server.answer_schemas import Reply


def checked(answer: httpx.Response | dict[str, Any], kind: type[Reply]) -> dict[str, Any]:
    """Return an answer, which is exactly of a kind."""
    said = answer if isinstance(answer, dict) else answer.json()
    kind.model_validate(said)
    return said


def near(value: Any) -> Any:
    """Return what equals a value but for rounding: the prompt of a second answer is cached."""
    if isinstance(value, dict):
        return {name: near(one) for name, one in value.items()}
    if isinstance(value, list):
        return [near(one) for one in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
