"""An organization's events, in PostgreSQL and in the cache."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.conftest import Database
from tests.support.known_events import Seconds, patient_cache
from usameter_core.ids import OrgId, new_uuid
from usameter_core.postgres.pool import Pool, open_pool
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.service.known import KnownEvents
from usameter_ingest.store.entries import EntryStore


@pytest.fixture
def org_id() -> OrgId:
    return OrgId(new_uuid())


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("ingest"), application_name="test") as opened:
        yield opened


@pytest.fixture
async def redis(database: Database) -> AsyncIterator[Redis]:
    async with Redis.from_url(database.redis_url) as client:
        yield client


@pytest.fixture
def cache(redis: Redis) -> KnownEventCache:
    return patient_cache(redis)


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


@pytest.fixture
def entries(pool: Pool) -> EntryStore:
    return EntryStore(pool, slot=0)


@pytest.fixture
def known(entries: EntryStore, cache: KnownEventCache, clock: Seconds) -> KnownEvents:
    return KnownEvents(entries=entries, cache=cache, monotonic_seconds=clock)
