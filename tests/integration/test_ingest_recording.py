"""Recording over gRPC: exactly once, all or nothing, inside quota."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, details_of, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import quota_pb2
from usameter_core.ids import OrgId


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock()) as running:
        yield running


def event(key: str | None = None, **fields: Any) -> dict[str, Any]:
    given = {"event_type": "api_request", "tenant_id": "acme", **fields}
    return given if key is None else {**given, "idempotency_key": key}


async def record(services: Services, *events: dict[str, Any]) -> Any:
    request = event_pb2.RecordEventsRequest(events=list(events))
    return await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)


async def record_one(services: Services, **fields: Any) -> Any:
    request = event_pb2.RecordEventsRequest(**fields)
    return await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)


async def stored(database: Database, query: str = "SELECT count(*) FROM ingest.usage_event") -> Any:
    return await fetch_value(database, query)


async def limit(services: Services, value: str, mode: int = quota_pb2.HARD) -> None:
    request = quota_pb2.SetQuotaRequest(
        tenant_id="acme", event_type="api_request", limit_value=value, enforcement_mode=mode, period=quota_pb2.MONTHLY
    )
    await services.quotas.SetQuota(request, metadata=services.metadata, timeout=10)


async def test_a_single_event_is_answered_flat(services: Services) -> None:
    answer = await record_one(services, **event("k"))
    assert answer.success and not answer.deduplicated
    assert answer.event_id.startswith("evt_") and not answer.HasField("count") and not answer.results


async def test_the_same_event_again_is_a_duplicate_with_the_first_id(services: Services, database: Database) -> None:
    first = await record_one(services, **event("k", quantity=2))
    again = await record_one(services, **event("k", quantity_decimal="2.0"))
    assert again.event_id == first.event_id and again.deduplicated
    assert await stored(database) == 1


async def test_same_key_with_other_content_is_a_conflict_and_stores_nothing(
    services: Services, database: Database
) -> None:
    first = await record_one(services, **event("k"))
    for other in ({"tenant_id": "b"}, {"event_type": "x"}, {"quantity": 2.0}, {"metadata": {"a": 1}}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await record(services, event("new"), event("k", **other))
        assert reason_of(caught.value) == "IDEMPOTENCY_CONFLICT"
        details = details_of(caught.value, error_pb2.ConflictDetails())
        assert (details.field, details.event_id) == ("events[1]", first.event_id)
    assert await stored(database) == 1


async def test_without_a_key_a_retry_is_a_new_event(services: Services, database: Database) -> None:
    first = await record_one(services, **event())
    second = await record_one(services, **event())
    assert first.event_id != second.event_id
    assert await stored(database) == 2


async def test_a_key_twice_in_one_batch_is_one_event(services: Services, database: Database) -> None:
    answer = await record(services, event("a"), event("b"), event("a"))
    assert (answer.count, answer.new_events, answer.duplicate_events) == (3, 2, 1)
    assert [result.deduplicated for result in answer.results] == [False, False, True]
    assert answer.results[0].event_id == answer.results[2].event_id
    assert await stored(database) == 2


async def test_a_key_twice_in_one_batch_with_other_content_is_a_conflict(
    services: Services, database: Database
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("a"), event("a", quantity=2.0))
    assert reason_of(caught.value) == "IDEMPOTENCY_CONFLICT"
    assert await stored(database) == 0


async def test_64_clients_with_one_key_make_one_event(services: Services, database: Database) -> None:
    answers = await asyncio.gather(*(record_one(services, **event("k")) for _ in range(64)))
    assert len({answer.event_id for answer in answers}) == 1
    assert sorted(answer.deduplicated for answer in answers) == [False] + [True] * 63
    assert await stored(database) == 1


async def test_overlapping_batches_at_once_store_each_event_once(services: Services, database: Database) -> None:
    batches = [[event(f"k{(start + step) % 60}") for step in range(40)] for start in range(0, 60, 3)]
    answers = await asyncio.gather(*(record(services, *batch) for batch in batches))
    assert sum(answer.new_events for answer in answers) == 60
    assert await stored(database) == 60
    assert await stored(database, "SELECT sum(event_count)::bigint FROM ingest.usage_day") == 60


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"quantity": 1e-7}, "quantity", "6 decimals"),
        ({"quantity": 0.0}, "quantity", "greater than 0"),
        ({"quantity": 1e30}, "quantity", "less than"),
        ({"quantity": float("nan")}, "quantity", ""),
        ({"quantity_decimal": "1e3"}, "quantity_decimal", ""),
        ({"quantity_decimal": "0.0000001"}, "quantity_decimal", ""),
        ({"quantity_decimal": "0"}, "quantity_decimal", "greater than 0"),
        ({"quantity": 1.0, "quantity_decimal": "1"}, "quantity", "beside"),
        ({"event_type": "a b"}, "event_type", ""),
        ({"event_type": ""}, "event_type", ""),
        ({"tenant_id": ""}, "tenant_id", ""),
        ({"tenant_id": "a\x00b"}, "tenant_id", ""),
        ({"tenant_id": "x" * 101}, "tenant_id", ""),
        ({"idempotency_key": ""}, "idempotency_key", ""),
        ({"idempotency_key": "k" * 256}, "idempotency_key", ""),
        ({"metadata": {"a": "\x00"}}, "metadata", "NUL"),
        ({"metadata": {"a": "x" * 20_000}}, "metadata", "bytes"),
    ],
)
async def test_bad_fields_are_named_and_nothing_is_stored(
    services: Services, database: Database, fields: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("good"), event(**fields))
    assert reason_of(caught.value) == "INVALID_ARGUMENT"
    violations = details_of(caught.value, error_pb2.ViolationDetails()).violations
    assert [violation.field for violation in violations] == [f"events[1].{field}"]
    assert sentence in violations[0].description
    assert await stored(database) == 0


async def test_a_batch_has_at_most_1000_events(services: Services) -> None:
    assert (await record(services, *[event(f"k{i}") for i in range(1_000)])).new_events == 1_000
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, *[event(f"k{i}") for i in range(1_001)])
    assert reason_of(caught.value) == "INVALID_ARGUMENT"


async def test_single_fields_cannot_stand_beside_a_batch(services: Services) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record_one(services, events=[event("a")], tenant_id="acme")
    assert details_of(caught.value, error_pb2.ViolationDetails()).violations[0].field == "tenant_id"


async def test_a_timestamp_may_be_five_minutes_ahead_and_any_age(database: Database) -> None:
    clock = ManualClock(datetime(2026, 1, 15, tzinfo=UTC))
    async with open_services(database, clock=clock) as services:
        await record(services, event(timestamp=clock.now() + timedelta(minutes=5)))
        await record(services, event(timestamp=datetime(1970, 1, 1, tzinfo=UTC)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await record(services, event(timestamp=clock.now() + timedelta(minutes=5, microseconds=1)))
        assert details_of(caught.value, error_pb2.ViolationDetails()).violations[0].field == "events[0].timestamp"


async def test_a_hard_limit_is_never_exceeded_by_racing_clients(services: Services, database: Database) -> None:
    """I4: exactly as many are accepted as fit, and the refusal says so in the published words."""
    await limit(services, "40")

    async def attempt(number: int) -> bool:
        try:
            await record_one(services, **event(f"k{number}"))
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "Quota exceeded" and reason_of(error) == "QUOTA_EXCEEDED"
            details = details_of(error, error_pb2.QuotaExceededDetails())
            assert details.limit == 40 and details.current <= 40 and details.HasField("reset_at")
            return False
        return True

    accepted = await asyncio.gather(*(attempt(number) for number in range(100)))
    assert sum(accepted) == 40
    assert await stored(database) == 40


async def test_a_batch_over_quota_is_refused_whole_and_uses_up_nothing(services: Services, database: Database) -> None:
    await limit(services, "10")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, *[event(f"k{i}") for i in range(11)])
    (violation,) = details_of(caught.value, error_pb2.QuotaExceededDetails()).violations
    assert (violation.limit, violation.current, violation.requested) == (10, 0, 11)
    assert await stored(database) == 0
    assert (await record(services, *[event(f"k{i}") for i in range(10)])).new_events == 10


async def test_a_retry_of_a_stored_event_is_a_duplicate_even_when_the_quota_is_full(services: Services) -> None:
    await limit(services, "1")
    await record_one(services, **event("k"))
    assert (await record_one(services, **event("k"))).deduplicated


async def test_soft_limits_warn(services: Services) -> None:
    await limit(services, "2", mode=quota_pb2.SOFT)
    answer = await record(services, event("a"), event("b"), event("c"))
    assert [warning.code for warning in answer.warnings] == ["QUOTA_EXCEEDED"]
    assert (answer.warnings[0].limit, answer.warnings[0].current) == ("2", "3")


async def test_one_request_failing_leaves_the_others_of_its_group_alone(services: Services, database: Database) -> None:
    await record_one(services, **event("taken"))
    good = [record_one(services, **event(f"k{i}")) for i in range(20)]
    bad = [record_one(services, **event("taken", quantity=7.0)) for _ in range(20)]
    answers = await asyncio.gather(*good, *bad, return_exceptions=True)
    assert all(not isinstance(answer, Exception) for answer in answers[:20])
    assert all(isinstance(answer, grpc.aio.AioRpcError) for answer in answers[20:])
    assert await stored(database) == 21


async def test_while_a_group_is_inserted_the_next_is_reserved(services: Services, database: Database) -> None:
    async def are_reserved(count: int) -> bool:
        return bool(await stored(database, "SELECT count(*) FROM quota.reservation") == count)

    async with hold(database, "SELECT pg_advisory_xact_lock(ingest.ledger_lock_key($1))", services.org_id):
        first = asyncio.create_task(record_one(services, **event("first")))
        await until(partial(are_reserved, 1), "the first is reserved")
        second = asyncio.create_task(record_one(services, **event("second")))
        await until(partial(are_reserved, 2), "the second is reserved")
        assert not first.done() and not second.done()
    assert not (await first).deduplicated and not (await second).deduplicated
    assert await stored(database) == 2


async def test_groups_reserve_one_after_the_other_and_what_is_stored_waits_for_nobody(
    services: Services, database: Database
) -> None:
    async def reserving() -> int:
        waiting = "usename = 'usameter_quota' AND datname = current_database() AND wait_event_type = 'Lock'"
        return int(await stored(database, f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}"))

    async def is_reserving() -> bool:
        return await reserving() == 1

    await record_one(services, **event("known"))
    async with hold(database, "SELECT FROM quota.quota_head WHERE org_id = $1 FOR UPDATE", services.org_id):
        first = asyncio.create_task(record_one(services, **event("first")))
        await until(is_reserving, "the first is being reserved")
        assert (await record_one(services, **event("known"))).deduplicated
        second = asyncio.create_task(record_one(services, **event("second")))
        # Long enough for it to reserve if it did not wait.
        await asyncio.sleep(0.2)
        assert await is_reserving() and not first.done() and not second.done()
    assert not (await first).deduplicated and not (await second).deduplicated
    assert await stored(database) == 3


@asynccontextmanager
async def hold(database: Database, lock: str, org_id: OrgId) -> AsyncIterator[None]:
    """Hold a lock of the database's meanwhile."""
    admin = await asyncpg.connect(database.admin_url)
    try:
        async with admin.transaction():
            await admin.execute(lock, org_id)
            yield
    finally:
        await admin.close()


async def test_calls_need_a_key_with_the_scope(services: Services) -> None:
    request = event_pb2.RecordEventsRequest(**event())
    for metadata in ((), (("authorization", "Bearer usa_wrong"),), services.service_metadata):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services.events.RecordEvents(request, metadata=metadata, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
