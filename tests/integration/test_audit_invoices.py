"""The audit of the invoices: whatever is changed behind billing's back it names, and nothing else (I5 to I7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.auditing import audit_billing, place_of
from tests.support.billing import FEBRUARY, INTERNAL_TOKEN, JANUARY, Organization, World, open_world
from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter.common.v1 import audit_pb2
from usameter_billing.clients import IngestClient
from usameter_billing.domain.auditing import AuditPlace
from usameter_billing.service.auditing import InvoiceAudits
from usameter_core.grpc.channels import open_channel
from usameter_core.grpc.timestamps import datetime_from_timestamp
from usameter_core.ids import parse_id
from usameter_core.period import Period
from usameter_core.postgres.pool import open_pool


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as opened:
        yield opened


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        yield world.organization(channel)


async def audit(org: Organization) -> list[audit_pb2.Violation]:
    return await audit_billing(org.channel, org.metadata)


def told(violations: list[audit_pb2.Violation]) -> list[tuple[str, str, set[str]]]:
    return sorted((each.invariant, each.problem, set(place_of(each))) for each in violations)


async def billed(org: Organization) -> list[invoice_pb2.Invoice]:
    """Two tenants with a January of three epochs, the last a true-up, of which bolt's is not billed; and a February."""
    await org.set_terms(
        "req",
        price_pb2.Price(
            model=price_pb2.graduated,
            currency="USD",
            tiers=[
                price_pb2.PriceTier(up_to="100", unit_amount="0.10"),
                price_pb2.PriceTier(unit_amount="0.015"),
            ],
        ),
    )
    await org.set_price("mb", "0.333")
    org.seal(("acme", "req", "2026-01-03", "90"), ("acme", "mb", "2026-01-03", "7"), ("bolt", "req", "2026-01-09", "5"))
    invoices = [await org.bill("acme"), await org.bill("bolt")]
    org.seal(("acme", "req", "2026-01-04", "40.5"), ("bolt", "req", "2026-01-05", "1"))
    org.seal(("acme", "req", "2026-02-04", "1"), ("acme", "unpriced", "2026-02-04", "1"))
    invoices += [await org.bill("acme"), await org.bill("acme", FEBRUARY)]
    return invoices


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


async def subscribed(org: Organization) -> None:
    """A tenant that was on two plans in January, with a minimum and without any use, and is taxed."""
    minimum = price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount="0.01", minimum_amount="5")
    basic = await org.set_plan("Basic", "31", prices={"req": minimum})
    better = await org.set_plan("Better", "100")
    await org.set_settings("subscriber", tax_rate="7.7")
    subscription = await org.subscribe("subscriber", basic.id, JANUARY.start)
    await org.bill("subscriber")
    await org.change_plan(subscription.id, better.id, at_once=True)
    await org.bill("subscriber", FEBRUARY)
    assert len(await org.list(tenant_id="subscriber")) == 2


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


async def test_an_organization_that_billed_nothing_has_no_violation(org: Organization) -> None:
    assert await audit(org) == []
    org.seal(("acme", "req", "2026-01-03", "90"))
    assert await audit(org) == []


COPY = {"snapshot_id", "epoch", "tenant_id", "event_type", "day"}
USE = {"tenant_id", "event_type", "period_start"}
OF_COPY = "the copy of a snapshot is not as the ledger has it"
OF_COVER = "what an invoice covers is not what its lines count"
OF_USE = "the lines of a period do not add up to the rating of its use"
OF_LAST_DUE = "the lines of a period do not add up to what was last due of it"
OF_FEE = "the lines of a base fee do not add up to what is due of it"
OF_LOST = "use is neither covered nor pending"
OF_SUBTOTAL = "an invoice's subtotal is not the sum of its lines"
OF_AMOUNT = "a line's amount is not what is due less what was billed"
OF_RATED = "a line's rated amount is not that of its price and quantity"


OF_NO_PRICE = "a line's price is none"
OF_QUANTITY = "a line's quantity is not that of its snapshots"
OF_STRANGE = "a line covers a snapshot that is not of its use"
OF_UNREADABLE = "what a line counts as billed cannot be read"
OF_COUNT = "what a line counts as billed is not what was billed before it"
LINE = {"invoice_id", "line_id"}


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        pytest.param(
            "UPDATE billing.snapshot SET total = 91 WHERE total = 90",
            [("I5", OF_COPY, COPY), ("I6", OF_USE, USE), *[("I6", OF_QUANTITY, LINE)] * 2],
            id="a snapshot's total",
        ),
        pytest.param(
            "UPDATE billing.snapshot SET root = sha256('x') WHERE total = 90",
            [("I5", OF_COPY, COPY)],
            id="a snapshot's root",
        ),
        pytest.param(
            "DELETE FROM billing.snapshot WHERE total = 1 AND tenant_id = 'bolt'",
            [("I5", OF_COPY, COPY)],
            id="a removed snapshot that is not billed",
        ),
        pytest.param(
            """INSERT INTO billing.snapshot SELECT org_id, gen_random_uuid(), epoch, tenant_id, 'other', day, 1, 5, root
               FROM billing.snapshot WHERE total = 90""",
            [
                ("I5", "snapshots are here that the ledger does not have", {"epoch"}),
                ("I6", OF_LOST, COPY),
            ],
            id="a snapshot too many",
        ),
        pytest.param(
            "UPDATE billing.ledger_cursor SET through_epoch = 9",
            [("I5", "epochs were pulled that the ledger does not have", set())],
            id="epochs from the future",
        ),
        pytest.param(
            """DELETE FROM billing.snapshot_cover
               WHERE snapshot_id = (SELECT snapshot_id FROM billing.snapshot WHERE total = 90)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"}), ("I6", OF_LOST, COPY)],
            id="a removed cover",
        ),
        pytest.param(
            """UPDATE billing.snapshot_cover SET invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 2)
               WHERE snapshot_id = (SELECT snapshot_id FROM billing.snapshot WHERE total = 90)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"})] * 2,
            id="a cover of another invoice",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET snapshot_ids = snapshot_ids || (
                   SELECT snapshot_id FROM billing.snapshot WHERE total = 90)
               WHERE invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 3)""",
            [("I5", OF_COVER, {"snapshot_id", "invoice_id"})],
            id="a snapshot counted by two invoices",
        ),
        pytest.param(
            "DELETE FROM billing.pending_use WHERE tenant_id = 'bolt'", [("I6", OF_LOST, COPY)], id="use lost"
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET amount = amount + 0.01 WHERE event_type = 'mb'",
            [
                ("I6", OF_USE, USE),
                ("I7", OF_AMOUNT, {"invoice_id", "line_id"}),
                ("I7", OF_SUBTOTAL, {"invoice_id"}),
            ],
            id="a line's amount",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET quantity = quantity + 1
               WHERE event_type = 'mb'""",
            [("I6", OF_QUANTITY, LINE), ("I7", OF_RATED, LINE)],
            id="a line's quantity",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET kind = 'TRUE_UP' WHERE event_type = 'mb'",
            [("I7", "a line's kind is not that of its subject", LINE)],
            id="a line's kind",
        ),
        pytest.param(
            "UPDATE billing.invoice_line SET tenant_id = 'bolt' WHERE event_type = 'mb'",
            [
                ("I5", OF_STRANGE, {*LINE, "snapshot_id"}),
                ("I6", OF_QUANTITY, LINE),
                ("I6", OF_USE, USE),
                ("I7", "a line is of another tenant than its invoice", LINE),
            ],
            id="a line's tenant",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET event_type = 'other' WHERE event_type = 'mb'""",
            [
                ("I5", OF_STRANGE, {*LINE, "snapshot_id"}),
                ("I6", OF_QUANTITY, LINE),
                ("I6", OF_USE, USE),
                ("I7", "a line's price is of another use", LINE),
            ],
            id="a line's event type",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET previously_billed = '[]', rated_amount = amount
               WHERE kind = 'TRUE_UP'""",
            [
                ("I6", OF_COUNT, LINE),
                ("I7", "a line's kind is not that of its subject", LINE),
                ("I7", OF_RATED, LINE),
            ],
            id="what a line counts as billed",
        ),
        pytest.param(
            """UPDATE billing.invoice_line SET previously_billed =
                   ('[{"invoice_id": "' || invoice_id || '", "line_id": "' || line_id || '", "amount": "0"}]')::json
               WHERE event_type = 'mb'""",
            [("I6", OF_COUNT, LINE), ("I7", "a line's kind is not that of its subject", LINE)],
            id="a line that counts what was not billed before it",
        ),
        pytest.param(
            """UPDATE billing.price SET terms = jsonb_set(terms, '{unit_amount}', '"0.334"') WHERE event_type = 'mb'""",
            [("I6", OF_USE, USE), ("I7", OF_RATED, {"invoice_id", "line_id"})],
            id="a price",
        ),
        pytest.param(
            """UPDATE billing.price SET terms = jsonb_set(terms, '{unit_amount}', '"-0.333"')
               WHERE event_type = 'mb'""",
            [("I7", OF_NO_PRICE, {"invoice_id", "line_id"})],
            id="a price that is none",
        ),
        pytest.param(
            "UPDATE billing.price SET terms = '{}' WHERE event_type = 'mb'",
            [("I7", OF_NO_PRICE, {"invoice_id", "line_id"})],
            id="a price that is nothing at all",
        ),
        pytest.param(
            "DELETE FROM billing.price WHERE event_type = 'mb'",
            [("I7", "a line's price or plan is missing", {"invoice_id", "line_id"})],
            id="a removed price",
        ),
        pytest.param(
            "UPDATE billing.invoice SET tax = 1, total = total + 1, amount_due = amount_due + 1 WHERE number = 1",
            [("I7", "an invoice's tax is not that of its lines", {"invoice_id"})],
            id="tax",
        ),
        pytest.param(
            "UPDATE billing.invoice SET number = 9 WHERE number = 4",
            [("I7", "a number is missing", set()), ("I7", "a number was not counted", set())],
            id="a number",
        ),
        pytest.param(
            "UPDATE billing.invoice_number SET last_number = 6",
            [("I7", "a number is missing", set())],
            id="the last number",
        ),
        pytest.param(
            """DELETE FROM billing.invoice_line
               WHERE invoice_id = (SELECT invoice_id FROM billing.invoice WHERE number = 3)""",
            [
                ("I5", OF_COVER, {"snapshot_id", "invoice_id"}),
                ("I6", OF_USE, USE),
                ("I7", OF_SUBTOTAL, {"invoice_id"}),
            ],
            id="a removed line",
        ),
    ],
)
async def test_what_is_tampered_with_is_named_and_nothing_else(
    org: Organization, world: World, statement: str, expected: list[tuple[str, str, set[str]]]
) -> None:
    await billed(org)
    await world.admin.execute(statement)
    found = await audit(org)
    assert told(found) == sorted(expected)
    assert all(each.expected != each.found for each in found)


ID = "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    "stored",
    [
        "null",
        "{}",
        "7",
        '"[]"',
        "[1]",
        "[[]]",
        "[null]",
        "[{}]",
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": null}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "many"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "NaN"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "1e999999"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": {{"a": 1}}}}]',
        f'[{{"invoice_id": "inv_1", "line_id": "{ID}", "amount": "1"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": 1, "amount": "1"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "{ID}", "amount": "\\u0000"}}]',
        f'[{{"invoice_id": "{ID}", "line_id": "\\ud800", "amount": "1"}}]',
    ],
)
async def test_what_a_line_counts_and_cannot_be_read_is_named_and_the_audit_goes_on(
    org: Organization, world: World, stored: str
) -> None:
    """I6, I7: of a use and of a fee; and what is wrong beside it is named as well."""
    await subscribed(org)
    await billed(org)
    await world.admin.execute(
        "UPDATE billing.invoice_line SET previously_billed = $1 WHERE event_type = 'mb' OR plan_id IS NOT NULL", stored
    )
    lines = await world.admin.fetchval(
        "SELECT count(*) FROM billing.invoice_line WHERE event_type = 'mb' OR plan_id IS NOT NULL"
    )
    assert lines >= 3
    assert told(await audit(org)) == [("I7", OF_UNREADABLE, LINE)] * lines
    await world.admin.execute("UPDATE billing.invoice_line SET amount = amount + 1 WHERE event_type = 'mb'")
    found = told(await audit(org))
    assert [each for each in found if each[1] != OF_UNREADABLE] == [
        ("I6", OF_USE, USE),
        ("I7", OF_SUBTOTAL, {"invoice_id"}),
    ]


async def test_what_a_true_up_counts_and_cannot_be_read_is_missed_as_well(org: Organization, world: World) -> None:
    await billed(org)
    await world.admin.execute("UPDATE billing.invoice_line SET previously_billed = '{}' WHERE kind = 'TRUE_UP'")
    assert told(await audit(org)) == [("I6", OF_COUNT, LINE), ("I7", OF_UNREADABLE, LINE)]


FREE_AT_FIRST = price_pb2.Price(
    model=price_pb2.graduated,
    currency="USD",
    tiers=[price_pb2.PriceTier(up_to="1000", unit_amount="0"), price_pb2.PriceTier(unit_amount="0.02")],
)


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ("quantity = 900", {OF_QUANTITY}),
        ("snapshot_ids = '{}'", {OF_COVER}),
        ("snapshot_ids = ARRAY[gen_random_uuid()]", {OF_COVER, OF_STRANGE}),
    ],
)
async def test_a_line_is_compared_with_its_use_also_where_no_amount_moves(
    org: Organization, world: World, change: str, problems: set[str]
) -> None:
    await org.set_terms("req", FREE_AT_FIRST)
    org.seal(("acme", "req", "2026-01-03", "90"))
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute(f"UPDATE billing.invoice_line SET {change}")
    assert {each.problem for each in await audit(org)} == problems


async def test_the_quantity_of_a_void_line_is_compared(org: Organization, world: World) -> None:
    await org.set_price("req", "0")
    org.seal(("acme", "req", "2026-01-03", "90"))
    voided = await org.bill("acme")
    await org.void(voided.id)
    org.seal(("acme", "req", "2026-01-04", "-4"))
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET quantity = 86")
    (found,) = await audit(org)
    assert (found.problem, found.expected, found.found) == (OF_QUANTITY, "90", "86")
    assert found.place.invoice_id == voided.id


async def test_seconds_of_a_base_fee_that_are_no_days_are_named(org: Organization, world: World) -> None:
    plan = await org.set_plan("Basic", "31")
    await org.subscribe("acme", plan.id, JANUARY.start)
    await org.bill("acme")
    assert await audit(org) == []
    await world.admin.execute("UPDATE billing.invoice_line SET fee_seconds = fee_seconds - 60")
    found = await audit(org)
    assert {each.problem for each in found} == {"a base fee's seconds are not days of its interval"}


OF_MONEY = "what is due, paid, drawn and credited of an invoice is not its total"
OF_GRANTED = "what credit notes granted is not in their tenant's credit"
OF_ORPHAN = "no invoice or credit note made an entry of a tenant's credit"


async def moved_money(org: Organization) -> None:
    """A paid invoice with a credit note, a negative one, and one that draws on the credit of both and is reduced."""
    await org.set_price("req", "1")
    await org.set_settings("acme", tax_rate="19")
    org.seal(("acme", "req", "2026-01-03", "90"))
    first = await org.bill("acme")
    await org.mark_paid(first.id)
    await org.credit(first.id, "10.00")
    org.seal(("acme", "req", "2026-01-03", "-7"))
    await org.bill("acme")
    org.seal(("acme", "req", "2026-02-03", "70"))
    third = await org.bill("acme", FEBRUARY)
    await org.credit(third.id, "5.00")
    assert await audit(org) == []


@pytest.mark.parametrize(
    ("statement", "problems"),
    [
        ("UPDATE billing.invoice SET amount_due = amount_due - 1 WHERE number = 3", {OF_MONEY}),
        ("UPDATE billing.invoice SET amount_paid = amount_paid - 1 WHERE number = 1", {OF_MONEY}),
        (
            "UPDATE billing.credit_entry SET amount = amount - 1 WHERE kind = 'DRAWN'",
            {OF_MONEY, "a tenant's credit is below 0"},
        ),
        ("UPDATE billing.credit_entry SET amount = amount + 1 WHERE credit_note_id IS NOT NULL", {OF_GRANTED}),
        ("UPDATE billing.credit_entry SET tenant_id = 'x' WHERE kind = 'DRAWN'", {OF_MONEY}),
        (
            """INSERT INTO billing.credit_entry SELECT org_id, tenant_id, currency, gen_random_uuid(), kind, 5,
               gen_random_uuid(), NULL, created_at FROM billing.credit_entry WHERE credit_note_id IS NOT NULL""",
            {OF_ORPHAN},
        ),
        (
            "DELETE FROM billing.credit_entry WHERE amount > 0 AND credit_note_id IS NULL",
            {"a negative invoice did not grant what it comes to", "a tenant's credit is below 0"},
        ),
        ("UPDATE billing.credit_note SET number = 5 WHERE number = 1", {"numbers of credit notes have a gap"}),
        ("UPDATE billing.credit_note_number SET last_number = 3", {"numbers of credit notes have a gap"}),
        (
            "UPDATE billing.credit_note SET subtotal = subtotal + 90, total = total + 90, "
            "credit_granted = credit_granted + 90 WHERE number = 1",
            {OF_GRANTED, "more is credited than the invoice has"},
        ),
        (
            """INSERT INTO billing.credit_note_line
               SELECT org_id, credit_note_id, 1, gen_random_uuid(), 1, 0 FROM billing.credit_note WHERE number = 1""",
            {"credit notes are not the sums of their lines"},
        ),
    ],
)
async def test_money_that_does_not_add_up_is_named(
    org: Organization, world: World, statement: str, problems: set[str]
) -> None:
    """I7: what is still due, what was paid, credited and drawn, and the credit of the tenant."""
    await moved_money(org)
    await world.admin.execute(statement)
    found = await audit(org)
    assert {each.problem for each in found} == problems
    assert {each.invariant for each in found} == {"I7"}


async def test_the_amounts_and_the_place_of_a_violation_are_exact(org: Organization, world: World) -> None:
    january, *_ = await billed(org)
    (line,) = [line for line in january.lines if line.event_type == "mb"]
    await world.admin.execute(
        "UPDATE billing.invoice_line SET amount = 3 WHERE line_id = $1", parse_id("lin", line.id, field="id")
    )
    use, amount, subtotal = sorted(await audit(org), key=lambda each: (each.invariant, each.problem))
    assert (use.expected, use.found) == ("2.33", "3")
    assert (use.place.tenant_id, use.place.event_type, use.place.period_start) == ("acme", "mb", "2026-01-01")
    assert (amount.expected, amount.found, amount.place.line_id) == ("2.33", "3", line.id)
    assert (subtotal.expected, subtotal.found, subtotal.place.invoice_id) == ("12", "11.33", january.id)


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
