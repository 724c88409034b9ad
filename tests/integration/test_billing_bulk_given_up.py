"""Bulk generation of tenants that cannot be billed: one is given up, and nobody else for its sake."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.conftest import Database
from tests.support.billing import JANUARY, Organization, World, open_world, until
from tests.support.billing_bulk import assert_billed_once, new_seller, show
from usameter.common.v1 import job_pb2
from usameter_billing.domain.job import BATCH_TENANTS, GivingUp, Job, JobState, Part, PartState, Retry
from usameter_billing.store import job_parts, jobs
from usameter_core.ids import OrgId, new_uuid

FIVE_MINUTES = timedelta(minutes=5)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    """Where no attempt is waited for, but what it would have waited is noted."""
    async with open_world(database, page_snapshots=None) as world:
        await world.admin.execute(
            """
            CREATE TABLE billing.waited (wait interval NOT NULL);
            CREATE FUNCTION billing.skip_wait() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
            BEGIN
                INSERT INTO billing.waited VALUES (NEW.attempt_after - now());
                NEW.attempt_after := now();
                RETURN NEW;
            END $$;
            CREATE TRIGGER skip_wait BEFORE UPDATE ON billing.job_part
            FOR EACH ROW EXECUTE FUNCTION billing.skip_wait()
            """
        )
        yield world


async def waited(world: World) -> timedelta:
    wait: timedelta = await world.admin.fetchval("SELECT coalesce(sum(wait), '0') FROM billing.waited")
    return wait


def named(*numbers: int) -> list[str]:
    return [f"tenant_{number:04}" for number in numbers]


async def break_prices(world: World, org: Organization, tenant_ids: list[str]) -> list[str]:
    """Give the tenants a price of calls each that is none any more; what a run says of them, in their order."""
    problems = []
    for tenant_id in sorted(tenant_ids):
        price = await org.set_price("call", "0.02", tenant_id=tenant_id)
        error = "Object missing required field `model`"
        problems.append(f"{tenant_id}: the stored terms of {price.id} are no price: {error}")
    await world.admin.execute("UPDATE billing.price SET terms = '{}' WHERE tenant_id = ANY($1)", tenant_ids)
    return problems


async def mend_prices(world: World) -> None:
    await world.admin.execute(
        """
        UPDATE billing.price SET terms = (SELECT terms FROM billing.price WHERE event_type = 'call' AND tenant_id = '')
        WHERE tenant_id <> ''
        """
    )


async def assert_billed_but(world: World, *, tenants: int, given_up: list[str]) -> None:
    """I7 as well: everybody else has one invoice, and their numbers have no gap."""
    rows = await world.admin.fetch("SELECT tenant_id, number FROM billing.invoice ORDER BY number")
    assert [row["number"] for row in rows] == list(range(1, tenants - len(given_up) + 1))
    assert {row["tenant_id"] for row in rows} == set(named(*range(tenants))) - set(given_up)


async def assert_given_up(world: World, org: Organization, *, tenants: int, bad: list[str]) -> None:
    """A run leaves out those whose price is broken, and bills them once that is mended."""
    problems = await break_prices(world, org, bad)
    ended = await org.wait_for(await org.start_bulk(finalize=True))
    assert (ended.state, ended.done, ended.total) == (job_pb2.failed, tenants - len(bad), tenants)
    assert list(ended.problems) == problems
    await assert_billed_but(world, tenants=tenants, given_up=bad)
    assert await world.admin.fetchval("SELECT count(*) FROM billing.job_part") == 0
    assert await waited(world) == timedelta()
    await mend_prices(world)
    again = await org.wait_for(await org.start_bulk(finalize=True))
    assert (again.state, again.done, list(again.problems)) == (job_pb2.succeeded, len(bad), [])
    await assert_billed_once(world, org, tenants=tenants)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="first of all"),
        pytest.param(77, id="amid a part"),
        pytest.param(BATCH_TENANTS - 1, id="last of a part"),
        pytest.param(BATCH_TENANTS, id="first of a part"),
        pytest.param(BATCH_TENANTS + 49, id="last of all"),
    ],
)
async def test_a_tenant_that_cannot_be_billed_is_given_up_alone(world: World, number: int) -> None:
    tenants = BATCH_TENANTS + 50
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        await assert_given_up(world, org, tenants=tenants, bad=named(number))


@pytest.mark.parametrize("tenants", [1, BATCH_TENANTS + 1])
async def test_a_tenant_alone_in_its_part_is_given_up(world: World, tenants: int) -> None:
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        await assert_given_up(world, org, tenants=tenants, bad=named(tenants - 1))


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((0, 1), id="beside each other"),
        pytest.param((3, 190), id="apart"),
        pytest.param((198, 199), id="last"),
    ],
)
async def test_two_of_a_part_are_given_up(world: World, numbers: tuple[int, int]) -> None:
    tenants = BATCH_TENANTS + 50
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        await assert_given_up(world, org, tenants=tenants, bad=named(*numbers))


async def test_a_price_of_all_that_is_broken_ends_a_run_without_waiting(world: World) -> None:
    tenants = 120
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        await world.admin.execute("UPDATE billing.price SET terms = '{}' WHERE event_type = 'image'")
        ended = await org.wait_for(await org.start_bulk(finalize=True))
        assert (ended.state, ended.done, ended.total) == (job_pb2.failed, 0, tenants)
        assert [problem.partition(":")[0] for problem in ended.problems] == named(*range(100))
        assert await waited(world) == timedelta()


async def test_two_replicas_give_up_the_same_tenants_once(world: World) -> None:
    tenants = 2 * BATCH_TENANTS + 50
    async with AsyncExitStack() as opened:
        channel, _ = [await opened.enter_async_context(world.open_service()) for _ in range(2)]
        org = await new_seller(world, channel, tenants=tenants)
        await assert_given_up(world, org, tenants=tenants, bad=named(5, 6, 250, 449))


async def test_two_runs_at_once_give_up_the_same_tenant_each(world: World) -> None:
    tenants = BATCH_TENANTS
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        problems = await break_prices(world, org, named(120))
        started = [await org.start_bulk(finalize=True) for _ in range(2)]
        ended = [await org.wait_for(job) for job in started]
        assert [(job.state, list(job.problems)) for job in ended] == 2 * [(job_pb2.failed, problems)]
        await assert_billed_but(world, tenants=tenants, given_up=named(120))


@pytest.mark.parametrize("moment", ["IMMEDIATE", "DEFERRED"])
async def test_who_fails_amid_the_transaction_or_at_its_commit_is_known(world: World, moment: str) -> None:
    """What is not an error of ours is told to nobody, and those who were given up are named first."""
    tenants = 3 * BATCH_TENANTS
    await world.admin.execute(
        f"""
        CREATE FUNCTION billing.refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no room for tenant_0222'; END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON billing.invoice_line DEFERRABLE INITIALLY {moment}
        FOR EACH ROW WHEN (NEW.tenant_id IN ('tenant_0222', 'tenant_0224')) EXECUTE FUNCTION billing.refuse();
        """
    )
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=tenants)
        org.seal(*((tenant, "video", "2026-01-10", "1") for tenant in named(7, 599)))
        unpriced = [f"{tenant}: no price of video is in force at 2026-01-01T00:00:00Z" for tenant in named(7, 599)]
        job = await org.start_bulk(finalize=True)
        # As soon as one is given up, for who looks at the run as it goes on.
        given_up = [f"{tenant}: Internal error" for tenant in named(222, 224)]
        await until(lambda: world.admin.fetchval("SELECT bool_or(given_up <> '{}') FROM billing.job_part"))
        assert (await show(org, job)).problems[0] == given_up[0]
        ended = await org.wait_for(job)
        assert (ended.state, ended.done, ended.total) == (job_pb2.failed, tenants - 2, tenants)
        assert list(ended.problems) == [*given_up, *unpriced]
        await assert_billed_but(world, tenants=tenants, given_up=named(222, 224))
        # What the database refuses may pass: the second had its five minutes as well.
        assert await waited(world) >= 2 * FIVE_MINUTES
        await world.admin.execute("DROP TRIGGER refuse ON billing.invoice_line")
        again = await org.wait_for(await org.start_bulk(finalize=True))
        assert (again.state, again.done) == (job_pb2.succeeded, 4)
        assert await world.admin.fetchval("SELECT max(number) FROM billing.invoice") == tenants


async def refuse_invoices(world: World, failures: int) -> None:
    """No invoice is written before so many attempts have failed."""
    # One row of those that waited is of the attempt itself, which has moved the part on before it comes to invoices.
    await world.admin.execute(
        f"""
        CREATE FUNCTION billing.refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            IF (SELECT count(*) - 1 FROM billing.waited) < {failures} THEN RAISE EXCEPTION 'not now'; END IF;
            RETURN NULL;
        END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON billing.invoice EXECUTE FUNCTION billing.refuse()
        """
    )


@pytest.mark.parametrize("failures", [1, 8, 17])
async def test_what_fails_for_a_while_and_then_works_gives_up_nobody(world: World, failures: int) -> None:
    """The longest that is borne: one failure more is the test below."""
    await refuse_invoices(world, failures)
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=BATCH_TENANTS)
        ended = await org.wait_for(await org.start_bulk(finalize=True))
        assert (ended.state, ended.done, list(ended.problems)) == (job_pb2.succeeded, BATCH_TENANTS, [])
        await assert_billed_once(world, org, tenants=BATCH_TENANTS)
        assert (await waited(world) >= FIVE_MINUTES) == (failures == 17)


async def test_what_fails_for_longer_gives_up_one_and_bills_the_others(world: World) -> None:
    await refuse_invoices(world, 18)
    async with world.open_service() as channel:
        org = await new_seller(world, channel, tenants=BATCH_TENANTS)
        ended = await org.wait_for(await org.start_bulk(finalize=True))
        assert (ended.state, ended.done, ended.total) == (job_pb2.failed, BATCH_TENANTS - 1, BATCH_TENANTS)
        assert list(ended.problems) == ["tenant_0000: Internal error"]
        await assert_billed_but(world, tenants=BATCH_TENANTS, given_up=named(0))


async def test_of_two_that_failed_at_once_one_gives_up_and_none_that_others_have_billed(world: World) -> None:
    org_id, job_id = OrgId(new_uuid()), new_uuid()
    await jobs.insert_job(world.admin, Job(org_id, job_id, JANUARY, True, JobState.RUNNING))
    await jobs.save_cut(world.admin, org_id, job_id, seller_name="Demo Inc.", tenants=2)
    await job_parts.insert_parts(world.admin, org_id, job_id, after_tenant="", last_tenants=["b"])
    async with connected(world) as one, connected(world) as other:
        claimed = [await claim_and_roll_back(each) for each in (one, other)]
        retry = Retry(timedelta(), 17, "a")
        for each, part in zip((one, other), claimed, strict=True):
            await job_parts.record_failure(each, part, retry)
        last = await claim_and_roll_back(one)
        # The second was recorded as the first was.
        assert (last.failures, last.alone_tenant, last.batch_tenants) == (17, "a", 1)
        assert last == await claim_and_roll_back(other)
        giving_up = GivingUp("a", PartState.OPEN, failures=7)
        assert await job_parts.give_up_tenant(one, last, giving_up, "a: Internal error")
        assert not await job_parts.give_up_tenant(other, last, giving_up, "a: Internal error")
        behind = await claim_and_roll_back(one)
        assert (behind.after_tenant, behind.failures, behind.alone_tenant) == ("a", 7, None)
        assert behind.given_up == ("a: Internal error",)
        # The other one's attempt has succeeded where the first one's has failed.
        await job_parts.save_part(other, replace(behind, after_tenant="b"), tenants=1)
        assert not await job_parts.give_up_tenant(one, behind, replace(giving_up, tenant_id="b"), "b: Internal error")
        row = await world.admin.fetchrow("SELECT after_tenant, done, failures, given_up FROM billing.job_part")
        assert row is not None
        assert tuple(row) == ("b", 1, 0, ["a: Internal error"])


@asynccontextmanager
async def connected(world: World) -> AsyncIterator[asyncpg.Connection[Any]]:
    connection = await asyncpg.connect(world.database.role_url("billing"))
    try:
        yield connection
    finally:
        await connection.close()


async def claim_and_roll_back(connection: asyncpg.Connection[Any]) -> Part:
    transaction = connection.transaction()
    await transaction.start()
    part = await job_parts.claim_part(connection)
    await transaction.rollback()
    assert part is not None
    return part
