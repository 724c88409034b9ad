"""An edge that tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.edge import Edge, open_edge


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Edge]:
    async with open_edge() as edge:
        yield edge


@pytest.fixture
def edge(shared: Edge) -> Edge:
    """The shared edge, with a backend that has forgotten everything."""
    shared.backend.requests.clear()
    shared.backend.failure = None
    return shared
