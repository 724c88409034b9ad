"""The audit of the invoices names nothing that is as it should be, whatever was billed, voided and paged (I5 to I7)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any

import grpc.aio
import pytest

from tests.support.billing import INTERNAL_TOKEN, JANUARY, Organization, World
from tests.support.invoice_audit import (
    OF_AMOUNT,
    OF_COPY,
    OF_COVER,
    OF_LAST_DUE,
    OF_RATED,
    OF_USE,
    audit,
    billed,
    subscribed,
)
from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter_billing.clients import IngestClient
from usameter_billing.domain.auditing import AuditPlace
from usameter_billing.service.auditing import InvoiceAudits
from usameter_core.grpc.channels import open_channel
from usameter_core.postgres.pool import open_pool


async def test_sound_invoices_have_no_violation(org: Organization) -> None:
    await billed(org)
    assert await audit(org) == []


async def test_subscriptions_taxes_credits_and_voids_are_no_violation(org: Organization, world: World) -> None:
    await subscribed(org)
    voided, *_ = await billed(org)
    await org.void(voided.id)
    assert await audit(org) == []
    await org.set_settings("acme", tax_rate="19")
    again = await org.bill("acme")
    await org.credit(again.id, "1.00")
    await org.mark_uncollectible(again.id)
    assert await audit(org) == []


async def test_a_void_minimum_is_pending_until_it_is_billed_again(org: Organization, world: World) -> None:
    minimum = price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount="1", minimum_amount="5")
    plan = await org.set_plan("Basic", "0", prices={"req": minimum})
    await org.subscribe("acme", plan.id, JANUARY.start)
    without_use = await org.bill("acme")
    assert [list(line.snapshots) for line in without_use.lines] == [[]]
    org.seal(("acme", "req", "2026-01-10", "7"))
    assert (await org.bill("acme")).total == "2.00"
    await org.void(without_use.id)
    assert await audit(org) == []
    world.clock.advance(timedelta(days=1))
    assert (await org.bill("acme")).total == "5.00"
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE amount = 2")
    assert "the lines of a period do not add up to the rating of its use" in {each.problem for each in await audit(org)}


MINIMUM = price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount="1", minimum_amount="5")


async def minimum_and_use(org: Organization) -> invoice_pb2.Invoice:
    """A minimum that was billed without use, and the use that came later; the invoice of the first."""
    plan = await org.set_plan("Basic", "0", prices={"req": MINIMUM})
    await org.subscribe("acme", plan.id, JANUARY.start)
    without_use = await org.bill("acme")
    org.seal(("acme", "req", "2026-01-10", "7"))
    return without_use


async def test_a_void_by_a_clock_that_is_behind_is_no_violation(org: Organization, world: World) -> None:
    """I6: replicas' clocks differ, so the moments of invoices and voids do not tell their order."""
    without_use = await minimum_and_use(org)
    world.clock.advance(timedelta(seconds=5))
    assert (await org.bill("acme")).total == "2.00"
    world.clock.set(world.clock.now() - timedelta(seconds=1))
    await org.void(without_use.id)
    assert await audit(org) == []


async def test_a_void_by_a_clock_that_is_ahead_hides_nothing(org: Organization, world: World) -> None:
    without_use = await minimum_and_use(org)
    assert (await org.bill("acme")).total == "2.00"
    world.clock.advance(timedelta(seconds=5))
    await org.void(without_use.id)
    world.clock.set(world.clock.now() - timedelta(seconds=1))
    assert (await org.bill("acme")).total == "5.00"
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE amount = 2")
    assert OF_USE in {each.problem for each in await audit(org)}


async def test_lines_of_a_period_that_is_not_covered_whole_add_up_too(org: Organization, world: World) -> None:
    await org.set_price("req", "1")
    org.seal(("acme", "req", "2026-01-10", "7"))
    voided = await org.bill("acme")
    org.seal(("acme", "req", "2026-01-11", "2"))
    assert (await org.bill("acme")).total == "2.00"
    await org.void(voided.id)
    org.seal(("acme", "req", "2026-01-12", "4"))
    await org.draft("acme")
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE amount = 2")
    (use,) = [each for each in await audit(org) if each.invariant == "I6"]
    assert (use.problem, use.expected, use.found) == (OF_LAST_DUE, "2", "3")


async def test_an_organization_that_billed_nothing_has_no_violation(org: Organization) -> None:
    assert await audit(org) == []
    org.seal(("acme", "req", "2026-01-03", "90"))
    assert await audit(org) == []


async def test_live_invoices_have_no_violation(org: Organization, world: World) -> None:
    """I5 to I7 while use is sealed, billed and audited at once, in pages of a handful."""
    tenants = [f"t{number}" for number in range(8)]
    await org.set_price("req", "0.333")
    stop = asyncio.Event()

    async def keep_billing(tenant_id: str) -> None:
        for number in range(1_000):
            org.seal((tenant_id, "req", f"2026-01-{number % 28 + 1:02}", "1.5"))
            await org.bill(tenant_id)
            if stop.is_set() and number:
                return

    async with (
        open_pool(world.database.role_url("billing"), application_name="test") as pool,
        open_channel(world.peers) as peers,
        asyncio.TaskGroup() as tasks,
    ):
        audits = InvoiceAudits(
            pool=pool,
            ingest=IngestClient(peers, internal_token=INTERNAL_TOKEN),
            snapshots_max=4,
            tenants_max=3,
            invoices_max=5,
        )
        for tenant_id in tenants:
            tasks.create_task(keep_billing(tenant_id))
        for _ in range(8):
            place: AuditPlace | None = AuditPlace()
            while place is not None:
                audited = await audits.audit(org.org_id, place)
                assert audited.violations == []
                place = audited.next_place
        stop.set()
    assert await audit(org) == []
    invoices = await org.list()
    assert len(invoices) > len(tenants)
    assert sum(Decimal(each.total) for each in invoices) > 0


async def test_pages_leave_nothing_out_and_repeat_nothing(org: Organization, world: World) -> None:
    await org.set_price("req", "0.333")
    for number in range(10):
        org.seal(*((f"t{tenant}", "req", f"2026-01-{number + 1:02}", "3") for tenant in range(7)))
    for tenant in range(7):
        await org.bill(f"t{tenant}")
    await world.admin.execute("UPDATE billing.snapshot SET root = sha256('x')")
    await world.admin.execute("DELETE FROM billing.snapshot WHERE epoch = 4")
    await world.admin.execute("UPDATE billing.invoice_line SET rated_amount = 1")
    async with (
        open_pool(world.database.role_url("billing"), application_name="test") as pool,
        open_channel(world.peers) as peers,
    ):
        ingest = IngestClient(peers, internal_token=INTERNAL_TOKEN)
        audits = InvoiceAudits(pool=pool, ingest=ingest, snapshots_max=9, tenants_max=2, invoices_max=3)
        place: AuditPlace | None = AuditPlace()
        found: list[Any] = []
        checked = 0
        while place is not None:
            audited = await audits.audit(org.org_id, place)
            found += audited.violations
            checked += audited.checked
            place = audited.next_place
    problems = [each.problem for each in found]
    assert problems.count(OF_COPY) == 70
    assert problems.count(OF_COVER) == 7
    assert problems.count(OF_RATED) == problems.count(OF_AMOUNT) == 7
    assert checked == 70 + 7 + 7
    in_large = await audit(org)
    assert sorted(problems) == sorted(each.problem for each in in_large)


async def test_ingest_away_is_unavailable(org: Organization) -> None:
    org.ledger.is_down = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await audit(org)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_organization_is_not_told_of_another(org: Organization, world: World) -> None:
    await billed(org)
    await world.admin.execute("UPDATE billing.invoice_line SET amount = 3")
    assert await audit(world.organization(org.channel)) == []
