"""Quota that is reserved before the work, and the events that consume it, over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, details_of, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import quota_pb2, reservation_pb2, reservation_pb2_grpc


@pytest.fixture
async def services(database: Database) -> AsyncIterator[Services]:
    async with open_services(database, clock=ManualClock()) as running:
        await running.quotas.SetQuota(
            quota_pb2.SetQuotaRequest(
                tenant_id="acme",
                event_type="ai_job",
                limit_value="10",
                enforcement_mode=quota_pb2.HARD,
                period=quota_pb2.MONTHLY,
            ),
            metadata=running.metadata,
            timeout=10,
        )
        yield running


async def reserve(services: Services, quantity: str, name: str | None = "r", **fields: Any) -> Any:
    given = {"tenant_id": "acme", "event_type": "ai_job", **fields}
    request = reservation_pb2.ReserveQuotaRequest(quantity=quantity, reservation_id=name, **given)
    return await stub(services).ReserveQuota(request, metadata=services.metadata, timeout=10)


async def get(services: Services, name: str = "r") -> Any:
    request = reservation_pb2.GetReservationRequest(reservation_id=name)
    return await stub(services).GetReservation(request, metadata=services.metadata, timeout=10)


async def cancel(services: Services, name: str = "r") -> Any:
    request = reservation_pb2.CancelReservationRequest(reservation_id=name)
    return await stub(services).CancelReservation(request, metadata=services.metadata, timeout=10)


def stub(services: Services) -> Any:
    return reservation_pb2_grpc.ReservationServiceStub(services.quota)


def event(quantity: str, name: str | None = "r", **fields: Any) -> dict[str, Any]:
    given = {"tenant_id": "acme", "event_type": "ai_job", "quantity_decimal": quantity, **fields}
    return given if name is None else {**given, "reservation_id": name}


async def record(services: Services, *events: dict[str, Any], **fields: Any) -> Any:
    request = event_pb2.RecordEventsRequest(events=list(events), **fields)
    return await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)


async def is_consumed(services: Services, name: str = "r") -> bool:
    return bool((await get(services, name)).state == reservation_pb2.CONSUMED)


async def current(services: Services) -> str:
    request = quota_pb2.GetQuotaRequest(tenant_id="acme", event_type="ai_job")
    found: str = (await services.quotas.GetQuota(request, metadata=services.metadata, timeout=10)).current
    return found


async def test_a_reservation_is_consumed_by_the_event_that_names_it(services: Services) -> None:
    reserved = await reserve(services, "9.50")
    assert (reserved.reservation_id, reserved.state, reserved.quantity) == ("r", reservation_pb2.HELD, "9.5")
    assert reserved.expires_at.seconds - reserved.created_at.seconds == 900
    (warning,) = reserved.warnings
    assert (warning.code, warning.limit, warning.current) == ("QUOTA_SOFT_LIMIT", "10", "9.5")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("4", None))
    assert reason_of(caught.value) == "QUOTA_EXCEEDED"
    await record(services, event("4"))
    await until(lambda: is_consumed(services), "the reservation is consumed")
    assert await current(services) == "4"
    request = event_pb2.RecordEventsRequest(**event("6.5", None))
    with pytest.raises(grpc.aio.AioRpcError):
        await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)
    request = event_pb2.RecordEventsRequest(**event("6", "r"))
    await services.events.RecordEvents(request, metadata=services.metadata, timeout=10)


async def test_what_exceeds_the_reservation_may_be_refused_and_leaves_it_held(services: Services) -> None:
    await reserve(services, "6")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("10.5"))
    details = details_of(caught.value, error_pb2.QuotaExceededDetails())
    assert (details.violations[0].current, details.violations[0].requested) == (6, 4.5)
    assert (await get(services)).state == reservation_pb2.HELD
    assert (await cancel(services)).state == reservation_pb2.CANCELLED
    assert await current(services) == "0"


async def test_a_retry_of_a_stored_event_is_a_duplicate_whatever_it_names(services: Services) -> None:
    await reserve(services, "6")
    await record(services, event("10", idempotency_key="k"))
    for name in ("r", "other", None):
        answer = await record(services, event("10", name, idempotency_key="k"))
        assert answer.results[0].deduplicated


async def test_of_two_events_of_a_batch_that_name_one_reservation_the_first_has_it(services: Services) -> None:
    await reserve(services, "6")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await record(services, event("1"), event("5"))
    assert reason_of(caught.value) == "QUOTA_EXCEEDED"
    await record(services, event("5"), event("3.9"), event("0.1", None))
    await until(lambda: is_consumed(services), "the reservation is consumed")
    assert await current(services) == "9"


async def test_a_reservation_of_another_tenant_fails_that_request_alone(services: Services, database: Database) -> None:
    """Whoever is committed with it does not notice."""
    await reserve(services, "6", tenant_id="other")
    one = [record(services, event("1", None, idempotency_key=f"k{n}")) for n in range(5)]
    answers = await asyncio.gather(record(services, event("1")), *one, return_exceptions=True)
    error, *others = answers
    assert isinstance(error, grpc.aio.AioRpcError)
    assert reason_of(error) == "INVALID_ARGUMENT" and "r is of another tenant or event type" in (error.details() or "")
    assert all(answer.success for answer in others)
    answer = await record(services, event("1"), event("1", None), partial=True)
    assert [result.error.code for result in answer.results] == ["INVALID_ARGUMENT", ""]
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == 6


async def test_a_refused_a_conflicting_and_a_closed_reservation_say_which_they_are(services: Services) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reserve(services, "10.1")
    assert reason_of(caught.value) == "QUOTA_EXCEEDED"
    await reserve(services, "6")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reserve(services, "5")
    assert reason_of(caught.value) == "IDEMPOTENCY_CONFLICT"
    await cancel(services)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reserve(services, "6")
    assert reason_of(caught.value) == "FAILED_PRECONDITION"
    assert details_of(caught.value, error_pb2.PreconditionDetails()).condition == "RESERVATION_CLOSED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await get(services, "unknown")
    assert reason_of(caught.value) == "NOT_FOUND"


async def test_a_cancelled_id_that_was_never_reserved_has_no_content(services: Services) -> None:
    cancelled = await cancel(services)
    assert cancelled.state == reservation_pb2.CANCELLED
    assert [field.name for field, _ in cancelled.ListFields()] == ["reservation_id", "state"]


async def test_without_an_id_each_is_a_reservation_of_its_own(services: Services) -> None:
    first, second = [await reserve(services, "1", None) for _ in range(2)]
    assert first.reservation_id != second.reservation_id
    assert (await get(services, first.reservation_id)).state == reservation_pb2.HELD
    assert await current(services) == "2"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("quantity", {"quantity": "0"}),
        ("quantity", {"quantity": "0.0000001"}),
        ("ttl_seconds", {"ttl_seconds": 0}),
        ("ttl_seconds", {"ttl_seconds": 86_401}),
        ("reservation_id", {"name": "a:b"}),
        ("reservation_id", {"name": "a" * 101}),
        ("tenant_id", {"tenant_id": ""}),
    ],
)
async def test_what_is_out_of_bounds_is_named(services: Services, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await reserve(services, **{"quantity": "1", **fields})
    assert details_of(caught.value, error_pb2.ViolationDetails()).violations[0].field == field


async def test_64_jobs_that_reserve_first_use_up_the_limit_and_no_more(services: Services) -> None:
    """I4: what a job could reserve it can record, and never is more recorded than the limit."""

    async def job(number: int) -> int:
        try:
            await reserve(services, "2", f"job{number}")
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) == "QUOTA_EXCEEDED"
            return 0
        await record(services, event("2", f"job{number}", idempotency_key=f"job{number}"))
        return 2

    assert sum(await asyncio.gather(*[job(number) for number in range(64)])) == 10
    assert await current(services) == "10"
