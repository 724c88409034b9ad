"""Which periods can be drafted and finalized, by the clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import invoice_pb2
from usameter.common.v1 import error_pb2, job_pb2

INSTANT = timedelta(microseconds=1)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        org.seal(("acme", "call", "2026-01-10", "100"), ("acme", "call", "2026-02-10", "10"))
        yield org


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def violation_of(call: Any) -> tuple[str, str]:
    error = await refused(call)
    assert reason_of(error) == "INVALID_ARGUMENT"
    (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
    return violation.field, violation.description


async def test_a_period_that_has_not_begun_is_refused_and_bills_nothing(world: World, org: Organization) -> None:
    world.clock.set(FEBRUARY.start - INSTANT)
    expected = ("period_start", "the billing period has not begun")
    assert await violation_of(org.draft("acme", FEBRUARY)) == expected
    assert await violation_of(org.start_bulk(finalize=False, period=FEBRUARY)) == expected
    assert await violation_of(org.start_bulk(finalize=True, period=FEBRUARY)) == expected
    assert await org.list() == []
    assert await world.admin.fetchval("SELECT count(*) FROM billing.job") == 0


async def test_a_running_period_can_be_drafted_and_not_finalized(world: World, org: Organization) -> None:
    world.clock.set(FEBRUARY.start)
    draft = await org.draft("acme", FEBRUARY)
    assert (draft.status, draft.total) == (invoice_pb2.draft, "2.20")
    world.clock.set(FEBRUARY.end - INSTANT)
    assert (await org.wait_for(await org.start_bulk(finalize=False, period=FEBRUARY))).state == job_pb2.succeeded
    error = await refused(org.finalize(draft.id))
    assert details_of(error, error_pb2.PreconditionDetails()).condition == "PERIOD_NOT_ENDED"
    field, description = await violation_of(org.start_bulk(finalize=True, period=FEBRUARY))
    assert field == "finalize"
    assert "2026-03-01T00:00:00Z" in description
    assert await org.get(draft.id) == draft


async def test_a_period_is_finalized_from_its_end_on(world: World, org: Organization) -> None:
    world.clock.set(JANUARY.end)
    single = await org.bill("acme")
    assert (single.status, single.total) == (invoice_pb2.open, "2.00")
    assert await org.finalize(single.id) == single
    world.clock.set(FEBRUARY.end)
    assert (await org.wait_for(await org.start_bulk(finalize=True, period=FEBRUARY))).done == 1
    assert [invoice.total for invoice in await org.list()] == ["0.20", "2.00"]


async def test_an_invoice_carries_earlier_periods_and_never_later_ones(world: World, org: Organization) -> None:
    january, february = await org.draft("acme", JANUARY), await org.draft("acme", FEBRUARY)
    assert [line.period_start.ToJsonString() for line in january.lines] == ["2026-01-01T00:00:00Z"]
    assert [(line.kind, line.period_start.ToJsonString()) for line in february.lines] == [
        (invoice_pb2.USAGE, "2026-02-01T00:00:00Z"),
        (invoice_pb2.TRUE_UP, "2026-01-01T00:00:00Z"),
    ]
