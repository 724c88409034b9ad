"""Bulk generation: all tenants, once, whatever happens to the workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world, until
from tests.support.services import reason_of
from usameter.billing.v1 import invoice_pb2
from usameter.common.v1 import job_pb2
from usameter_billing.service.jobs import BATCH_TENANTS
from usameter_core.grpc.timestamps import timestamp_from_datetime


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database, page_snapshots=None) as world:
        yield world


async def new_seller(world: World, channel: grpc.aio.Channel, *, tenants: int) -> Organization:
    org = world.organization(channel)
    await org.set_price("call", "0.02")
    await org.set_price("image", "1")
    org.seal(
        *((f"tenant_{n:04}", kind, "2026-01-10", str(n + 1)) for n in range(tenants) for kind in ("call", "image"))
    )
    return org


async def assert_billed_once(world: World, org: Organization, *, tenants: int) -> None:
    """I5, I6 and I7 over the whole organization."""
    row = await world.admin.fetchrow(
        """
        SELECT count(*) AS invoices, count(DISTINCT tenant_id) AS tenants, max(number) AS last_number,
               sum(total) AS total, (SELECT count(*) FROM billing.snapshot_cover WHERE org_id = $1) AS covered,
               (SELECT count(*) FROM billing.pending_use WHERE org_id = $1) AS pending,
               (SELECT sum(amount) FROM billing.invoice_line WHERE org_id = $1) AS lines
        FROM billing.invoice WHERE org_id = $1
        """,
        org.org_id,
    )
    assert row is not None
    assert (row["invoices"], row["tenants"], row["last_number"]) == (tenants, tenants, tenants)
    assert (row["covered"], row["pending"]) == (2 * tenants, 0)
    units = tenants * (tenants + 1) // 2
    assert row["total"] == row["lines"]
    assert row["total"] * 100 == units * 102


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
        assert (again.state, again.total, len(await org.list())) == (job_pb2.succeeded, 0, 5)
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


async def test_runs_at_once_on_two_replicas_bill_everything_once(world: World) -> None:
    """I5: a snapshot is covered by at most one invoice, also where everybody bills at once."""
    tenants = 2 * BATCH_TENANTS + 50
    async with world.open_service() as channel, world.open_service() as other_channel:
        org = await new_seller(world, channel, tenants=tenants)
        replica = world.organization(other_channel, org.org_id)
        jobs = await asyncio.gather(*(each.start_bulk(finalize=True) for each in (org, replica, org, replica)))
        singles = [org.draft(f"tenant_{number:04}") for number in range(0, tenants, 40)]
        await asyncio.gather(*singles)
        ended = await asyncio.gather(*(org.wait_for(job) for job in jobs))
        assert {job.state for job in ended} == {job_pb2.succeeded}
        await assert_billed_once(world, org, tenants=tenants)


async def test_a_run_whose_worker_died_goes_on_where_it_was(world: World) -> None:
    tenants = 2 * BATCH_TENANTS + 1
    blocker = await asyncpg.connect(world.database.admin_url)
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        # The second batch waits for this account until its worker is gone.
        blocked = blocker.transaction()
        await blocked.start()
        await blocker.execute(
            "INSERT INTO billing.tenant_account (org_id, tenant_id) VALUES ($1, $2)",
            org.org_id,
            f"tenant_{BATCH_TENANTS + 7:04}",
        )
        job = await org.start_bulk(finalize=True)
        await until(lambda: world.admin.fetchval("SELECT done > 0 FROM billing.job"))
        request = invoice_pb2.GetJobRequest(job_id=job.id)
        half = await org.invoices.GetJob(request, metadata=org.metadata)
        assert (half.state, half.done, half.total) == (job_pb2.running, BATCH_TENANTS, tenants)
    await blocked.rollback()
    await blocker.close()
    assert await world.admin.fetchval("SELECT count(*) FROM billing.invoice") == BATCH_TENANTS
    # The lease of 15 seconds runs out.
    await world.admin.execute("UPDATE billing.job SET lease_until = now()")
    async with world.open_service() as channel:
        org = world.organization(channel, org.org_id)
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total) == (job_pb2.succeeded, tenants, tenants)
        await assert_billed_once(world, org, tenants=tenants)


async def test_a_run_waits_for_an_ingest_that_is_away(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=2)
        world.ledger.is_down = True
        job = await org.start_bulk(finalize=True)
        await until(lambda: world.admin.fetchval("SELECT failures > 0 FROM billing.job"))
        world.ledger.is_down = False
        # It is tried again after 10 seconds.
        await world.admin.execute("UPDATE billing.job SET lease_until = now()")
        ended = await org.wait_for(job)
        assert (ended.state, list(ended.problems)) == (job_pb2.succeeded, [])
        await assert_billed_once(world, org, tenants=2)


async def test_a_run_that_keeps_failing_ends_as_failed_and_says_why(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=1)
        world.ledger.is_down = True
        job = await org.start_bulk(finalize=True)
        await until(lambda: world.admin.fetchval("SELECT failures > 0 FROM billing.job"))
        await world.admin.execute("UPDATE billing.job SET failures = 14, lease_until = now()")
        ended = await org.wait_for(job)
        assert ended.state == job_pb2.failed
        assert "ingest" in ended.problems[0]


async def test_a_worker_that_lost_its_lease_commits_nothing(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=2)
        blocker = await asyncpg.connect(world.database.admin_url)
        async with blocker.transaction():
            await blocker.execute(
                "INSERT INTO billing.tenant_account (org_id, tenant_id) VALUES ($1, 'tenant_0001')", org.org_id
            )
            job = await org.start_bulk(finalize=True)
            await until(lambda: world.admin.fetchval("SELECT total = 2 FROM billing.job"))
            # Somebody else has claimed it, and is thought to work on it for an hour.
            await world.admin.execute(
                "UPDATE billing.job SET lease_id = gen_random_uuid(), lease_until = now() + interval '1 hour'"
            )
        await blocker.close()
        invoice = await org.bill("tenant_0001")
        assert invoice.number == 1
        state = await org.invoices.GetJob(invoice_pb2.GetJobRequest(job_id=job.id), metadata=org.metadata)
        assert (state.state, state.done) == (job_pb2.running, 0)


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
