"""Looking events up costs what is asked for, however many others there are."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from tests.conftest import Database
from tests.support.sql import execute, fetch_value
from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.postgres.pool import open_pool
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


async def test_a_plan_from_when_there_was_nothing_reads_no_more_than_is_asked_for(database: Database) -> None:
    """Found at 1,000 events/s: until the table was analyzed, each look-up read every event of the organization."""
    org_id = OrgId(new_uuid())
    await execute(database, "ALTER TABLE ingest.usage_event SET (autovacuum_enabled = off)")
    events = events_of(org_id, 3_000)
    async with open_pool(database.role_url("ingest"), application_name="test", connections_max=1) as pool:
        entries = EntryStore(pool, slot=0)
        # From the sixth time on PostgreSQL may keep a plan for all.
        for _ in range(10):
            assert not (await entries.find_stored(org_id, [event.event_id for event in events[:20]])).events
        for first in range(0, 3_000, 1_000):
            await entries.record_events(org_id, ReservationId(new_uuid()), events[first : first + 1_000])
        unknown = [event.event_id for event in events_of(OrgId(new_uuid()), 20)]
        asked = [event.event_id for event in events[500:520]] + unknown
        async with pool.acquire() as connection, connection.transaction():
            # The pool's only connection, so that what it counts is what is looked up.
            rows = await connection.fetch("SELECT event_id FROM ingest.find_events($1, $2)", org_id, asked)
            read = await connection.fetchval(_ROWS_READ)
        assert {row["event_id"] for row in rows} == set(asked[:20])
        assert read <= len(asked)
    assert await fetch_value(database, "SELECT reltuples FROM pg_class WHERE oid = 'ingest.usage_event'::regclass") < 1
