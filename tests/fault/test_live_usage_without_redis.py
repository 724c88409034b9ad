"""Redis gone or hanging: recording goes on as if nothing were, and live usage says that it is degraded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, open_services
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, usage_pb2
from usameter_core.ids import OrgId, new_uuid
from usameter_core.redis.client import open_redis
from usameter_devstack.fault_proxy import FaultMode, FaultProxy
from usameter_devstack.valkey import EmbeddedValkey
from usameter_ingest.counters.live import LiveCounters
from usameter_ingest.metrics import LIVE_EVENTS_DROPPED

# A Redis that hangs would hold a request for ever: the client itself sets no time limit. The breaker gives it 50 ms a
# few times; the rest of this is for machines that do something else as well.
PATIENCE_SECONDS = 3


@pytest.fixture
async def proxy(valkey: EmbeddedValkey) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", valkey.port) as between:
        yield between


def url(proxy: FaultProxy) -> str:
    return f"redis://127.0.0.1:{proxy.port}/0"


@pytest.fixture
async def services(database: Database, proxy: FaultProxy) -> AsyncIterator[Services]:
    async with open_services(replace(database, redis_url=url(proxy)), clock=ManualClock()) as running:
        yield running


async def fail_in(proxy: FaultProxy, mode: FaultMode) -> None:
    await (proxy.cut() if mode is FaultMode.CUT else proxy.swallow())


async def record(services: Services) -> float:
    """Record one event; returns the seconds it took."""
    began = time.monotonic()
    request = event_pb2.RecordEventsRequest(tenant_id="acme", event_type="call", idempotency_key=new_uuid().hex)
    answer = await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    assert answer.success and not answer.deduplicated
    return time.monotonic() - began


async def live(services: Services) -> Any:
    request = usage_pb2.GetLiveUsageRequest()
    return await services.usage.GetLiveUsage(request, metadata=services.metadata, timeout=10)


async def shown(services: Services, events: int) -> bool:
    answer = await live(services)
    return not answer.degraded and sum(minute.event_count for minute in answer.minutes) == events


async def all_written(counters: LiveCounters) -> bool:
    return await counters.flush() == 0


@pytest.mark.parametrize("mode", [FaultMode.CUT, FaultMode.SWALLOW])
async def test_recording_does_without_redis_and_live_usage_recovers_by_itself(
    services: Services, database: Database, proxy: FaultProxy, mode: FaultMode
) -> None:
    """I1: every acknowledged event is stored; and each is counted once in live usage when Redis is back."""
    await record(services)
    # So many at once take what they take on a busy machine, with Redis and without.
    usual = max(await asyncio.gather(*(record(services) for _ in range(50))))
    await until(partial(shown, services, 51), "the first events are shown")
    await fail_in(proxy, mode)
    latencies = [await record(services) for _ in range(50)]
    assert max(await asyncio.gather(*(record(services) for _ in range(50)))) < usual + PATIENCE_SECONDS
    began = time.monotonic()
    answer = await live(services)
    assert time.monotonic() - began < PATIENCE_SECONDS
    assert answer.degraded and not answer.minutes and not answer.busiest_tenants
    latencies += [await record(services) for _ in range(10)]
    assert max(latencies) < PATIENCE_SECONDS
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 161

    await proxy.forward()
    await until(partial(shown, services, 161), "every event is shown, and none twice")


@pytest.mark.parametrize("mode", [FaultMode.CUT, FaultMode.SWALLOW])
async def test_ingest_starts_and_stops_without_redis(database: Database, proxy: FaultProxy, mode: FaultMode) -> None:
    await fail_in(proxy, mode)
    async with open_services(replace(database, redis_url=url(proxy)), clock=ManualClock()) as services:
        assert await record(services) < PATIENCE_SECONDS
        assert (await live(services)).degraded
        began = time.monotonic()
    assert time.monotonic() - began < 2 * PATIENCE_SECONDS


async def test_a_batch_whose_answer_came_too_late_counts_once(proxy: FaultProxy, valkey: EmbeddedValkey) -> None:
    org_id, clock = OrgId(new_uuid()), ManualClock()
    async with open_redis(url(proxy)) as (redis, breaker), open_redis(valkey.url()) as (direct, direct_breaker):
        counters = LiveCounters(redis, breaker, clock=clock)
        observer = LiveCounters(direct, direct_breaker, clock=clock)

        async def counted(events: int) -> bool:
            usage = await observer.read(org_id)
            return usage is not None and usage.busiest_tenants == [("acme", events)]

        counters.add(org_id, {"acme": 1})
        await until(partial(all_written, counters), "the script is known and the connection open")
        await until(partial(counted, 1), "the first event is counted")
        # Longer than the breaker waits: the command arrives when nobody waits for its answer any more.
        await proxy.delay(0.2)
        counters.add(org_id, {"acme": 2})
        assert await counters.flush() == 1, "whether it was written is not known"
        await until(partial(counted, 3), "the late command is carried out")
        await proxy.forward()
        counters.add(org_id, {"acme": 4})
        # The first flush that gets through repeats the late batch, the next writes what came after it.
        await until(partial(all_written, counters), "everything is written")
        await until(partial(counted, 7), "each event is counted once")


async def test_counts_wait_an_hour_for_redis_and_never_fill_the_memory(proxy: FaultProxy) -> None:
    org_id, clock = OrgId(new_uuid()), ManualClock()
    await proxy.cut()
    async with open_redis(url(proxy)) as (redis, breaker):
        counters = LiveCounters(redis, breaker, clock=clock)
        dropped = LIVE_EVENTS_DROPPED._value.get()
        counters.add(org_id, dict.fromkeys((f"t{number}" for number in range(99_999)), 2))
        counters.add(org_id, {"last": 1})
        assert LIVE_EVENTS_DROPPED._value.get() == dropped
        counters.add(org_id, {"t1": 5, "t2": 6})
        assert LIVE_EVENTS_DROPPED._value.get() == dropped + 11
        clock.advance(timedelta(minutes=59))
        await counters.flush()
        assert LIVE_EVENTS_DROPPED._value.get() == dropped + 11
        clock.advance(timedelta(minutes=1))
        await counters.flush()
        assert LIVE_EVENTS_DROPPED._value.get() == dropped + 11 + 199_999
        counters.add(org_id, {"acme": 1})
        await proxy.forward()

        async def newest_is_shown() -> bool:
            await counters.flush()
            usage = await counters.read(org_id)
            return usage is not None and usage.busiest_tenants == [("acme", 1)]

        await until(newest_is_shown, "what came after the hour is counted")
