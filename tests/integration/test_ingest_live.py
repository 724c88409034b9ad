"""Live usage: what was recorded in the last hour, counted in a real Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, new_organization, open_replica, open_services
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, event_pb2_grpc, usage_pb2
from usameter_core.ids import OrgId, new_uuid
from usameter_core.redis.client import open_redis
from usameter_devstack.ports import free_port
from usameter_devstack.valkey import EmbeddedValkey
from usameter_ingest.counters.live import LiveCounters, LiveUsage

NOW = datetime(2026, 3, 1, 0, 30, 59, 999_999, tzinfo=UTC)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
async def services(database: Database, clock: ManualClock) -> AsyncIterator[Services]:
    async with open_services(database, clock=clock) as running:
        yield running


@pytest.fixture
async def counters(database: Database, clock: ManualClock) -> AsyncIterator[LiveCounters]:
    async with open_redis(database.redis_url) as (redis, breaker):
        yield LiveCounters(redis, breaker, clock=clock)


def batch(*tenants: str) -> Any:
    events = [{"tenant_id": tenant, "event_type": "call", "idempotency_key": new_uuid().hex} for tenant in tenants]
    return event_pb2.RecordEventsRequest(events=events)


async def live(services: Services, metadata: Any = None) -> Any:
    """The answer; on a busy machine Redis may be too slow for the breaker once or twice."""
    answer: Any = None

    async def readable() -> bool:
        nonlocal answer
        request = usage_pb2.GetLiveUsageRequest()
        answer = await services.usage.GetLiveUsage(request, metadata=metadata or services.metadata, timeout=10)
        return not answer.degraded

    await until(readable, "live usage can be read")
    return answer


async def write(counters: LiveCounters) -> None:
    async def all_written() -> bool:
        return await counters.flush() == 0

    await until(all_written, "all counts are in Redis")


async def read(counters: LiveCounters, org_id: OrgId) -> LiveUsage:
    usage: list[LiveUsage] = []

    async def readable() -> bool:
        usage.extend(filter(None, [await counters.read(org_id)]))
        return bool(usage)

    await until(readable, "the counters can be read")
    return usage[0]


async def busiest_are(services: Services, expected: dict[str, int]) -> None:
    async def hold() -> bool:
        answer = await live(services)
        return {tenant.tenant_id: tenant.event_count for tenant in answer.busiest_tenants} == expected

    await until(hold, f"the busiest tenants are {expected}")


async def test_recorded_events_show_in_their_minute_and_under_their_tenant(services: Services) -> None:
    await services.events.RecordEvents(batch("acme", "acme", "größe ü"), metadata=services.metadata, timeout=10)
    await busiest_are(services, {"acme": 2, "größe ü": 1})
    answer = await live(services)
    assert [tenant.tenant_id for tenant in answer.busiest_tenants] == ["acme", "größe ü"]
    starts = [minute.minute.ToDatetime(UTC) for minute in answer.minutes]
    last = datetime(2026, 3, 1, 0, 30, tzinfo=UTC)
    assert starts == [last - timedelta(minutes=back) for back in range(59, -1, -1)]
    assert [minute.event_count for minute in answer.minutes] == [0] * 59 + [3]


async def test_a_fresh_organization_has_sixty_quiet_minutes(services: Services) -> None:
    answer = await live(services)
    assert [minute.event_count for minute in answer.minutes] == [0] * 60
    assert not answer.busiest_tenants


async def test_duplicates_and_refused_batches_are_not_counted(services: Services) -> None:
    request = batch("acme")
    for _ in range(3):
        await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    conflict = batch("acme", "acme")
    conflict.events[1].CopyFrom(request.events[0])
    conflict.events[1].quantity = 7
    with pytest.raises(grpc.aio.AioRpcError):
        await services.events.RecordEvents(conflict, metadata=services.metadata, timeout=10)
    await services.events.RecordEvents(batch("last"), metadata=services.metadata, timeout=10)
    await busiest_are(services, {"acme": 1, "last": 1})


async def test_an_organization_sees_nothing_of_another(services: Services, database: Database) -> None:
    _, other_key = await new_organization(database, "other")
    await services.events.RecordEvents(batch("acme"), metadata=services.metadata, timeout=10)
    await busiest_are(services, {"acme": 1})
    answer = await live(services, (("authorization", f"Bearer {other_key}"),))
    assert not answer.busiest_tenants and not any(minute.event_count for minute in answer.minutes)


async def test_replicas_add_up(services: Services, database: Database, clock: ManualClock) -> None:
    async with open_replica(database, services, clock=clock) as channel:
        replica = event_pb2_grpc.EventServiceStub(channel)
        await replica.RecordEvents(batch("acme"), metadata=services.metadata, timeout=10)
        await services.events.RecordEvents(batch("acme", "b"), metadata=services.metadata, timeout=10)
        await busiest_are(services, {"acme": 2, "b": 1})


async def test_counts_that_wait_are_written_when_the_service_stops(database: Database, clock: ManualClock) -> None:
    async with open_services(database, clock=clock) as services:
        await services.events.RecordEvents(batch("acme"), metadata=services.metadata, timeout=10)
        await busiest_are(services, {"acme": 1})
        await services.events.RecordEvents(batch("acme"), metadata=services.metadata, timeout=10)
    async with open_redis(database.redis_url) as (redis, breaker):
        usage = await read(LiveCounters(redis, breaker, clock=clock), services.org_id)
    assert usage.busiest_tenants == [("acme", 2)]


async def test_a_minute_is_shown_for_sixty_minutes_and_no_longer(counters: LiveCounters, clock: ManualClock) -> None:
    org_id = OrgId(new_uuid())
    counters.add(org_id, {"acme": 5})
    await write(counters)
    clock.advance(timedelta(minutes=59))
    counters.add(org_id, {"acme": 2})
    await write(counters)
    usage = await read(counters, org_id)
    assert usage.busiest_tenants == [("acme", 7)]
    assert [events for _, events in usage.minutes] == [5, *[0] * 58, 2]
    clock.advance(timedelta(microseconds=1))
    usage = await read(counters, org_id)
    assert usage.busiest_tenants == [("acme", 2)]
    assert [events for _, events in usage.minutes] == [*[0] * 58, 2, 0]


async def test_ten_busiest_tenants_are_shown_and_a_thousand_a_minute_are_kept(counters: LiveCounters) -> None:
    org_id = OrgId(new_uuid())
    counters.add(org_id, {f"t{number}": number for number in range(1, 1_501)})
    await write(counters)
    counters.add(org_id, {"t1500": 1, "t1499": 10_000_000, "new": 1})
    await write(counters)
    usage = await read(counters, org_id)
    assert usage.busiest_tenants == [
        ("t1499", 10_001_499),
        ("t1500", 1_501),
        *((f"t{number}", number) for number in range(1_498, 1_490, -1)),
    ]
    assert usage.minutes[-1][1] == 1_500 * 1_501 // 2 + 10_000_002, "the minute counts every tenant"


async def test_keys_of_an_organization_share_a_slot_of_a_cluster_and_expire(
    tmp_path_factory: pytest.TempPathFactory, clock: ManualClock
) -> None:
    org_id = OrgId(new_uuid())
    server = EmbeddedValkey(tmp_path_factory.mktemp("cluster"), free_port(), {"cluster-enabled": "yes"})
    async with server, open_redis(server.url()) as (redis, breaker):
        await redis.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
        counters = LiveCounters(redis, breaker, clock=clock)
        counters.add(org_id, {"acme": 1})
        await write(counters)
        usage = await read(counters, org_id)
        assert usage.busiest_tenants == [("acme", 1)]
        for key in await redis.keys("*"):
            assert 7_000 < await redis.ttl(key) <= 7_200


async def test_a_redis_that_has_forgotten_the_scripts_is_taught_them_again(
    counters: LiveCounters, database: Database
) -> None:
    org_id = OrgId(new_uuid())
    counters.add(org_id, {"acme": 1})
    async with open_redis(database.redis_url) as (redis, _):
        await redis.script_flush()
        await write(counters)
        await redis.script_flush()
    usage = await read(counters, org_id)
    assert usage.busiest_tenants == [("acme", 1)]
