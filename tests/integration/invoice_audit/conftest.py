"""An organization whose invoices are audited."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.conftest import Database
from tests.support.billing import Organization, World, open_world


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as opened:
        yield opened


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        yield world.organization(channel)
