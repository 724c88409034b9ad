"""The audit of base fees: their lines add up, also where some were taken back or are void (I6)."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.support.billing import FEBRUARY, JANUARY, Organization, World
from tests.support.invoice_audit import OF_AMOUNT, OF_FEE, OF_NO_PRICE, OF_SUBTOTAL, audit, subscribed
from usameter.billing.v1 import invoice_pb2
from usameter_core.grpc.timestamps import datetime_from_timestamp
from usameter_core.ids import parse_id
from usameter_core.period import Period


async def test_a_base_fee_that_does_not_add_up_is_named(org: Organization, world: World) -> None:
    await subscribed(org)
    assert await audit(org) == []
    await world.admin.execute(
        """UPDATE billing.invoice_line SET amount = amount + 1
           WHERE plan_id IS NOT NULL AND kind = 'BASE_FEE' AND period_start = $1""",
        JANUARY.start,
    )
    found = await audit(org)
    (fee,) = [each for each in found if each.problem == OF_FEE]
    assert (fee.place.tenant_id, fee.place.period_start) == ("subscriber", "2026-01-01")
    assert {each.problem for each in found} == {
        OF_FEE,
        OF_AMOUNT,
        OF_SUBTOTAL,
        "an invoice's tax is not that of its lines",
    }


async def trued_up_fee(org: Organization, world: World) -> tuple[invoice_pb2.Invoice, invoice_pb2.Invoice]:
    """A base fee of March that was billed in advance, and the invoice that gives most of it back."""
    basic, better = await org.set_plan("Basic", "31"), await org.set_plan("Better", "100")
    subscription = await org.subscribe("acme", basic.id, JANUARY.start)
    in_advance = await org.bill("acme", FEBRUARY)
    changed = await org.change_plan(subscription.id, better.id, at_once=True)
    world.clock.advance(timedelta(days=2))
    stub = Period(FEBRUARY.end, datetime_from_timestamp(changed.phases[1].start_at, field="start_at"))
    return in_advance, await org.bill("acme", stub)


async def test_a_base_fee_that_was_taken_back_is_no_violation_before_and_after_it_is_billed_again(
    org: Organization, world: World
) -> None:
    in_advance, true_up = await trued_up_fee(org, world)
    assert {(line.base_fee.plan_name, line.amount) for line in true_up.lines} == {
        ("Basic", "-30.00"),
        ("Better", "96.77"),
    }
    await org.void(in_advance.id)
    assert await audit(org) == []
    again = await org.bill("acme", FEBRUARY)
    assert await audit(org) == []
    await org.void(true_up.id)
    assert await audit(org) == []
    await org.void(again.id)
    assert await audit(org) == []


@pytest.mark.parametrize("billed_again", [False, True])
async def test_a_base_fee_with_a_void_line_that_does_not_add_up_is_named(
    org: Organization, world: World, billed_again: bool
) -> None:
    """I6: the sum is checked before what is void is billed again, and after."""
    in_advance, _ = await trued_up_fee(org, world)
    await org.void(in_advance.id)
    if billed_again:
        await org.bill("acme", FEBRUARY)
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE amount = -30")
    (fee,) = [each for each in await audit(org) if each.problem == OF_FEE]
    assert (fee.place.tenant_id, fee.place.period_start) == ("acme", "2026-03-01")
    assert (fee.expected, fee.found) == (("1", "2") if billed_again else ("-30", "-29"))
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount - 1 WHERE amount = -29")
    assert await audit(org) == []
    await world.admin.execute(
        "DELETE FROM billing.invoice_line WHERE amount = 31 AND invoice_id = $1",
        parse_id("inv", in_advance.id, field="id"),
    )
    # Of a void invoice that was billed again nothing counts any more, but its total.
    assert (OF_FEE in {each.problem for each in await audit(org)}) == (not billed_again)


async def test_a_price_of_a_plan_that_is_none_leaves_its_base_fee_compared(org: Organization, world: World) -> None:
    await subscribed(org)
    await world.admin.execute("UPDATE billing.price SET terms = jsonb_set(terms, '{unit_amount}', '\"x\"')")
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE plan_id IS NOT NULL")
    assert {OF_NO_PRICE, OF_FEE} <= {each.problem for each in await audit(org)}


async def test_seconds_of_a_base_fee_that_are_no_days_are_named(org: Organization, world: World) -> None:
    plan = await org.set_plan("Basic", "31")
    await org.subscribe("acme", plan.id, JANUARY.start)
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET fee_seconds = fee_seconds - 60")
    found = await audit(org)
    assert {each.problem for each in found} == {"a base fee's seconds are not days of its interval"}
