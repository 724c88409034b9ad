"""Quota on a database that all tests of a module share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.quota import Bench
from usameter_core.postgres.migrate import migrate
from usameter_core.postgres.pool import Pool, open_pool
from usameter_devstack.postgres import EmbeddedPostgres


@pytest.fixture(scope="module")
async def pool(postgres: EmbeddedPostgres) -> AsyncIterator[Pool]:
    """One database for all tests here: each has an organization of its own."""
    await postgres.ensure_database("quota_events")
    await migrate(postgres.url("quota_events"), schema="quota", package="usameter_quota")
    async with open_pool(postgres.url("quota_events", user="usameter_quota"), application_name="test") as opened:
        yield opened


@pytest.fixture
async def replica(postgres: EmbeddedPostgres, pool: Pool) -> AsyncIterator[Pool]:
    """The pool of a second replica."""
    async with open_pool(postgres.url("quota_events", user="usameter_quota"), application_name="replica") as opened:
        yield opened


@pytest.fixture
def bench(pool: Pool) -> Bench:
    return Bench(pool)
