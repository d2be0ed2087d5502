"""Requests made from /openapi.json, right and wrong ones, never make the server fail."""

from __future__ import annotations

import os

import pytest
from serve_fuzz import fuzz

CASES = int(os.environ.get("OPENELM_FUZZ", "40"))


@pytest.mark.needs("schemathesis")
def test_requests_made_from_the_openapi_get_no_5xx(address: str):
    """OPENELM_FUZZ=10000 makes ten thousand of them."""
    statuses = fuzz(address, CASES)
    assert statuses.total() >= CASES // 2 and set(statuses) <= {200, 400, 404, 415}
