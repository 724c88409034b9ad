"""The audit of the money: what is due, paid, credited and drawn adds up (I7)."""

from __future__ import annotations

import pytest

from tests.support.billing import FEBRUARY, Organization, World
from tests.support.invoice_audit import audit

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
