"""When something behind ingest fails: what was not stored uses up nothing, and one's trouble is not another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, new_organization, open_replica, open_services, reason_of
from tests.support.sql import execute, fetch_value
from usameter.ingest.v1 import event_pb2, event_pb2_grpc, snapshot_pb2, usage_pb2
from usameter.quota.v1 import quota_pb2

NOW = datetime(2026, 3, 10, 12, tzinfo=UTC)


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock(NOW)) as running:
        yield running


async def record(stub: Any, services: Services, key: str, *, tenant: str = "acme", metadata: Any = None) -> Any:
    request = event_pb2.RecordEventsRequest(event_type="req", tenant_id=tenant, idempotency_key=key)
    return await stub.RecordEvents(request, metadata=metadata or services.metadata, timeout=10)


async def limit(services: Services, value: str, *, tenant: str = "acme") -> None:
    request = quota_pb2.SetQuotaRequest(
        tenant_id=tenant,
        event_type="req",
        limit_value=value,
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await services.quotas.SetQuota(request, metadata=services.metadata, timeout=10)


async def test_a_failure_after_reserve_uses_up_no_quota(services: Services, database: Database) -> None:
    """I4: the retry of a request that failed is not refused because of its own first try."""
    await limit(services, "1")
    await execute(database, "REVOKE INSERT ON identity.tenant FROM usameter_identity")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services.events, services, "k")
    assert reason_of(caught.value) == "INTERNAL"
    await execute(database, "GRANT INSERT ON identity.tenant TO usameter_identity")
    # Settling follows the answer by milliseconds.
    async with asyncio.timeout(5):
        while True:
            try:
                assert not (await record(services.events, services, "k")).deduplicated
                return
            except grpc.aio.AioRpcError as error:
                assert reason_of(error) == "QUOTA_EXCEEDED"


async def test_a_settlement_that_fails_does_not_end_the_service(services: Services, database: Database) -> None:
    await execute(database, "REVOKE UPDATE ON quota.reservation FROM usameter_quota")
    for number in range(3):
        await record(services.events, services, f"k{number}")
        await asyncio.sleep(0.05)
    await execute(database, "GRANT UPDATE ON quota.reservation TO usameter_quota")
    await record(services.events, services, "last")
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 4


async def test_many_new_tenants_at_once_are_all_provisioned(services: Services, database: Database) -> None:
    async def batch(number: int) -> Any:
        events = [{"event_type": "req", "tenant_id": f"{number}.{i}"} for i in range(999)]
        request = event_pb2.RecordEventsRequest(events=events)
        return await services.events.RecordEvents(request, metadata=services.metadata, timeout=60)

    answers = await asyncio.gather(*(batch(number) for number in range(7)))
    assert sum(answer.new_events for answer in answers) == 7 * 999
    assert await fetch_value(database, "SELECT count(*) FROM identity.tenant") == 7 * 999


async def test_the_same_key_at_two_replicas_is_one_event_also_when_it_fills_the_quota(
    services: Services, database: Database
) -> None:
    """A twin that is refused while the first is still being committed is a duplicate when it comes again."""

    async def record_until_admitted(stub: Any, key: str, tenant: str) -> Any:
        async with asyncio.timeout(10):
            while True:
                try:
                    return await record(stub, services, key, tenant=tenant)
                except grpc.aio.AioRpcError as error:
                    assert reason_of(error) == "QUOTA_EXCEEDED"

    async with open_replica(database, services, clock=ManualClock(NOW)) as channel:
        stubs = (services.events, event_pb2_grpc.EventServiceStub(channel))
        for number in range(15):
            key, tenant = f"k{number}", f"tenant{number}"
            await limit(services, "1", tenant=tenant)
            answers = await asyncio.gather(
                *(record_until_admitted(stub, key, tenant) for stub in stubs for _ in range(3))
            )
            assert sorted(answer.deduplicated for answer in answers) == [False] + [True] * 5
            assert len({answer.event_id for answer in answers}) == 1
            with pytest.raises(grpc.aio.AioRpcError):
                await record(stubs[1], services, f"other{number}", tenant=tenant)
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 15


async def test_one_organizations_broken_ledger_stops_no_other(services: Services, database: Database) -> None:
    other_org, other_key = await new_organization(database, "other")
    await record(services.events, services, "k")
    await record(services.events, services, "k", metadata=(("authorization", f"Bearer {other_key}"),))
    for broken, sound in ((services.org_id, other_org), (other_org, services.org_id)):
        await execute(database, "UPDATE ingest.usage_day SET event_count = 5 WHERE org_id = $1", broken)
        request = snapshot_pb2.SealEpochsRequest()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)
        assert reason_of(caught.value) == "INTERNAL"
        state = "SELECT state FROM ingest.epoch WHERE org_id = $1 AND epoch = 1"
        assert await fetch_value(database, state, sound) == "SEALED"
        if broken == other_org:
            continue
        assert await fetch_value(database, state, broken) == "CLOSED"
        await execute(database, "UPDATE ingest.usage_day SET event_count = 1 WHERE org_id = $1", broken)
        await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)
        for key in ("k2",):
            await record(services.events, services, key)
            await record(services.events, services, key, metadata=(("authorization", f"Bearer {other_key}"),))


async def test_a_seal_for_an_earlier_day_waits_for_no_writer(services: Services, database: Database) -> None:
    """Nothing of that day is there to seal, so the ledger's lock is not even asked for."""
    await record(services.events, services, "k")
    request = snapshot_pb2.SealEpochsRequest(date="2020-01-01")
    answer = await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=10)
    assert not answer.sealed


async def test_the_ends_of_time_are_no_fault_of_ours(services: Services) -> None:
    await record(services.events, services, "k")
    for start, end in (
        (datetime(9999, 12, 31, 23, 30, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, tzinfo=UTC)),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(1, 1, 1, 0, 30, tzinfo=UTC)),
        (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, tzinfo=UTC)),
    ):
        request = usage_pb2.GetUsageRequest(start_date=start, end_date=end)
        await services.usage.GetUsage(request, metadata=services.metadata, timeout=10)
    beyond = Timestamp(seconds=10**12)
    for call, message in (
        (services.usage.GetUsage, usage_pb2.GetUsageRequest(start_date=beyond)),
        (services.events.ListEvents, event_pb2.ListEventsRequest(end_date=beyond)),
        (
            services.events.RecordEvents,
            event_pb2.RecordEventsRequest(event_type="e", tenant_id="t", timestamp=beyond),
        ),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(message, metadata=services.metadata, timeout=10)
        assert reason_of(caught.value) == "INVALID_ARGUMENT"
    request = snapshot_pb2.SealEpochsRequest(date="9999-12-31")
    answer = await services.snapshots.SealEpochs(request, metadata=services.cron_metadata, timeout=20)
    assert len(answer.sealed) == 1
