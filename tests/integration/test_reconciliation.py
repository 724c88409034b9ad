"""Reconciling quota counters with the ledger: what is wrong is found and mended, and nothing else is (invariant I4)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.audit import is_settled
from tests.support.clock import ManualClock
from tests.support.reconciliation import WRONG, WRONG_DAYS, reconcile
from tests.support.services import INTERNAL_TOKEN, Services, open_services
from tests.support.sql import execute, fetch_rows, fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import quota_pb2
from usameter.quota.v1 import reconciliation_pb2 as quota_reconciliation_pb2
from usameter.quota.v1 import reconciliation_pb2_grpc as quota_reconciliation_pb2_grpc
from usameter_core.ids import ReservationId, new_uuid, parse_id
from usameter_core.postgres.pool import open_pool
from usameter_ingest.clients import CounterClient, QuotaClient, Usage
from usameter_ingest.domain.event import new_event
from usameter_ingest.service.reconciling import Reconciled, ReconcilingService
from usameter_ingest.store.entries import EntryStore
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.store.reconciliation import ReconciliationStore
from usameter_quota.servicer import reconciliation

NOW = datetime(2026, 3, 10, 12, 30, tzinfo=UTC)
HOUR = NOW.replace(minute=0)
DAY = HOUR.replace(hour=0)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
async def services(database: Database, clock: ManualClock) -> AsyncIterator[Services]:
    async with open_services(database, clock=clock) as running:
        yield running


async def record(services: Services, quantity: float, *, tenant_id: str = "acme", at: datetime = NOW) -> str:
    recorded = await services.events.RecordEvents(
        event_pb2.RecordEventsRequest(event_type="req", tenant_id=tenant_id, quantity=quantity, timestamp=at),
        metadata=services.metadata,
        timeout=10,
    )
    event_id: str = recorded.event_id
    return event_id


async def assert_exact(services: Services, database: Database) -> None:
    assert (await reconcile(services))[1:] == ([], [])
    assert await fetch_rows(database, WRONG) == []
    assert await fetch_rows(database, WRONG_DAYS) == []


async def test_what_is_right_is_compared_and_nothing_is_reported(services: Services, database: Database) -> None:
    assert await reconcile(services) == (0, [], [])
    for tenant_id, at in itertools.product(
        ("acme", "globex"), (NOW, NOW - timedelta(hours=1), NOW - timedelta(days=40))
    ):
        await record(services, 2.5, tenant_id=tenant_id, at=at)
    # Three hours and two days of each tenant.
    assert await reconcile(services, fix=True) == (10, [], [])
    assert await fetch_value(database, "SELECT count(*) FROM quota.repair") == 0


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE quota.usage_hour SET quantity = quantity + 0.000001", [("acme", "HOUR", HOUR, "5.000001", "5")]),
        ("UPDATE quota.usage_hour SET quantity = 0", [("acme", "HOUR", HOUR, "0", "5")]),
        ("UPDATE quota.usage_day SET quantity = quantity - 2", [("acme", "DAY", DAY, "3", "5")]),
        ("DELETE FROM quota.usage_hour", [("acme", "HOUR", HOUR, "0", "5")]),
        ("DELETE FROM quota.usage_day", [("acme", "DAY", DAY, "0", "5")]),
        (
            "INSERT INTO quota.usage_hour SELECT org_id, 'nobody', 'req', hour, 7 FROM quota.usage_hour",
            [("nobody", "HOUR", HOUR, "7", "0")],
        ),
        (
            "INSERT INTO quota.usage_day SELECT org_id, tenant_id, 'other', '9999-12-31', 7 FROM quota.usage_day",
            [("acme", "DAY", datetime(9999, 12, 31, tzinfo=UTC), "7", "0")],
        ),
        # What a whole lost reservation leaves, in both.
        (
            "WITH hours AS (UPDATE quota.usage_hour SET quantity = quantity - 4) "
            "UPDATE quota.usage_day SET quantity = quantity - 4",
            [("acme", "HOUR", HOUR, "1", "5"), ("acme", "DAY", DAY, "1", "5")],
        ),
    ],
)
async def test_a_counter_that_was_tampered_with_is_named_and_mended(
    services: Services, database: Database, statement: str, expected: list[tuple[str, str, datetime, str, str]]
) -> None:
    await record(services, 5)
    await execute(database, statement)
    _, found, _ = await reconcile(services)
    assert found == [(*each, False) for each in expected]
    # Looking has changed nothing.
    _, found, _ = await reconcile(services, fix=True)
    assert found == [(*each, True) for each in expected]
    await assert_exact(services, database)
    repairs = await fetch_rows(
        database, "SELECT tenant_id, unit, starts_at, counter, expected FROM quota.repair ORDER BY repair_id"
    )
    assert [tuple(row.values()) for row in repairs] == [
        (tenant_id, unit, start, Decimal(counter), Decimal(right))
        for tenant_id, unit, start, counter, right in expected
    ]
    assert await fetch_value(database, "SELECT DISTINCT repaired_by ~ '^key_' FROM quota.repair")
    # What comes next counts on it.
    await record(services, 1)
    await assert_exact(services, database)


async def test_a_mended_counter_is_what_limits_go_by(services: Services, database: Database) -> None:
    """A counter that had lost what is stored would admit what the limit refuses."""
    await record(services, 5)
    # An open reservation would write the event itself, as it is settled.
    await until(lambda: is_settled(database.admin_url), "the reservation is settled")
    await execute(database, "UPDATE quota.usage_hour SET quantity = 0")
    await execute(database, "UPDATE quota.usage_day SET quantity = 0")
    limit = quota_pb2.SetQuotaRequest(
        tenant_id="acme", event_type="req", limit_value="6", enforcement_mode=quota_pb2.HARD, period=quota_pb2.MONTHLY
    )
    await services.quotas.SetQuota(limit, metadata=services.metadata, timeout=10)
    assert await fetch_value(database, "SELECT count(*) FROM quota.quota_event") == 0
    await reconcile(services, fix=True)
    # As if the use had come by itself.
    assert await fetch_value(database, "SELECT array_agg(type) FROM quota.quota_event") == ["SOFT_LIMIT_REACHED"]
    with pytest.raises(grpc.aio.AioRpcError, match="Quota exceeded"):
        await record(services, 2)
    await record(services, 1)


async def test_a_lost_adjustment_is_found(services: Services, database: Database) -> None:
    event_id = parse_id("evt", await record(services, 5), field="event_id")
    await execute(
        database,
        """
        DO $$ BEGIN
            PERFORM ingest.record_correction(org_id, NULL, 0::smallint, event_id, 'AMEND', -2, 'wrong', '')
            FROM ingest.usage_event;
            DELETE FROM ingest.quota_outbox;
        END $$
        """,
    )
    assert await fetch_value(database, "SELECT event_id FROM ingest.correction") == event_id
    _, found, _ = await reconcile(services, fix=True)
    assert found == [("acme", "HOUR", HOUR, "5", "3", True), ("acme", "DAY", DAY, "5", "3", True)]
    await assert_exact(services, database)


async def test_what_waits_in_the_outbox_is_no_difference(services: Services, database: Database) -> None:
    """It is still counted, and is expected to be, until quota has taken it off; also where that was not confirmed."""
    await record(services, 5)
    # Refused by quota for as long as the counter is too low, and so it stays in the outbox.
    await execute(database, "UPDATE quota.usage_hour SET quantity = 1")
    await execute(
        database,
        """
        SELECT ingest.record_correction(org_id, NULL, 0::smallint, event_id, 'AMEND', -2, 'wrong', '')
        FROM ingest.usage_event
        """,
    )
    _, found, _ = await reconcile(services)
    assert found == [("acme", "HOUR", HOUR, "1", "5", False)]
    _, found, _ = await reconcile(services, fix=True)
    assert found == [("acme", "HOUR", HOUR, "1", "5", True)]

    async def taken_off() -> bool:
        return await fetch_value(database, "SELECT count(*) FROM ingest.quota_outbox") == 0

    await until(taken_off, "the outbox is empty")
    assert await fetch_value(database, "SELECT quantity FROM quota.usage_hour") == 3
    # Delivered, and not yet deleted: counted once all the same.
    await execute(
        database,
        """
        INSERT INTO ingest.quota_outbox (org_id, event_id, tenant_id, event_type, occurred_at, quantity, created_at)
        SELECT org_id, event_id, tenant_id, event_type, occurred_at, -2, 'infinity' FROM ingest.usage_event
        """,
    )
    await assert_exact(services, database)


async def test_an_open_reservation_counts_whether_or_not_its_entries_are_stored(
    services: Services, database: Database
) -> None:
    """Reserved and not stored, then stored and not settled: the counter is right all along."""
    quota = QuotaClient(services.quota, internal_token=INTERNAL_TOKEN)
    reservation_id = ReservationId(new_uuid())
    await quota.reserve(services.org_id, reservation_id, [[Usage("acme", "req", NOW, Decimal(3))]])
    await execute(database, "UPDATE quota.usage_day SET quantity = 4")
    _, found, _ = await reconcile(services, fix=True)
    assert found == [("acme", "DAY", DAY, "4", "3", True)]
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
    async with open_pool(database.role_url("ingest"), application_name="test") as pool:
        await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])
    await execute(database, "UPDATE quota.usage_day SET quantity = 4")
    _, found, stuck = await reconcile(services, fix=True)
    assert (found, stuck) == ([("acme", "DAY", DAY, "4", "3", True)], [])
    assert await fetch_value(database, "SELECT state FROM quota.reservation") == "OPEN"
    await assert_exact(services, database)


async def test_a_stuck_reservation_is_named_and_settled(
    services: Services, database: Database, clock: ManualClock
) -> None:
    """The janitor cannot give back what the counter lacks; once that is mended, it can be given back."""
    quota = QuotaClient(services.quota, internal_token=INTERNAL_TOKEN)
    reservation_id = ReservationId(new_uuid())
    await quota.reserve(services.org_id, reservation_id, [[Usage("acme", "req", NOW, Decimal(5))]])
    await execute(database, "UPDATE quota.usage_hour SET quantity = 2")
    clock.advance(timedelta(seconds=59))
    assert (await reconcile(services))[2] == []
    clock.advance(timedelta(seconds=1))
    _, found, (stuck,) = await reconcile(services)
    assert found == [("acme", "HOUR", HOUR, "2", "5", False)]
    assert (stuck.reservation_id, stuck.stored, stuck.fixed) == (str(reservation_id), False, False)
    assert stuck.created_at.ToDatetime(UTC) == NOW
    assert [(each.tenant_id, each.event_type, each.hour.ToDatetime(UTC), each.quantity) for each in stuck.held] == [
        ("acme", "req", HOUR, "5")
    ]
    _, found, stuck_after = await reconcile(services, fix=True)
    assert found == [("acme", "HOUR", HOUR, "2", "5", True)]
    # None where the janitor came between.
    assert all(each.fixed for each in stuck_after)
    assert await fetch_value(database, "SELECT state FROM quota.reservation") == "ABORTED"
    assert await fetch_value(database, "SELECT outcome FROM ingest.reservation_outcome") == "ABORTED"
    await assert_exact(services, database)


async def test_rollups_that_contradict_their_entries_mend_nothing(services: Services, database: Database) -> None:
    """I2 first: a repair rests on entries, not on sums of them that are wrong themselves."""
    await record(services, 5)
    await execute(database, "UPDATE ingest.usage_hour SET quantity = 9")
    await execute(database, "UPDATE quota.usage_day SET quantity = 9")
    _, found, _ = await reconcile(services, fix=True)
    assert found == [("acme", "HOUR", HOUR, "5", "9", False), ("acme", "DAY", DAY, "9", "5", True)]
    assert await fetch_value(database, "SELECT quantity FROM quota.usage_hour") == 5


async def test_two_at_once_repair_once(services: Services, database: Database) -> None:
    for number in range(20):
        await record(services, 5, tenant_id=f"t{number}")
    await execute(database, "UPDATE quota.usage_hour SET quantity = quantity + 1")
    answers = await asyncio.gather(*(reconcile(services, fix=True) for _ in range(4)))
    assert sum(len(found) for _, found, _ in answers) == 20
    assert await fetch_value(database, "SELECT count(*) FROM quota.repair") == 20
    await assert_exact(services, database)


async def test_pages_leave_nothing_out_and_repeat_nothing(services: Services, database: Database) -> None:
    """In the order of bytes on both sides, and where one side has what the other lacks."""
    tenants = ["a", "B", "b", "aa", "a b", "é", "z", "Z", "ｱ", "😀", "~", "-"]
    for tenant_id in tenants:
        await record(services, 1, tenant_id=tenant_id)
        await record(services, 1, tenant_id=tenant_id, at=NOW - timedelta(hours=2))
    await execute(database, "DELETE FROM quota.usage_hour WHERE tenant_id IN ('B', 'é', '😀')")
    await execute(
        database,
        "INSERT INTO quota.usage_hour SELECT $1, t, 'req', $2, 1 FROM unnest(ARRAY['A', 'ß', 'ｲ', '!']) AS t",
        services.org_id,
        HOUR,
    )
    # Another organization's.
    await execute(database, "INSERT INTO quota.usage_hour SELECT $1, 't', 'req', $2, 1", uuid4(), HOUR)
    for page_counters_max in (1, 2, 3, 7, 1000):
        async with reconciling(services, database, page_counters_max=page_counters_max) as service:
            pages = await all_pages(services, service)
        assert all(page.compared <= 2 * page_counters_max for page in pages)
        compared = sum(page.compared for page in pages)
        wrong = [each.key for page in pages for each in page.differences]
        assert compared == 2 * len(tenants) + 4 + len(tenants)
        assert sorted(key.tenant_id for key in wrong) == sorted(["B", "é", "😀"] * 2 + ["A", "ß", "ｲ", "!"])


async def test_a_page_with_much_that_is_wrong_ends_in_time(services: Services, database: Database) -> None:
    """Its caller waits for half a minute; the token leads on from where it stopped."""
    await execute(
        database,
        "INSERT INTO quota.usage_day SELECT $1, 't' || n, 'req', $2, n FROM generate_series(1, 250) AS n",
        services.org_id,
        DAY,
    )
    async with reconciling(services, database, page_seconds_max=0) as service:
        pages = await all_pages(services, service)
    # No hours, and of the days a hundred at a time.
    assert [page.compared for page in pages] == [0, 100, 100, 50]
    found = [each for page in pages for each in page.differences]
    assert len({each.key for each in found}) == len(found) == 250
    assert sum(each.counter for each in found) == 250 * 251 / 2


@pytest.mark.parametrize("cut_off", [True, False])
async def test_whoever_leaves_in_the_middle_keeps_nobody_locked_out(
    services: Services, database: Database, cut_off: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads are locked until the caller has said what is stored: 2 s at most, and no longer than it is there."""
    await record(services, 5)
    if cut_off:
        # So that only its leaving ends it in the time below.
        monkeypatch.setattr(reconciliation, "_STORED_SECONDS_MAX", 60.0)
    stub: Any = quota_reconciliation_pb2_grpc.ReconciliationServiceStub(services.quota)
    call = stub.CompareCounters(metadata=services.service_metadata, timeout=20)
    key = quota_reconciliation_pb2.CounterKey(
        tenant_id="acme", event_type="req", unit=quota_reconciliation_pb2.DAY, start=DAY
    )
    begin = quota_reconciliation_pb2.CompareBegin(org_id=str(services.org_id), keys=[key], repaired_by="key_1")
    await call.write(quota_reconciliation_pb2.CompareCountersRequest(begin=begin))
    assert (await call.read()).WhichOneof("step") == "open"
    recording = asyncio.create_task(record(services, 1))
    done, _ = await asyncio.wait([recording], timeout=0.5)
    assert not done
    if cut_off:
        call.cancel()
        async with asyncio.timeout(30):
            await recording
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await recording
    assert await fetch_value(database, "SELECT count(*) FROM quota.repair") == 0
    await assert_exact(services, database)


@asynccontextmanager
async def reconciling(services: Services, database: Database, **bounds: Any) -> AsyncIterator[ReconcilingService]:
    """The service as the server makes it, with pages of other bounds."""
    async with open_pool(database.role_url("ingest"), application_name="test") as pool:
        yield ReconcilingService(
            store=ReconciliationStore(pool),
            outcomes=OutcomeStore(pool),
            counters=CounterClient(services.quota, internal_token=INTERNAL_TOKEN),
            quota=QuotaClient(services.quota, internal_token=INTERNAL_TOKEN),
            **bounds,
        )


async def all_pages(services: Services, service: ReconcilingService) -> list[Reconciled]:
    """Every page, in order; nothing is fixed."""
    pages = [await service.reconcile(services.org_id, after=None, fixed_by=None)]
    while pages[-1].next_after is not None:
        pages.append(await service.reconcile(services.org_id, after=pages[-1].next_after, fixed_by=None))
    return pages
