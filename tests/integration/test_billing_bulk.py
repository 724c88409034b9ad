"""Bulk generation: all tenants, once, as single calls would have billed them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, World, open_world
from tests.support.billing_bulk import assert_billed_once, new_seller
from tests.support.services import reason_of
from usameter.billing.v1 import invoice_pb2
from usameter.common.v1 import job_pb2
from usameter_core.grpc.timestamps import timestamp_from_datetime


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database, page_snapshots=None) as world:
        yield world


async def test_every_tenant_is_invoiced_and_the_answer_comes_before_the_work(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=30)
        request = invoice_pb2.BulkGenerateInvoicesRequest(
            period_start=timestamp_from_datetime(JANUARY.start),
            period_end=timestamp_from_datetime(JANUARY.end),
            finalize=True,
        )
        call = org.invoices.BulkGenerateInvoices(request, metadata=org.metadata)
        job = await call
        assert dict(await call.trailing_metadata())["usameter-http-status"] == "202"
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total, list(ended.problems)) == (job_pb2.succeeded, 30, 30, [])
        await assert_billed_once(world, org, tenants=30)


async def test_a_tenant_with_more_lines_than_a_smallint_counts_holds_nobody_up(world: World) -> None:
    lines = 2**15 + 1
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=2)
        await world.admin.execute(
            """
            INSERT INTO billing.price (org_id, price_id, event_type, tenant_id, effective_from, terms, created_at)
            SELECT org_id, gen_random_uuid(), 'type.' || number, '', effective_from, terms, created_at
            FROM billing.price, generate_series(1, $2) AS number WHERE org_id = $1 AND event_type = 'call'
            """,
            org.org_id,
            lines,
        )
        types = [f"type.{number}" for number in range(1, lines + 1)]
        org.seal(*(("many", event_type, "2026-01-10", "1") for event_type in types))
        ended = await org.wait_for(await org.start_bulk(finalize=True))
        assert (ended.state, ended.done, list(ended.problems)) == (job_pb2.succeeded, 3, [])
        (invoice,) = await org.list(tenant_id="many")
        assert (invoice.status, invoice.total) == (invoice_pb2.open, "655.38")
        assert [line.event_type for line in (await org.get(invoice.id)).lines] == sorted(types)


async def test_a_bulk_invoice_is_the_one_that_a_single_call_would_have_made(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=3)
        single = await org.draft("tenant_0001")
        await org.wait_for(await org.start_bulk(finalize=True))
        # The draft is finalized under its own id, with its own lines.
        billed = await org.get(single.id)
        assert billed.status == invoice_pb2.open
        assert list(billed.lines) == list(single.lines)
        await assert_billed_once(world, org, tenants=3)


async def test_without_finalize_drafts_are_made_and_made_again_the_same(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=5)
        await org.wait_for(await org.start_bulk(finalize=False))
        drafts = await org.list(status=invoice_pb2.draft)
        assert len(drafts) == 5
        full = [await org.get(draft.id) for draft in drafts]
        await org.wait_for(await org.start_bulk(finalize=False))
        assert [await org.get(draft.id) for draft in drafts] == full
        assert len(await org.list()) == 5


async def test_generating_again_bills_only_what_came_late(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=5)
        await org.wait_for(await org.start_bulk(finalize=True))
        again = await org.wait_for(await org.start_bulk(finalize=True))
        assert (again.state, again.done, again.total) == (job_pb2.succeeded, 0, 0)
        assert len(await org.list()) == 5
        org.seal(("tenant_0002", "call", "2026-01-30", "100"))
        later = await org.wait_for(await org.start_bulk(finalize=True, period=FEBRUARY))
        assert (later.done, later.total) == (1, 1)
        (newest, *_) = await org.list()
        assert (newest.total, newest.period_start.seconds) == ("2.00", FEBRUARY.start.timestamp())


async def test_use_without_a_price_is_a_problem_of_the_job_and_stops_nobody(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=2)
        org.seal(("tenant_0001", "video", "2026-01-10", "1"), ("zoe", "video", "2026-01-10", "1"))
        ended = await org.wait_for(await org.start_bulk(finalize=True))
        assert (ended.state, ended.done) == (job_pb2.succeeded, 3)
        assert list(ended.problems) == [
            f"{tenant}: no price of video is in force at 2026-01-01T00:00:00Z" for tenant in ("tenant_0001", "zoe")
        ]
        assert len(await org.list()) == 2


async def test_wrong_bounds_are_refused_at_once_and_an_unknown_job_is_not_found(world: World) -> None:
    async with world.open_service() as channel:
        org = world.organization(channel)
        for call, reason in (
            (org.start_bulk(finalize=True, period=type(JANUARY)(JANUARY.start, FEBRUARY.end)), "INVALID_ARGUMENT"),
            (org.wait_for(job_pb2.Job(id=f"job_{'0' * 32}")), "NOT_FOUND"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert reason_of(caught.value) == reason
