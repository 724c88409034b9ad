"""Bulk generation by several workers: in parallel, in turn, and whatever happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.conftest import Database
from tests.support.auditing import audit_billing
from tests.support.billing import JANUARY, Organization, World, open_world, until
from tests.support.billing_bulk import assert_billed_once, new_seller, show
from usameter.common.v1 import job_pb2
from usameter_billing.domain.job import BATCH_TENANTS, GivingUp, Part, PartState, Retry
from usameter_billing.server import BILLING_LOOPS
from usameter_billing.store import job_parts, ledger
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.postgres import pool as pools
from usameter_core.postgres.pool import open_pool


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database, page_snapshots=None) as world:
        yield world


@asynccontextmanager
async def held_accounts(world: World, org: Organization, *numbers: int) -> AsyncIterator[None]:
    """Whoever bills these tenants waits until this ends."""
    holder = await asyncpg.connect(world.database.admin_url)
    try:
        async with holder.transaction():
            await holder.execute(
                "INSERT INTO billing.tenant_account (org_id, tenant_id) SELECT $1, * FROM unnest($2::text[])",
                org.org_id,
                [f"tenant_{number:04}" for number in numbers],
            )
            yield
    finally:
        await holder.close()


async def claim(connection: asyncpg.Connection[Any]) -> Part | None:
    return await job_parts.claim_part(connection)


async def waits_for_accounts(world: World, *, workers: int) -> bool:
    waiting: int = await world.admin.fetchval(
        """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%tenant_account%'
        """
    )
    return waiting == workers


async def add_cut_job(world: World, org_id: OrgId, *, total: int, parts: str) -> job_pb2.Job:
    """A run that was cut. `parts` are rows of (part, state, done, problems, given_up)."""
    job_id = new_uuid()
    # In one statement: the service would end a run without an open part at once.
    await world.admin.execute(
        f"""
        WITH job AS (
            INSERT INTO billing.job
                (org_id, job_id, period_start, period_end, finalize, state, done, total, problems, after_tenant,
                 failures, lease_until, created_at, seller_name)
            VALUES ($1, $2, $3, $4, true, 'running', 0, $5, '{{}}', '', 0, 'infinity', now(), 'Demo Inc.')
        )
        INSERT INTO billing.job_part
            (org_id, job_id, part, after_tenant, state, done, problems, given_up, failures, attempt_after)
        SELECT $1, $2, part, '', state, done, problems::text[], given_up::text[], 0, now()
        FROM (VALUES {parts}) AS new (part, state, done, problems, given_up)
        """,
        org_id,
        job_id,
        JANUARY.start,
        JANUARY.end,
        total,
    )
    return job_pb2.Job(id=format_id("job", job_id))


@pytest.mark.parametrize("replicas", [1, 2])
async def test_parts_go_on_while_others_wait_and_numbers_have_no_gap(world: World, replicas: int) -> None:
    """I7, also in the middle. With two replicas one has no worker left that does not wait."""
    held_parts = 1 if replicas == 1 else BILLING_LOOPS
    tenants = (held_parts + 3) * BATCH_TENANTS + 7
    async with AsyncExitStack() as opened:
        channels = [await opened.enter_async_context(world.open_service()) for _ in range(replicas)]
        org = await new_seller(world, channels[0], tenants=tenants)
        billable = tenants - held_parts * BATCH_TENANTS
        async with held_accounts(world, org, *(part * BATCH_TENANTS + 5 for part in range(held_parts))):
            job = await org.start_bulk(finalize=True)
            await until(lambda: world.admin.fetchval("SELECT count(*) = $1 FROM billing.invoice", billable))
            half = await show(org, job)
            assert (half.state, half.done, half.total) == (job_pb2.running, billable, tenants)
            numbers = await world.admin.fetch("SELECT number FROM billing.invoice ORDER BY number")
            assert [row["number"] for row in numbers] == list(range(1, billable + 1))
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total) == (job_pb2.succeeded, tenants, tenants)
        assert list(ended.problems) == []
        await assert_billed_once(world, org, tenants=tenants)
        assert await world.admin.fetchval("SELECT count(*) FROM billing.job_part") == 0


async def test_runs_at_once_on_two_replicas_bill_everything_once(world: World) -> None:
    """I5: a snapshot is covered by at most one invoice, also where everybody bills at once. I7: without a gap."""
    tenants = 5 * BATCH_TENANTS + 50
    async with world.open_service() as channel, world.open_service() as other_channel:
        org = await new_seller(world, channel, tenants=tenants)
        replica = world.organization(other_channel, org.org_id)
        jobs = await asyncio.gather(*(each.start_bulk(finalize=True) for each in (org, replica, org, replica)))
        singles = [org.draft(f"tenant_{number:04}") for number in range(0, tenants, 40)]
        drafts = [draft.id for draft in await asyncio.gather(*singles) if not draft.number]
        # Those that a run has not finalized first.
        await asyncio.gather(*(org.finalize(draft) for draft in drafts))
        ended = await asyncio.gather(*(org.wait_for(job) for job in jobs))
        assert [(job.state, list(job.problems)) for job in ended] == 4 * [(job_pb2.succeeded, [])]
        await assert_billed_once(world, org, tenants=tenants)


async def test_runs_beside_voids_and_changes_of_plans_leave_books_that_agree(world: World) -> None:
    """I5 to I7, whatever else locks the same accounts meanwhile, and in another order."""
    tenants = 3 * BATCH_TENANTS
    async with world.open_service() as channel, world.open_service() as other_channel:
        org = await new_seller(world, channel, tenants=tenants)
        replica = world.organization(other_channel, org.org_id)
        plans = [(await org.set_plan(name, fee)).id for name, fee in (("Basic", "31"), ("More", "62"))]
        subscribed = [f"tenant_{number:04}" for number in range(tenants - 1, 0, -60)]
        start = JANUARY.end + timedelta(days=40)
        subscriptions = [await org.subscribe(tenant_id, plans[0], start) for tenant_id in subscribed]
        jobs = [await each.start_bulk(finalize=True) for each in (org, replica)]
        await until(org.list)

        async def void(number: int) -> None:
            for invoice in await replica.list(tenant_id=f"tenant_{number:04}"):
                await replica.void(invoice.id)

        changes = [org.change_plan(each.id, plans[1], at=start + timedelta(days=9)) for each in subscriptions]
        await asyncio.gather(*changes, *(void(number) for number in range(tenants - 1, 0, -50)))
        assert [(await org.wait_for(job)).state for job in jobs] == 2 * [job_pb2.succeeded]
        assert (await org.wait_for(await org.start_bulk(finalize=True))).state == job_pb2.succeeded
        row = await world.admin.fetchrow(
            """
            SELECT count(*) FILTER (WHERE status <> 'void') AS standing, count(*) AS invoices,
                   max(number) AS last_number
            FROM billing.invoice
            """
        )
        assert row is not None
        assert (row["standing"], row["invoices"]) == (tenants, row["last_number"])
        assert await audit_billing(channel, org.metadata) == []


async def test_a_part_whose_worker_died_is_taken_up_at_once(world: World) -> None:
    tenants = 2 * BATCH_TENANTS + 1
    killed = await asyncpg.connect(world.database.role_url("billing"))
    killing = killed.transaction()
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        async with held_accounts(world, org, *range(0, tenants, BATCH_TENANTS)):
            job = await org.start_bulk(finalize=True)
            await until(lambda: waits_for_accounts(world, workers=min(3, BILLING_LOOPS)))
    # They were cancelled at shutdown, which is no failure. The first part is claimed by one that will be killed.
    assert await world.admin.fetchval("SELECT sum(failures) FROM billing.job_part") == 0
    await killing.start()
    part = await claim(killed)
    assert part is not None
    assert (part.number, part.after_tenant, part.through_tenant) == (1, "", "tenant_0199")
    async with world.open_service() as channel:
        org = world.organization(channel, org.org_id)
        world.identity.organization_name = "Renamed Ltd."
        await until(lambda: world.admin.fetchval("SELECT count(*) = $1 FROM billing.invoice", BATCH_TENANTS + 1))
        assert (await show(org, job)).state == job_pb2.running
        killed.terminate()
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, list(ended.problems)) == (job_pb2.succeeded, tenants, [])
        await assert_billed_once(world, org, tenants=tenants)
        # Of one run, whoever billed it and whenever.
        sellers = await world.admin.fetch("SELECT DISTINCT seller_name FROM billing.invoice")
        assert [row["seller_name"] for row in sellers] == ["Demo Inc."]


async def test_a_worker_that_hangs_with_a_part_loses_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=3)
        async with held_accounts(world, org, 0):
            job = await org.start_bulk(finalize=True)
            await until(lambda: waits_for_accounts(world, workers=1))
    async with AsyncExitStack() as opened:
        with monkeypatch.context() as patch:
            patch.setattr(pools, "_IDLE_IN_TRANSACTION_MAX", "1s")
            url = world.database.role_url("billing")
            pool = await opened.enter_async_context(open_pool(url, application_name="hung"))
        hung = await opened.enter_async_context(pool.acquire())
        await hung.execute("BEGIN")
        assert await job_parts.claim_part(hung) is not None
        channel = await opened.enter_async_context(world.open_service())
        org = world.organization(channel, org.org_id)
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, list(ended.problems)) == (job_pb2.succeeded, 3, [])
        await assert_billed_once(world, org, tenants=3)
        with pytest.raises(asyncpg.InterfaceError):  # PostgreSQL has ended the session
            await hung.execute("COMMIT")


async def test_a_failure_is_not_recorded_of_a_part_that_has_moved_on(world: World) -> None:
    """As when a commit has succeeded whose answer was lost."""
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=3)
        async with held_accounts(world, org, 0):
            await org.start_bulk(finalize=True)
            await until(lambda: waits_for_accounts(world, workers=1))
    worker = await asyncpg.connect(world.database.role_url("billing"))
    claimed = await claim(worker)
    assert claimed is not None
    row = "SELECT after_tenant, state, failures, done, given_up FROM billing.job_part"
    await job_parts.save_part(worker, replace(claimed, after_tenant="tenant_0000"), tenants=1)
    moved_on = await world.admin.fetchrow(row)
    await job_parts.record_failure(worker, claimed, Retry(timedelta(), 1, None))
    assert await world.admin.fetchrow(row) == moved_on
    part = replace(claimed, after_tenant="tenant_0000")
    await job_parts.record_failure(worker, part, Retry(timedelta(), 1, None))
    failed_once = await world.admin.fetchrow(row)
    assert failed_once is not None and failed_once["failures"] == 1
    # Somebody else's attempt has failed as well, and was recorded.
    giving_up = GivingUp("tenant_0001", PartState.OPEN, failures=7)
    await job_parts.record_failure(worker, part, Retry(timedelta(), 1, None))
    assert not await job_parts.give_up_tenant(worker, part, giving_up, "tenant_0001: Internal error")
    assert await world.admin.fetchrow(row) == failed_once
    await job_parts.save_part(worker, replace(part, state=PartState.DONE, failures=1), tenants=2)
    done = await world.admin.fetchrow(row)
    await job_parts.record_failure(worker, replace(part, failures=0), Retry(timedelta(), 1, None))
    assert await world.admin.fetchrow(row) == done
    await worker.close()


async def test_the_tenants_of_a_part_are_those_behind_its_place_up_to_its_end(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=6)
        await org.draft("tenant_0000")
    for after, through, limit, numbers in (
        ("", None, 10, [0, 1, 2, 3, 4, 5]),
        ("tenant_0001", None, 2, [2, 3]),
        ("tenant_0001", "tenant_0004", 10, [2, 3, 4]),
        ("tenant_0001", "tenant_0004", 2, [2, 3]),
        ("tenant_0004", "tenant_0004", 10, []),
    ):
        found = await ledger.load_pending_tenants(
            world.admin, org.org_id, period=JANUARY, after=after, through=through, limit=limit
        )
        assert found == [f"tenant_{number:04}" for number in numbers]


async def test_a_small_run_behind_a_large_one_is_done_before_it(world: World) -> None:
    # What ingest was not told of stays in the outbox, numbered in the order of billing, over all organizations.
    world.ledger.refuses_marks = True
    tenants = 3 * BILLING_LOOPS * BATCH_TENANTS
    async with world.open_service() as channel:
        large, small = await new_seller(world, channel, tenants=tenants), await new_seller(world, channel, tenants=2)
        async with held_accounts(world, large, *(loop * BATCH_TENANTS for loop in range(BILLING_LOOPS))):
            large_job = await large.start_bulk(finalize=True)
            await until(lambda: waits_for_accounts(world, workers=BILLING_LOOPS))
            small_job = await small.start_bulk(finalize=True)
            await until(
                lambda: world.admin.fetchval(
                    "SELECT count(*) = 1 FROM billing.job_part WHERE org_id = $1", small.org_id
                )
            )
        assert (await small.wait_for(small_job)).done == 2
        assert (await large.wait_for(large_job)).done == tenants
        before = await world.admin.fetchval(
            """
            SELECT count(*) FROM billing.mark_outbox
            WHERE org_id = $1 AND version < (SELECT max(version) FROM billing.mark_outbox WHERE org_id = $2)
            """,
            large.org_id,
            small.org_id,
        )
        # After those batches of the large run that were under way, and perhaps a few that began meanwhile.
        assert before < tenants - BATCH_TENANTS


async def test_who_had_least_comes_first_and_nobody_waits_for_a_part_that_another_has(world: World) -> None:
    first, second = OrgId(new_uuid()), OrgId(new_uuid())
    await add_cut_job(
        world, first, total=600, parts=", ".join(f"({part}, 'open', 0, '{{}}', '{{}}')" for part in (1, 2, 3))
    )
    await add_cut_job(
        world, second, total=400, parts=", ".join(f"({part}, 'open', 0, '{{}}', '{{}}')" for part in (1, 2))
    )
    # It failed, and is not to be tried before a while has passed.
    await world.admin.execute(
        "UPDATE billing.job_part SET attempt_after = now() + interval '1 hour' WHERE org_id = $1 AND part = 1", second
    )
    async with AsyncExitStack() as opened:
        claimed = []
        for _ in range(5):
            connection = await asyncpg.connect(world.database.role_url("billing"))
            opened.push_async_callback(connection.close)
            await connection.execute("BEGIN")
            claimed.append(await claim(connection))
        parts_in_order = [(part.number, part.org_id) for part in claimed if part is not None]
        assert parts_in_order[0] == (1, first)
        assert sorted(parts_in_order[1:3]) == sorted([(2, first), (2, second)])
        assert parts_in_order[3:] == [(3, first)]
        assert claimed[4] is None


async def test_a_run_whose_worker_died_before_it_ended_it_is_ended(world: World) -> None:
    async with world.open_service() as channel:
        org = world.organization(channel)
        job = await add_cut_job(
            world,
            org.org_id,
            total=600,
            parts="""(1, 'done', 199, '{of a,of b}', '{c: Internal error}'),
                (2, 'done', 198, '{}', '{k: Internal error,l: Internal error}'), (3, 'done', 200, '{of z}', '{}')""",
        )
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total) == (job_pb2.failed, 597, 600)
        given_up = [f"{tenant}: Internal error" for tenant in ("c", "k", "l")]
        assert list(ended.problems) == [*given_up, "of a", "of b", "of z"]
        assert await world.admin.fetchval("SELECT count(*) FROM billing.job_part") == 0


async def test_tenants_that_come_into_a_part_after_the_cut_are_billed_with_it(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=BATCH_TENANTS + 10)
        async with held_accounts(world, org, 0, BATCH_TENANTS):
            job = await org.start_bulk(finalize=True)
            await until(lambda: waits_for_accounts(world, workers=2))
            # Before the first part, within it, behind the last: pulled by the call for a tenant of its own.
            new = ["a", *(f"tenant_0100_{number:03}" for number in range(20)), "z"]
            org.seal(*((tenant, "call", "2026-01-11", "50") for tenant in new))
            await org.draft("z")
            # Both go back, and whoever comes next looks anew at who is in their parts.
            rows = await world.admin.fetch(
                """
                SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity
                WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%tenant_account%'
                """
            )
            pids = [row["pid"] for row in rows]
            await until(
                lambda: world.admin.fetchval("SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ANY($1)", pids)
            )
        ended = await org.wait_for(job)
        tenants = BATCH_TENANTS + 10 + len(new)
        assert (ended.state, ended.done, ended.total) == (job_pb2.succeeded, tenants, tenants)
        assert await world.admin.fetchval("SELECT max(number) FROM billing.invoice") == tenants


async def test_two_that_cut_a_run_at_once_cut_it_once(world: World) -> None:
    tenants = 2 * BATCH_TENANTS
    async with world.open_service() as channel, world.open_service():
        org = await new_seller(world, channel, tenants=tenants)
        world.ledger.is_open.clear()
        job = await org.start_bulk(finalize=True)
        first = await until(lambda: world.admin.fetchval("SELECT lease_id FROM billing.job"))
        # As when the pull has taken longer than the lease.
        await world.admin.execute("UPDATE billing.job SET lease_until = now()")
        await until(lambda: world.admin.fetchval("SELECT lease_id <> $1 FROM billing.job", first))
        world.ledger.is_open.set()
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total) == (job_pb2.succeeded, tenants, tenants)
        await assert_billed_once(world, org, tenants=tenants)


async def test_a_run_that_older_code_left_unfinished_goes_on_where_it_was(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=9)
        await world.admin.execute(
            """
            INSERT INTO billing.job
                (org_id, job_id, period_start, period_end, finalize, state, done, total, problems, after_tenant,
                 failures, lease_id, lease_until, created_at)
            VALUES ($1, $2, $3, $4, false, 'running', 5, 9, '{of tenant_0003}', 'tenant_0004', 1, $2, now(), now())
            """,
            org.org_id,
            job_id := new_uuid(),
            JANUARY.start,
            JANUARY.end,
        )
        ended = await org.wait_for(job_pb2.Job(id=format_id("job", job_id)))
        assert (ended.state, ended.done, ended.total) == (job_pb2.succeeded, 9, 9)
        assert list(ended.problems) == ["of tenant_0003"]
        drafted = sorted(invoice.tenant_id for invoice in await org.list())
        assert drafted == [f"tenant_000{number}" for number in range(5, 9)]


async def test_a_run_waits_for_an_ingest_that_is_away(world: World) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=2)
        world.ledger.is_down = True
        job = await org.start_bulk(finalize=True)
        await until(lambda: world.admin.fetchval("SELECT failures > 0 FROM billing.job"))
        world.ledger.is_down = False
        # When the next attempt is due.
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
