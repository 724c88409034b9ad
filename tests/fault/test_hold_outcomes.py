"""Between the claim of a reservation and its settlement: wherever it is cut off, invariant I4 holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import INTERNAL_TOKEN, Services, open_services
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, reconciliation_pb2, reconciliation_pb2_grpc
from usameter.quota.v1 import quota_pb2, reservation_pb2, reservation_pb2_grpc
from usameter_core.ids import ReservationId, new_uuid
from usameter_core.postgres.pool import Pool, open_pool
from usameter_ingest.clients import QuotaClient, Usage
from usameter_ingest.domain.event import UsageEvent, new_event
from usameter_ingest.store.entries import EntryStore, ReservationGivenAway
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.worker import Janitor

NOW = datetime.now(UTC)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
async def services(database: Database, clock: ManualClock) -> AsyncIterator[Services]:
    async with open_services(database, clock=clock) as running:
        request = quota_pb2.SetQuotaRequest(
            tenant_id="acme",
            event_type="req",
            limit_value="10",
            enforcement_mode=quota_pb2.HARD,
            period=quota_pb2.MONTHLY,
        )
        await running.quotas.SetQuota(request, metadata=running.metadata, timeout=10)
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


def reservations(services: Services) -> Any:
    return reservation_pb2_grpc.ReservationServiceStub(services.quota)


async def hold(services: Services, name: str = "r", *, ttl_seconds: int = 900) -> None:
    request = reservation_pb2.ReserveQuotaRequest(
        tenant_id="acme", event_type="req", quantity="6", reservation_id=name, ttl_seconds=ttl_seconds
    )
    await reservations(services).ReserveQuota(request, metadata=services.metadata, timeout=10)


async def claim(
    services: Services, quota: QuotaClient, quantity: int, *, at: datetime = NOW
) -> tuple[ReservationId, UsageEvent]:
    """One event's quota taken out of the reservation, and nothing done yet: where a crash is worst."""
    reservation_id = ReservationId(new_uuid())
    event = new_event(
        org_id=services.org_id,
        tenant_id="acme",
        event_type="req",
        quantity=Decimal(quantity),
        metadata=b"{}",
        idempotency_key="k",
        timestamp=at,
        now=NOW,
    )
    usage = Usage("acme", "req", at, Decimal(quantity), "r")
    (verdict,) = await quota.reserve(services.org_id, reservation_id, [[usage]])
    assert not verdict.violations
    return reservation_id, event


async def used(services: Services) -> str:
    request = quota_pb2.GetQuotaRequest(tenant_id="acme", event_type="req")
    current: str = (await services.quotas.GetQuota(request, metadata=services.metadata, timeout=10)).current
    return current


async def state(services: Services) -> str:
    request = reservation_pb2.GetReservationRequest(reservation_id="r")
    answer = await reservations(services).GetReservation(request, metadata=services.metadata, timeout=10)
    return reservation_pb2.ReservationState.Name(answer.state)


@pytest.mark.parametrize("quantity", [4, 9])
async def test_killed_between_claim_and_insert_the_reservation_is_held_again(
    services: Services, quota: QuotaClient, janitor: Janitor, pool: Pool, quantity: int
) -> None:
    """I4: until it is known the larger counts; a writer that was only slow rolls back."""
    await hold(services)
    reservation_id, event = await claim(services, quota, quantity)
    assert await used(services) == str(max(quantity, 6))
    assert await janitor.run_once() == 1
    assert (await used(services), await state(services)) == ("6", "HELD")
    with pytest.raises(ReservationGivenAway):
        await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])


@pytest.mark.parametrize("quantity", [4, 9])
async def test_killed_between_insert_and_settle_the_reservation_is_consumed(
    services: Services, quota: QuotaClient, janitor: Janitor, pool: Pool, quantity: int
) -> None:
    """I4: what is stored counts, although nobody said so to quota."""
    await hold(services)
    reservation_id, event = await claim(services, quota, quantity)
    await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])
    assert (await used(services), await state(services)) == (str(max(quantity, 6)), "HELD")
    assert await janitor.run_once() == 1
    assert (await used(services), await state(services)) == (str(quantity), "CONSUMED")


async def test_reconciliation_finds_nothing_wrong_with_a_reservation_at_any_stage(
    services: Services, quota: QuotaClient, janitor: Janitor, pool: Pool, clock: ManualClock
) -> None:
    """I4: counter = entries + unconsumed reservations, also of the hour from which the claim moved it."""
    await hold(services)
    await assert_nothing_differs(services)
    clock.advance(timedelta(minutes=5))
    reservation_id, event = await claim(services, quota, 4, at=NOW - timedelta(hours=1))
    await assert_nothing_differs(services)
    await EntryStore(pool, slot=0).record_events(services.org_id, reservation_id, [event])
    await assert_nothing_differs(services)
    await janitor.run_once()
    assert await state(services) == "CONSUMED"
    await assert_nothing_differs(services)


async def assert_nothing_differs(services: Services) -> None:
    stub: Any = reconciliation_pb2_grpc.ReconciliationServiceStub(services.ingest)
    request = reconciliation_pb2.ReconcileQuotasRequest(fix=False)
    answer = await stub.ReconcileQuotas(request, metadata=services.metadata, timeout=30)
    assert answer.compared and not answer.differences


async def test_a_reservation_that_expires_meanwhile_is_given_back_when_its_event_is_not_stored(
    services: Services, quota: QuotaClient, janitor: Janitor, clock: ManualClock
) -> None:
    """I4: not before, since the event may still be stored."""
    await hold(services, ttl_seconds=1)
    await claim(services, quota, 4)
    clock.advance(timedelta(seconds=2))
    await hold_of_another_is_expired(services, clock)
    assert (await used(services), await state(services)) == ("6", "HELD")
    await janitor.run_once()

    async def is_expired() -> bool:
        return await state(services) == "EXPIRED"

    await until(is_expired, "the reservation is given back")
    assert await used(services) == "0"


async def hold_of_another_is_expired(services: Services, clock: ManualClock) -> None:
    """The worker has run since."""
    request = reservation_pb2.ReserveQuotaRequest(
        tenant_id="other", event_type="req", quantity="1", reservation_id="other", ttl_seconds=1
    )
    await reservations(services).ReserveQuota(request, metadata=services.metadata, timeout=10)
    clock.advance(timedelta(seconds=2))

    async def is_expired() -> bool:
        wanted = reservation_pb2.GetReservationRequest(reservation_id="other")
        answer = await reservations(services).GetReservation(wanted, metadata=services.metadata, timeout=10)
        return bool(answer.state == reservation_pb2.EXPIRED)

    await until(is_expired, "the worker has run")


async def test_a_lost_answer_of_quota_leaves_the_reservation_to_the_next_attempt(
    services: Services, database: Database
) -> None:
    """I4: events that are sent again on their key until they are stored consume their reservations once."""
    names = [f"r{number}" for number in range(4)]

    async def client(name: str) -> None:
        await persist(
            lambda: reservations(services).ReserveQuota(
                reservation_pb2.ReserveQuotaRequest(
                    tenant_id=name, event_type="req", quantity="6", reservation_id=name
                ),
                metadata=services.metadata,
                timeout=10,
            )
        )
        await persist(
            lambda: services.events.RecordEvents(
                event_pb2.RecordEventsRequest(
                    tenant_id=name, event_type="req", quantity=4, idempotency_key=name, reservation_id=name
                ),
                metadata=services.metadata,
                timeout=10,
            )
        )

    async def cut() -> None:
        admin = await asyncpg.connect(database.server.url())
        for _ in range(10):
            await admin.execute(
                """
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = $1 AND usename IN ('usameter_quota', 'usameter_ingest')
                """,
                database.name,
            )
            await asyncio.sleep(0.05)
        await admin.close()

    await asyncio.gather(cut(), *[client(f"{name}.{turn}") for turn in range(5) for name in names])
    async with open_pool(database.role_url("ingest"), application_name="test") as pool:
        quota = QuotaClient(services.quota, internal_token=INTERNAL_TOKEN)
        await Janitor(quota=quota, outcomes=OutcomeStore(pool), min_age_seconds=0).run_once()
    admin = await asyncpg.connect(database.server.url(database.name))
    rows = await admin.fetch("SELECT tenant_id, quantity FROM quota.usage_hour WHERE tenant_id LIKE 'r%'")
    # An event is checked afresh where an earlier attempt still has its reservation: then that may be held yet.
    held = await admin.fetch("SELECT tenant_ids[1] AS tenant_id FROM quota.reservation WHERE state = 'OPEN'")
    await admin.close()
    still_held = {row["tenant_id"] for row in held}
    assert {row["tenant_id"]: row["quantity"] for row in rows} == {
        (tenant := f"{name}.{turn}"): 10 if tenant in still_held else 4 for turn in range(5) for name in names
    }


async def persist(call: Any) -> None:
    """Send it again until somebody answers it."""
    while True:
        try:
            await call()
        except Exception as error:
            assert "UNAVAILABLE" in str(error), error
            await asyncio.sleep(0.02)
        else:
            return
