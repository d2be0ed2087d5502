"""A server of the bundled model, for all tests of this room."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving import SECONDS, serving


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a server of the bundled model."""
    with serving("openelm-tiny") as address:
        yield address


@pytest.fixture(scope="session")
def http(address: str) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=address, timeout=SECONDS) as client:
        yield client
