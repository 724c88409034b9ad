"""Events that are sent again while the cache of known events fails, empties or lags behind: the answers stay."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import UUID

import grpc.aio
import pytest
from redis.asyncio import Redis

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, details_of, open_replica, open_services, reason_of
from tests.support.sql import execute, fetch_rows, fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter.quota.v1 import quota_pb2
from usameter_core.ids import OrgId
from usameter_devstack.fault_proxy import FaultMode, FaultProxy
from usameter_devstack.valkey import EmbeddedValkey
from usameter_ingest.metrics import KNOWN_EVENTS
from usameter_proof.ledger_format import event_id_of_key


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock()) as running:
        yield running


@pytest.fixture
async def redis(database: Database) -> AsyncIterator[Redis]:
    async with Redis.from_url(database.redis_url) as client:
        yield client


@pytest.fixture
async def proxy(valkey: EmbeddedValkey) -> AsyncIterator[FaultProxy]:
    async with FaultProxy("127.0.0.1", valkey.port) as between:
        yield between


async def send(services: Services, *keys: str, stub: Any = None, quantity: float = 1.0) -> Any:
    events = [{"tenant_id": "acme", "event_type": "call", "idempotency_key": key, "quantity": quantity} for key in keys]
    request = event_pb2.RecordEventsRequest(events=events)
    return await (stub or services.events).RecordEvents(request, metadata=services.metadata, timeout=20)


async def void(services: Services, event_id: str) -> None:
    request = event_pb2.VoidEventRequest(event_id=event_id, reason="mistaken")
    await services.events.VoidEvent(request, metadata=services.metadata, timeout=20)


def from_cache() -> float:
    """How many events the cache has answered so far."""
    return float(KNOWN_EVENTS.labels("cache")._value.get())


async def answered_from_cache(services: Services, *keys: str) -> Any:
    """The answer to a resend of which the cache knew every event."""
    answer: Any = None

    async def known() -> bool:
        nonlocal answer
        before = from_cache()
        answer = await send(services, *keys)
        return from_cache() - before == len(keys)

    await until(known, f"the cache knows {keys}")
    return answer


async def cached_keys(redis: Redis, org_id: OrgId, keys: list[str]) -> set[str]:
    """Those of the idempotency keys whose events are in Redis."""
    found: set[UUID] = set()
    async for each in redis.scan_iter(f"usameter:known:{{{org_id}}}:*"):
        found |= {UUID(bytes=event_id) for event_id in await redis.hkeys(each)}
    return {key for key in keys if event_id_of_key(org_id, key) in found}


async def empty(redis: Redis, org_id: OrgId) -> None:
    async for key in redis.scan_iter(f"usameter:known:{{{org_id}}}:*"):
        await redis.delete(key)


async def test_a_duplicate_from_the_cache_is_answered_as_one_from_postgresql_and_takes_no_quota(
    services: Services, database: Database
) -> None:
    """I4: also when the quota is full."""
    request = quota_pb2.SetQuotaRequest(
        tenant_id="acme",
        event_type="call",
        limit_value="3",
        enforcement_mode=quota_pb2.HARD,
        period=quota_pb2.MONTHLY,
    )
    await services.quotas.SetQuota(request, metadata=services.metadata, timeout=20)
    first = await send(services, "a", "b", "c")
    again = await send(services, "a", "b", "c")
    reservations = await fetch_value(database, "SELECT count(*) FROM quota.reservation")
    assert await answered_from_cache(services, "a", "b", "c") == again
    assert [result.event_id for result in again.results] == [result.event_id for result in first.results]
    assert (again.new_events, again.duplicate_events) == (0, 3)
    # Known and new together are refused for the new one; the known are not answered with it.
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(services, "a", "new")
    assert reason_of(caught.value) == "QUOTA_EXCEEDED"
    (violation,) = details_of(caught.value, error_pb2.QuotaExceededDetails()).violations
    assert (violation.current, violation.requested) == (3, 1)
    assert await fetch_value(database, "SELECT count(*) FROM quota.reservation") <= reservations + 1
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 3


async def test_a_conflict_with_a_cached_event_is_the_same_error(services: Services, database: Database) -> None:
    await send(services, "k")

    async def conflict() -> tuple[str | None, Any]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(services, "new", "k", quantity=2.0)
        assert reason_of(caught.value) == "IDEMPOTENCY_CONFLICT"
        return caught.value.details(), details_of(caught.value, error_pb2.ConflictDetails())

    from_postgresql = await conflict()
    await answered_from_cache(services, "k")
    for _ in range(20):
        before = from_cache()
        assert await conflict() == from_postgresql
        if from_cache() > before:
            break
        await answered_from_cache(services, "k")
    else:
        pytest.fail("the cache was never asked")
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 1


@pytest.mark.parametrize("failing", ["refused", "terminated"])
async def test_what_was_not_committed_is_not_cached(
    services: Services, database: Database, redis: Redis, failing: str
) -> None:
    """I1: else its retry would be answered as a duplicate of nothing."""
    keys = ["known", "failed", "later"]
    await send(services, "known")
    await send(services, "known")
    if failing == "refused":
        await execute(database, "REVOKE INSERT ON ingest.usage_event FROM usameter_ingest")
        with pytest.raises(grpc.aio.AioRpcError):
            await send(services, "failed")
        await execute(database, "GRANT INSERT ON ingest.usage_event TO usameter_ingest")
    else:
        await fail_by_termination(services, database, "failed")
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 1
    await send(services, "later")

    async def later_is_cached() -> bool:
        return "later" in await cached_keys(redis, services.org_id, keys)

    await until(later_is_cached, "what was recorded after it is cached")
    assert await cached_keys(redis, services.org_id, keys) == {"known", "later"}
    answer = await send(services, "failed")
    assert (answer.new_events, answer.duplicate_events) == (1, 0)


async def fail_by_termination(services: Services, database: Database, key: str) -> None:
    """Have the connection end after the event was written and before its transaction commits."""
    await execute(
        database,
        """
        CREATE FUNCTION public.end_connection() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
        $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER end_connection AFTER INSERT ON ingest.usage_event
        DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION public.end_connection()
        """,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send(services, key)
    assert reason_of(caught.value) == "UNAVAILABLE"
    await execute(database, "DROP TRIGGER end_connection ON ingest.usage_event")


async def test_whoever_sends_a_voided_event_after_the_voids_answer_is_told_so(
    services: Services, database: Database
) -> None:
    """Two replicas are asked all the time, so that both trust the cache when the void is committed."""
    source = random.Random(20260310)
    # Of many keys few are looked up again before they are asked of the cache.
    keys = [f"k{number}" for number in range(20)]
    first = await send(services, *keys)
    ids = dict(zip(keys, (result.event_id for result in first.results), strict=True))
    voided: set[str] = set()
    asking = True

    async def ask(stub: Any) -> None:
        while asking:
            sent = source.sample(keys, 2)
            before = set(voided)
            answer = await send(services, *sent, stub=stub)
            assert answer.duplicate_events == 2
            told = {key for key, result in zip(sent, answer.results, strict=True) if result.voided}
            assert told >= before & set(sent)

    async with open_replica(database, services, clock=ManualClock()) as channel:
        cached = from_cache()
        async with asyncio.TaskGroup() as asked:
            for stub in (services.events, event_pb2_grpc.EventServiceStub(channel)):
                asked.create_task(ask(stub))
            for key in keys[:3]:
                await asyncio.sleep(source.uniform(0.1, 0.7))
                await void(services, ids[key])
                voided.add(key)
            await asyncio.sleep(0.3)
            asking = False
    assert from_cache() > cached, "the cache was asked"
    answer = await answered_from_cache(services, *keys)
    assert [result.voided for result in answer.results] == [True] * 3 + [False] * 17


@pytest.mark.parametrize("mode", [FaultMode.CUT, FaultMode.SWALLOW])
async def test_known_events_are_answered_without_redis(database: Database, proxy: FaultProxy, mode: FaultMode) -> None:
    """I1: nothing is stored twice, and nobody waits longer than the breaker lets them."""
    url = f"redis://127.0.0.1:{proxy.port}/0"
    async with open_services(replace(database, redis_url=url), clock=ManualClock()) as services:
        keys = [f"k{number}" for number in range(50)]
        first = await send(services, *keys)
        again = await answered_from_cache(services, *keys)
        await (proxy.cut() if mode is FaultMode.CUT else proxy.swallow())
        began = time.monotonic()
        for number in range(20):
            assert await send(services, *keys) == again
            assert (await send(services, f"new{number}", keys[0])).new_events == 1
        assert time.monotonic() - began < 15
        assert [result.event_id for result in again.results] == [result.event_id for result in first.results]
        await proxy.forward()
        assert await answered_from_cache(services, *keys) == again
        assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 70


async def test_random_requests_have_the_same_answers_with_without_and_with_a_leaking_cache(
    services: Services, database: Database, redis: Redis, proxy: FaultProxy
) -> None:
    """I1: each history is played to three organizations; only where an answer comes from may differ."""
    source = random.Random(20260311)
    keys = [f"k{number}" for number in range(8)]
    steps = [
        (source.choices(["send", "conflict", "void"], [12, 3, 1])[0], source.sample(keys, source.randint(1, 4)))
        for _ in range(120)
    ]
    healthy = await played(services, steps)
    cached = from_cache()
    assert cached > 0, "the cache was asked"
    async with open_services(database, clock=ManualClock(), organization="leaking") as leaking:
        assert await played(leaking, steps, partial(leak, redis, leaking.org_id, source)) == healthy
    await proxy.cut()
    without = replace(database, redis_url=f"redis://127.0.0.1:{proxy.port}/0")
    async with open_services(without, clock=ManualClock(), organization="without") as cacheless:
        cached = from_cache()
        assert await played(cacheless, steps) == healthy
        assert from_cache() == cached
    counts = await fetch_rows(database, "SELECT count(*) AS events FROM ingest.usage_event GROUP BY org_id")
    assert len(counts) == 3 and len({row["events"] for row in counts}) == 1


async def leak(redis: Redis, org_id: OrgId, source: random.Random) -> None:
    """Lose some entries, and now and then all."""
    async for key in redis.scan_iter(f"usameter:known:{{{org_id}}}:*"):
        for event_id in await redis.hkeys(key):
            if source.random() < 0.3:
                await redis.hdel(key, event_id)
    if source.random() < 0.1:
        await empty(redis, org_id)


async def played(services: Services, steps: list[tuple[str, list[str]]], between: Any = None) -> list[Any]:
    """The answers to a history, without what differs between organizations."""
    answers: list[Any] = []
    ids: dict[str, str] = {}
    for action, keys in steps:
        if between is not None:
            await between()
        try:
            if action == "void":
                if keys[0] in ids:
                    await void(services, ids[keys[0]])
                answers.append("voided")
                continue
            answer = await send(services, *keys, quantity=2.0 if action == "conflict" else 1.0)
        except grpc.aio.AioRpcError as error:
            answers.append(reason_of(error))
            continue
        ids |= dict(zip(keys, (result.event_id for result in answer.results), strict=True))
        answers.append([(result.deduplicated, result.voided) for result in answer.results])
    return answers
