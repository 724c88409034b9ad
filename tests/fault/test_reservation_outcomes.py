"""Between reserve and settle: whatever is cut off there, the counter ends equal to what is stored (invariant I4)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import INTERNAL_TOKEN, Services, open_services
from tests.support.sql import execute, fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import quota_pb2, reservation_pb2, reservation_pb2_grpc
from usameter_core.errors import Internal
from usameter_core.ids import ReservationId, new_uuid
from usameter_core.postgres.pool import Pool, open_pool
from usameter_ingest.clients import QuotaClient, Usage
from usameter_ingest.domain.event import UsageEvent, new_event
from usameter_ingest.store.entries import EntryStore, EventAlreadyStored, ReservationGivenAway
from usameter_ingest.store.outcomes import Outcome, OutcomeStore
from usameter_ingest.worker import Janitor

NOW = datetime.now(UTC)


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    async with open_pool(database.role_url("ingest"), application_name="test") as opened:
        yield opened


@pytest.fixture
def quota(services: Services) -> QuotaClient:
    return QuotaClient(services.quota, internal_token=INTERNAL_TOKEN)


@pytest.fixture
def janitor(quota: QuotaClient, pool: Pool) -> Janitor:
    return Janitor(quota=quota, outcomes=OutcomeStore(pool), min_age_seconds=0)


async def reserve(services: Services, quota: QuotaClient) -> tuple[ReservationId, UsageEvent]:
    """One event's quota taken, and nothing done yet: where a crash is worst."""
    request = quota_pb2.SetQuotaRequest(
        tenant_id="acme",
        event_type="req",
        limit_value="100",
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await services.quotas.SetQuota(request, metadata=services.metadata, timeout=10)
    reservation_id = ReservationId(new_uuid())
    event = new_event(
        org_id=services.org_id,
        tenant_id="acme",
        event_type="req",
        quantity=Decimal(3),
        metadata=b"{}",
        idempotency_key="k",
        timestamp=NOW,
        now=NOW,
    )
    (verdict,) = await quota.reserve(services.org_id, reservation_id, [[Usage("acme", "req", NOW, Decimal(3))]])
    assert not verdict.violations
    assert await used(services) == "3"
    return reservation_id, event


async def used(services: Services) -> str:
    request = quota_pb2.GetQuotaRequest(tenant_id="acme", event_type="req")
    current: str = (await services.quotas.GetQuota(request, metadata=services.metadata, timeout=10)).current
    return current


async def test_killed_between_reserve_and_insert_uses_up_no_quota(
    services: Services, quota: QuotaClient, janitor: Janitor
) -> None:
    """I4: the counter equals stored usage once the janitor has run."""
    await reserve(services, quota)
    assert await janitor.run_once() == 1
    assert await used(services) == "0"
    assert await janitor.run_once() == 0


async def test_killed_between_insert_and_settle_keeps_what_was_stored(
    services: Services, quota: QuotaClient, janitor: Janitor, pool: Pool
) -> None:
    """I4: a committed group counts, although nobody said so to quota."""
    reservation_id, event = await reserve(services, quota)
    await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])
    assert await janitor.run_once() == 1
    assert await used(services) == "3"


async def test_an_insert_that_comes_after_the_janitor_rolls_back(
    services: Services, quota: QuotaClient, janitor: Janitor, pool: Pool, database: Database
) -> None:
    """I4: quota that was given away cannot be used by a writer that was only slow."""
    reservation_id, event = await reserve(services, quota)
    await janitor.run_once()
    with pytest.raises(ReservationGivenAway):
        await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 0


async def test_the_janitor_waits_for_a_writer_that_is_about_to_commit(
    services: Services, quota: QuotaClient, janitor: Janitor, database: Database
) -> None:
    """I4: an uncommitted outcome decides nothing until its transaction has ended."""
    reservation_id, _ = await reserve(services, quota)
    connection = await asyncpg.connect(database.role_url("ingest"))
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "INSERT INTO ingest.reservation_outcome (org_id, reservation_id, outcome) VALUES ($1, $2, 'COMMITTED')",
            services.org_id,
            reservation_id,
        )
        running = asyncio.create_task(janitor.run_once())
        done, _pending = await asyncio.wait([running], timeout=0.3)
        assert not done
        await transaction.commit()
        assert await running == 1
    finally:
        await connection.close()
    assert await used(services) == "3"


async def test_a_writer_that_hangs_keeps_only_its_own_reservation_from_the_janitor(
    services: Services, quota: QuotaClient, janitor: Janitor, database: Database
) -> None:
    """I4: what others left open is given back while one outcome, the oldest at that, cannot be decided."""
    undecided, _ = await reserve(services, quota)
    others = [ReservationId(new_uuid()) for _ in range(3)]
    for other in others:
        await quota.reserve(services.org_id, other, [[Usage("acme", "req", NOW, Decimal(3))]])
    connection = await asyncpg.connect(database.role_url("ingest"))
    try:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(
            "INSERT INTO ingest.reservation_outcome (org_id, reservation_id, outcome) VALUES ($1, $2, 'COMMITTED')",
            services.org_id,
            undecided,
        )
        assert await janitor.run_once() == 3
        assert await quota.list_open(min_age_seconds=0, limit=10) == [(services.org_id, undecided)]
        assert await used(services) == "3"
        await transaction.commit()
    finally:
        await connection.close()
    assert await janitor.run_once() == 1
    assert await used(services) == "3"


async def test_a_reservation_that_quota_cannot_give_back_keeps_no_other_open(
    services: Services, quota: QuotaClient, janitor: Janitor, database: Database
) -> None:
    """I4: also those that are settled in other calls, before and behind it."""
    refused, _ = await reserve(services, quota)
    for _ in range(250):
        await quota.reserve(services.org_id, ReservationId(new_uuid()), [[Usage("other", "req", NOW, Decimal(1))]])
    await execute(database, "UPDATE quota.usage_hour SET quantity = 0 WHERE tenant_id = 'acme'")
    with pytest.raises(Internal):
        await janitor.run_once()
    assert await quota.list_open(min_age_seconds=0, limit=1_000) == [(services.org_id, refused)]


async def test_an_event_that_is_there_already_rolls_the_whole_group_back(
    services: Services, quota: QuotaClient, pool: Pool, database: Database
) -> None:
    reservation_id, event = await reserve(services, quota)
    entries = EntryStore(pool, slot=0)
    await entries.record_events(services.org_id, reservation_id, [event])
    other = new_event(
        org_id=services.org_id,
        tenant_id="acme",
        event_type="req",
        quantity=Decimal(1),
        metadata=b"{}",
        idempotency_key=None,
        timestamp=None,
        now=NOW,
    )
    second = ReservationId(new_uuid())
    with pytest.raises(EventAlreadyStored):
        await entries.record_events(services.org_id, second, [other, event])
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 1
    assert await fetch_value(database, "SELECT sum(event_count)::int FROM ingest.usage_day") == 1
    assert await OutcomeStore(pool).decide(services.org_id, second) is Outcome.ABORTED


async def test_ingest_goes_on_when_its_connections_are_cut(services: Services, database: Database) -> None:
    """I1: what is acknowledged is stored once, what is not can be sent again on the same key."""
    stop = asyncio.Event()
    acknowledged: set[str] = set()

    async def client(number: int) -> None:
        sent = 0
        while not stop.is_set() or sent < 5:
            key = f"{number}.{sent}"
            request = event_pb2.RecordEventsRequest(event_type="req", tenant_id="acme", idempotency_key=key)
            try:
                await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
            except Exception as error:
                assert "UNAVAILABLE" in str(error), error
                continue
            acknowledged.add(key)
            sent += 1

    clients = [asyncio.create_task(client(number)) for number in range(8)]
    admin = await asyncpg.connect(database.server.url())
    for _ in range(10):
        await admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND usename = 'usameter_ingest'",
            database.name,
        )
        await asyncio.sleep(0.05)
    await admin.close()
    stop.set()
    await asyncio.gather(*clients)
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == len(acknowledged)
    assert await fetch_value(database, "SELECT sum(event_count)::int FROM ingest.usage_day") == len(acknowledged)


@pytest.mark.parametrize("held", [False, True])
async def test_a_group_that_runs_again_is_not_refused_for_what_its_first_attempt_took(
    services: Services, database: Database, held: bool
) -> None:
    """Another replica stores one of its events meanwhile; the group fits, with that event counted once."""
    limit = quota_pb2.SetQuotaRequest(
        tenant_id="acme",
        event_type="req",
        limit_value="10",
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await services.quotas.SetQuota(limit, metadata=services.metadata, timeout=10)
    if held:
        stub: Any = reservation_pb2_grpc.ReservationServiceStub(services.quota)
        hold = reservation_pb2.ReserveQuotaRequest(
            tenant_id="acme", event_type="req", quantity="9", reservation_id="job"
        )
        await stub.ReserveQuota(hold, metadata=services.metadata, timeout=10)
    shared = new_event(
        org_id=services.org_id,
        tenant_id="acme",
        event_type="req",
        quantity=Decimal(1),
        metadata=b"{}",
        idempotency_key="k",
        timestamp=None,
        now=NOW,
    )
    request = event_pb2.RecordEventsRequest(
        events=[
            event_pb2.EventInput(tenant_id="acme", event_type="req", quantity=1, idempotency_key="k"),
            event_pb2.EventInput(
                tenant_id="acme",
                event_type="req",
                quantity=9,
                idempotency_key="m",
                reservation_id="job" if held else None,
            ),
        ]
    )
    replica: Any = await asyncpg.connect(database.role_url("ingest"))
    try:
        # A connection is asked like a pool, and keeps its transaction open.
        async with replica.transaction():
            await EntryStore(replica, slot=1).record_events(services.org_id, ReservationId(new_uuid()), [shared])
            sending = services.events.RecordEvents(request, metadata=services.metadata, timeout=20)
            recording = asyncio.ensure_future(sending)

            async def waits() -> bool:
                return bool(await fetch_value(database, "SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await until(waits, "the group waits for the other's insert")
        assert [each.deduplicated for each in (await recording).results] == [True, False]
    finally:
        await replica.close()
