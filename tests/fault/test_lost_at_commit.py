"""The connection to PostgreSQL is lost at the statement that commits: what became of it is looked up, not guessed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import asyncpg
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import INTERNAL_TOKEN, Services, open_replica, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter.quota.v1 import quota_pb2
from usameter_core.postgres.pool import open_pool
from usameter_devstack.fault_proxy import FaultMode, FaultProxy
from usameter_ingest.clients import QuotaClient
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.worker import Janitor

NOW = datetime.now(UTC)
LIMIT = 7


@dataclass(frozen=True, slots=True)
class Ingest:
    """An ingest whose own connections to PostgreSQL, and nobody else's, pass the proxy."""

    services: Services
    database: Database
    proxy: FaultProxy
    events: Any

    async def record(self, name: str, *, seconds: float = 30) -> Any:
        """Three events, with keys of that name, in one batch."""
        events = [
            {"event_type": "req", "tenant_id": "acme", "idempotency_key": f"{name}.{number}"} for number in range(3)
        ]
        request = event_pb2.RecordEventsRequest(events=events)
        return await self.events.RecordEvents(request, metadata=self.services.metadata, timeout=seconds)

    async def stored(self) -> int:
        """Events in the ledger; the rollups say the same (I2)."""
        count: int = await fetch_value(self.database, "SELECT count(*) FROM ingest.usage_event")
        assert count == await fetch_value(
            self.database, "SELECT coalesce(sum(event_count), 0)::int FROM ingest.usage_day"
        )
        return count

    async def used(self) -> int:
        request = quota_pb2.GetQuotaRequest(tenant_id="acme", event_type="req")
        answer = await self.services.quotas.GetQuota(request, metadata=self.services.metadata, timeout=10)
        return int(answer.current)

    async def is_settled(self) -> bool:
        """I4: nothing is held, and the counter equals what is stored."""
        still_open = await fetch_value(self.database, "SELECT count(*) FROM quota.reservation WHERE state = 'OPEN'")
        return still_open == 0 and await self.used() == await self.stored()

    async def run_janitor(self) -> None:
        async with open_pool(self.database.role_url("ingest"), application_name="test") as pool:
            quota = QuotaClient(self.services.quota, internal_token=INTERNAL_TOKEN)
            await Janitor(quota=quota, outcomes=OutcomeStore(pool), min_age_seconds=0).run_once()


@pytest.fixture
async def ingest(database: Database) -> AsyncIterator[Ingest]:
    clock = ManualClock(NOW)
    async with open_services(database, clock=clock) as services, FaultProxy("127.0.0.1", database.server.port) as proxy:
        limit = quota_pb2.SetQuotaRequest(
            tenant_id="acme",
            event_type="req",
            limit_value=str(LIMIT),
            enforcement_mode=quota_pb2.HARD,
            period=quota_pb2.MONTHLY,
        )
        await services.quotas.SetQuota(limit, metadata=services.metadata, timeout=10)
        proxied = replace(database, server=replace(database.server, port=proxy.port))
        async with open_replica(proxied, services, clock=clock) as channel:
            yield Ingest(services, database, proxy, event_pb2_grpc.EventServiceStub(channel))


async def refusal(ingest: Ingest, name: str) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ingest.record(name)
    return reason_of(caught.value)


async def test_a_commit_whose_answer_was_lost_is_found_and_answered(ingest: Ingest) -> None:
    """I1, I4: the caller learns of the commit although ingest was not told."""
    ingest.proxy.cut_at(b"lost.0", answered=True)
    answer = await ingest.record("lost")
    assert (answer.new_events, answer.duplicate_events) == (3, 0)
    await until(ingest.is_settled, "the reservation is settled as committed")
    assert await ingest.stored() == 3
    assert (await ingest.record("lost")).duplicate_events == 3


async def test_a_statement_that_never_arrived_is_refused_and_uses_up_nothing(ingest: Ingest) -> None:
    """I4: what was reserved for it is given back at once, without the janitor."""
    ingest.proxy.cut_at(b"lost.0", answered=False)
    assert await refusal(ingest, "lost") == "UNAVAILABLE"
    await until(ingest.is_settled, "the reservation is settled as aborted")
    assert await ingest.stored() == 0
    assert (await ingest.record("lost")).new_events == 3
    assert await ingest.stored() == 3


@pytest.mark.parametrize("committed", [False, True])
async def test_where_nobody_can_look_it_up_a_retry_is_exact(ingest: Ingest, committed: bool) -> None:
    """I1, I4: PostgreSQL stays away, so the caller is told to try again; the keys make that safe."""
    ingest.proxy.cut_at(b"lost.0", answered=committed, then=FaultMode.CUT)
    assert await refusal(ingest, "lost") == "UNAVAILABLE"
    assert await refusal(ingest, "lost") == "UNAVAILABLE"
    assert await ingest.stored() == (3 if committed else 0)
    # Held until somebody can look: rather too much than an event above the limit.
    assert await ingest.used() == 3

    await ingest.proxy.forward()
    answer = await ingest.record("lost")
    assert (answer.new_events, answer.duplicate_events) == ((0, 3) if committed else (3, 0))
    assert await ingest.stored() == 3
    await ingest.run_janitor()
    await until(ingest.is_settled, "the janitor has looked")
    assert (await ingest.record("more")).new_events == 3
    assert await refusal(ingest, "over") == "QUOTA_EXCEEDED"
    await until(ingest.is_settled, "nothing of a refused batch is held")
    assert await ingest.stored() == 6


async def test_where_postgres_is_silent_requests_end_by_their_deadline_and_are_not_recorded_afterwards(
    ingest: Ingest,
) -> None:
    assert (await ingest.record("known")).new_events == 3
    await ingest.proxy.swallow()
    began, cancelled = time.monotonic(), cancelled_calls()
    # Group after group: two are under way, and the others wait for them.
    waves = []
    for wave in range(5):
        waves += [asyncio.create_task(ingest.record(f"{wave}.{number}", seconds=2)) for number in range(10)]
        await asyncio.sleep(0.05)
    for ended in await asyncio.gather(*waves, return_exceptions=True):
        assert isinstance(ended, grpc.aio.AioRpcError)
        assert ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 4

    async def everybody_has_gone() -> bool:
        return cancelled_calls() - cancelled == len(waves)

    # The server learns of it a moment after its clients, and what begins in between may be recorded.
    await until(everybody_has_gone, "the server knows that nobody waits any more")
    await ingest.proxy.forward()
    assert (await ingest.record("after")).new_events == 3
    await until(ingest.is_settled, "nothing is held")
    assert await ingest.stored() == 6


async def test_a_statement_that_comes_late_finds_its_reservation_given_away(ingest: Ingest) -> None:
    """I4: everybody gave up on it while it waited for the ledger, so it must not commit any more."""
    assert (await ingest.record("first")).new_events == 3
    admin = await asyncpg.connect(ingest.database.admin_url)
    try:
        await admin.execute("SELECT pg_advisory_lock(ingest.ledger_lock_key($1))", ingest.services.org_id)
        late = asyncio.create_task(refusal(ingest, "late"))
        await until(partial(is_writing, admin), "the statement waits for the ledger")
        # A backend that waits for a lock does not notice that its client is gone.
        await ingest.proxy.cut()
        await ingest.proxy.forward()
        assert await late == "UNAVAILABLE"
        await ingest.run_janitor()
        await until(ingest.is_settled, "the reservation is given away")
        assert await is_writing(admin)
    finally:
        await admin.execute("SELECT pg_advisory_unlock_all()")
        await until(partial(is_not_writing, admin), "the statement has ended")
        await admin.close()
    assert await ingest.is_settled() and await ingest.stored() == 3
    assert (await ingest.record("late")).new_events == 3


def cancelled_calls() -> float:
    labels = {"method": "/usameter.ingest.v1.EventService/RecordEvents", "code": "CANCELLED"}
    return REGISTRY.get_sample_value("usameter_grpc_call_seconds_count", labels) or 0


async def is_writing(admin: asyncpg.Connection[Any]) -> bool:
    """Whether a backend is at the statement that stores a group."""
    writing: bool = await admin.fetchval(
        """SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
           AND usename = 'usameter_ingest' AND state = 'active' AND query LIKE '%ingest.record_events(%')"""
    )
    return writing


async def is_not_writing(admin: asyncpg.Connection[Any]) -> bool:
    return not await is_writing(admin)
