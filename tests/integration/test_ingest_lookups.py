"""Looking events up costs what is asked for, however many others there are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from tests.conftest import Database
from tests.support.sql import execute
from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.postgres.pool import Pool, open_pool
from usameter_ingest.domain.event import UsageEvent, new_event
from usameter_ingest.store.entries import EntryStore

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)
# Rows that an index scan has read of the tables, whether or not they were what was looked for.
_ROWS_READ = """
    SELECT sum(coalesce(idx_tup_fetch, 0) + seq_tup_read)::int FROM pg_stat_xact_user_tables
    WHERE schemaname = 'ingest' AND relname IN ('usage_event', 'correction')
"""


def events_of(org_id: OrgId, count: int) -> list[UsageEvent]:
    """Each at a time of its own."""
    return [
        new_event(
            org_id=org_id,
            tenant_id="acme",
            event_type="call",
            quantity=Decimal(1),
            metadata=b"{}",
            idempotency_key=f"k{number}",
            timestamp=NOW - timedelta(seconds=number),
            now=NOW,
        )
        for number in range(count)
    ]


async def rows_read(pool: Pool, org_id: OrgId, asked: list[UUID]) -> tuple[set[UUID], int]:
    """What a look-up finds, and how many rows it reads for that."""
    async with pool.acquire() as connection, connection.transaction():
        # The pool's only connection, so that what it counts is what is looked up.
        found = await connection.fetch("SELECT event_id FROM ingest.find_events($1, $2)", org_id, asked)
        return {row["event_id"] for row in found}, await connection.fetchval(_ROWS_READ)


async def record(entries: EntryStore, org_id: OrgId, events: list[UsageEvent]) -> None:
    for first in range(0, len(events), 1_000):
        await entries.record_events(org_id, ReservationId(new_uuid()), events[first : first + 1_000])


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    """One connection, so that it keeps what it once planned; and nobody else has the table analyzed."""
    for table in ("usage_event", "correction"):
        await execute(database, f"ALTER TABLE ingest.{table} SET (autovacuum_enabled = off)")
    async with open_pool(database.role_url("ingest"), application_name="test", connections_max=1) as opened:
        yield opened


async def test_a_plan_from_when_there_was_nothing_reads_no_more_than_is_asked_for(pool: Pool) -> None:
    """Until the table was analyzed, each look-up read every event of the organization."""
    org_id = OrgId(new_uuid())
    entries, events = EntryStore(pool, slot=0), events_of(org_id, 3_000)
    # From the sixth time on PostgreSQL may keep a plan for all.
    for _ in range(10):
        assert not (await entries.find_stored(org_id, [event.event_id for event in events[:20]])).events
    await record(entries, org_id, events)
    known, unknown = events[500:520], events_of(OrgId(new_uuid()), 20)
    found, read = await rows_read(pool, org_id, [event.event_id for event in known + unknown])
    assert found == {event.event_id for event in known}
    assert read <= 40


async def test_statistics_that_lack_a_new_organization_do_not_have_all_of_it_read(
    pool: Pool, database: Database
) -> None:
    """Of whoever came after the last ANALYZE they say that it has nothing: 1,300 events/s instead of 43,000."""
    entries, old, new = EntryStore(pool, slot=0), OrgId(new_uuid()), OrgId(new_uuid())
    await record(entries, old, events_of(old, 5_000))
    await execute(database, "ANALYZE ingest.usage_event, ingest.correction")
    events = events_of(new, 3_000)
    await record(entries, new, events)
    unknown = events_of(OrgId(new_uuid()), 20)
    found, read = await rows_read(pool, new, [event.event_id for event in events[500:520] + unknown])
    assert found == {event.event_id for event in events[500:520]}
    assert read <= 40
