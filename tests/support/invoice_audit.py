"""Invoices that are audited: what is billed, and how what is found is told."""

from __future__ import annotations

from tests.support.auditing import audit_billing, place_of
from tests.support.billing import FEBRUARY, JANUARY, Organization
from usameter.billing.v1 import invoice_pb2, price_pb2
from usameter.common.v1 import audit_pb2

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
