"""Random histories of use, invoices, voids, payments and credit notes, some at once; and what must hold after each.

The seed is printed, and `USAMETER_HISTORY_SEED` repeats what is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import defaultdict
from collections.abc import Awaitable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.auditing import audit_billing
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world
from tests.support.services import reason_of
from usameter.billing.v1 import invoice_pb2

TENANTS, UNIT_AMOUNTS = ("a", "b", "c"), {"call": "0.013", "image": "1.05"}
TAX_RATES = {"a": "0", "b": "19", "c": "7.7"}
STEPS = 60
CENT = Decimal("0.01")
FINALIZED = (invoice_pb2.open, invoice_pb2.paid, invoice_pb2.uncollectible, invoice_pb2.void)


class History:
    """What happens to an organization; use is kept in memory as well."""

    def __init__(self, org: Organization, chance: random.Random) -> None:
        self.org = org
        self.chance = chance
        self.used: defaultdict[tuple[str, str, int], Decimal] = defaultdict(Decimal)
        self.done: defaultdict[str, int] = defaultdict(int)

    async def step(self) -> None:
        """Something, or three things at once."""
        await asyncio.gather(*(self._attempt() for _ in range(self.chance.choice((1, 1, 3)))))

    async def _attempt(self) -> None:
        name = self.chance.choice(("use", "use", "bill", "bill", "bill", "void", "void", "pay", "write_off", "credit"))
        try:
            await getattr(self, f"_{name}")()
        except grpc.aio.AioRpcError as error:
            assert reason_of(error) in ("FAILED_PRECONDITION", "NOT_FOUND"), error
        else:
            self.done[name] += 1

    async def _use(self) -> None:
        tenant, event_type = self.chance.choice(TENANTS), self.chance.choice(list(UNIT_AMOUNTS))
        month, day = self.chance.choice((1, 2)), self.chance.randint(1, 28)
        quantity = Decimal(self.chance.randint(1, 3_000)) / 10
        subject = (tenant, event_type, month)
        if self.chance.random() < 0.3:
            # A correction gives back at most what was used.
            quantity = -min(quantity, self.used[subject])
        if quantity:
            self.used[subject] += quantity
            self.org.seal((tenant, event_type, f"2026-{month:02}-{day:02}", str(quantity)))

    async def _bill(self) -> None:
        await self.org.bill(self.chance.choice(TENANTS), self.chance.choice((JANUARY, FEBRUARY)))

    async def _any(self) -> invoice_pb2.Invoice:
        invoices = [each for each in await self.org.list() if each.status in FINALIZED]
        return self.chance.choice(invoices) if invoices else invoice_pb2.Invoice(id=f"inv_{'0' * 32}", total="0.01")

    async def _void(self) -> None:
        await self.org.void((await self._any()).id)

    async def _pay(self) -> None:
        await self.org.mark_paid((await self._any()).id)

    async def _write_off(self) -> None:
        await self.org.mark_uncollectible((await self._any()).id)

    async def _credit(self) -> None:
        invoice = await self._any()
        total = max(Decimal(invoice.total), CENT)
        part = self.chance.choice((Decimal(1), Decimal("0.4"), Decimal("0.1")))
        await self.org.credit(invoice.id, str(max((total * part).quantize(CENT), CENT)))


def rated(event_type: str, quantity: Decimal) -> Decimal:
    """By a rule of its own: per unit, rounded once, half away from zero."""
    return (quantity * Decimal(UNIT_AMOUNTS[event_type])).quantize(CENT, ROUND_HALF_UP)


async def check(world: World, org: Organization) -> None:
    """I5, I6 and I7, and the arithmetic of what is due and of credit."""

    async def wrong(statement: str) -> list[Any]:
        return [dict(row) for row in await world.admin.fetch(statement, org.org_id)]

    covers = await wrong(
        """
        SELECT cover.* FROM billing.snapshot_cover AS cover JOIN billing.invoice USING (org_id, invoice_id)
        WHERE org_id = $1 AND (status = 'void' OR NOT EXISTS (
            SELECT FROM billing.invoice_line AS line
            WHERE line.org_id = $1 AND line.invoice_id = cover.invoice_id AND cover.snapshot_id = ANY(line.snapshot_ids)
        ))
        """
    )
    assert covers == [], "I5: covered by a line of an invoice that is not void"
    lost = await wrong(
        """
        SELECT snapshot.* FROM billing.snapshot WHERE org_id = $1
        AND NOT EXISTS (SELECT FROM billing.snapshot_cover AS cover
                        WHERE cover.org_id = $1 AND cover.snapshot_id = snapshot.snapshot_id)
        IS DISTINCT FROM EXISTS (
            SELECT FROM billing.pending_use AS use
            WHERE use.org_id = $1 AND use.tenant_id = snapshot.tenant_id AND use.event_type = snapshot.event_type
              AND use.epoch = snapshot.epoch AND snapshot.day >= (use.period_start AT TIME ZONE 'UTC')::date
              AND snapshot.day < (use.period_end AT TIME ZONE 'UTC')::date)
        """
    )
    assert lost == [], "covered, or else pending"
    billed = await wrong(
        """
        SELECT event_type, sum(line.amount) AS billed, (
            SELECT coalesce(sum(snapshot.total), 0)
            FROM billing.snapshot JOIN billing.snapshot_cover USING (org_id, snapshot_id)
            WHERE org_id = $1 AND snapshot.tenant_id = line.tenant_id AND snapshot.event_type = line.event_type
              AND day >= (line.period_start AT TIME ZONE 'UTC')::date
              AND day < (line.period_end AT TIME ZONE 'UTC')::date
        ) AS covered
        FROM billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
        WHERE org_id = $1 AND invoice.status <> 'void'
        GROUP BY line.tenant_id, event_type, line.period_start, line.period_end
        """
    )
    # While the use of a void invoice is pending, a later line of its period stands for the whole use less that invoice.
    pending = await world.admin.fetchval("SELECT count(*) FROM billing.pending_use WHERE org_id = $1", org.org_id)
    if not pending:
        assert [each for each in billed if each["billed"] != rated(each["event_type"], each["covered"])] == [], "I6"
    unequal = await wrong(
        """
        SELECT number FROM billing.invoice AS invoice
        CROSS JOIN LATERAL (
            SELECT sum(amount) AS lines FROM billing.invoice_line
            WHERE org_id = $1 AND invoice_id = invoice.invoice_id
        ) AS line
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(total), 0) AS credited, coalesce(sum(amount_due_reduced), 0) AS reduced,
                   coalesce(sum(credit_granted), 0) AS granted
            FROM billing.credit_note WHERE org_id = $1 AND invoice_id = invoice.invoice_id
        ) AS note
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(amount) FILTER (WHERE credit_note_id IS NULL), 0) AS change,
                   coalesce(sum(amount) FILTER (WHERE credit_note_id IS NOT NULL), 0) AS noted
            FROM billing.credit_entry WHERE org_id = $1 AND invoice_id = invoice.invoice_id
        ) AS credit
        WHERE org_id = $1 AND (
            total <> lines + tax OR credited > greatest(total, 0) OR noted <> granted
            OR status = 'void' AND (change <> 0 OR credited <> 0)
            OR status <> 'void' AND total < 0 AND change <> -total
            OR status <> 'void' AND total >= 0 AND amount_due + amount_paid + reduced - change <> total
        )
        """
    )
    assert unequal == [], "I7, and what is due adds up"
    for series in ("invoice", "credit_note"):
        rows = await world.admin.fetch(f"SELECT number FROM billing.{series} ORDER BY number")
        assert [row["number"] for row in rows] == list(range(1, len(rows) + 1)), f"{series}s have no gap"
    below = await wrong(
        "SELECT tenant_id FROM billing.credit_entry WHERE org_id = $1 GROUP BY 1 HAVING sum(amount) < 0"
    )
    assert below == [], "credit is never below 0"


async def standing(world: World, org: Organization) -> dict[tuple[str, str, int], Decimal]:
    """What lines that are not void charge, by tenant, event type and month."""
    rows = await world.admin.fetch(
        """
        SELECT line.tenant_id, event_type, extract(month FROM line.period_start AT TIME ZONE 'UTC')::int AS month,
               sum(line.amount) AS amount
        FROM billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
        WHERE org_id = $1 AND invoice.status <> 'void' GROUP BY 1, 2, 3
        """,
        org.org_id,
    )
    return {(row["tenant_id"], row["event_type"], row["month"]): row["amount"] for row in rows}


async def settle(call: Awaitable[Any]) -> bool:
    """Whether it was done, and not refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert reason_of(error) == "FAILED_PRECONDITION"
        return False
    return True


@pytest.mark.parametrize("number", range(3))
async def test_whatever_happens_to_invoices_every_use_is_billed_once_to_the_cent(
    database: Database, number: int
) -> None:
    """I5, I6, I7."""
    seed = int(os.environ.get("USAMETER_HISTORY_SEED", random.SystemRandom().randrange(2**32))) + number
    print(f"seed: {seed}")  # noqa: T201 - pytest shows it where the test fails
    async with open_world(database, page_snapshots=None) as world, world.open_service() as channel:
        org = world.organization(channel)
        for event_type, unit_amount in UNIT_AMOUNTS.items():
            await org.set_price(event_type, unit_amount)
        for tenant, tax_rate in TAX_RATES.items():
            await org.set_settings(tenant, tax_rate=tax_rate)
        history = History(org, random.Random(seed))
        for step in itertools.count(1):
            await history.step()
            await check(world, org)
            assert await audit_billing(org.channel, org.metadata) == [], "no false alarm"
            if step >= STEPS and all(history.done[name] for name in ("void", "credit", "bill")):
                break
        rates = {subject: rated(subject[1], quantity) for subject, quantity in history.used.items()}
        expected = {subject: amount for subject, amount in rates.items() if amount}
        for tenant in TENANTS:
            await settle(org.bill(tenant, FEBRUARY))
        await check(world, org)
        charged = await standing(world, org)
        assert {subject: amount for subject, amount in charged.items() if amount} == expected
        # Whatever can be voided is, newest first, and billed again: the same, to the cent.
        voided = [await settle(org.void(each.id)) for each in await org.list() if each.status != invoice_pb2.void]
        await check(world, org)
        for tenant in TENANTS:
            await settle(org.bill(tenant, FEBRUARY))
        await check(world, org)
        charged = await standing(world, org)
        assert {subject: amount for subject, amount in charged.items() if amount} == expected
        assert any(voided)
