"""The audit of the invoices: what is billed beside what was used, and what is stored of it beside itself."""

from __future__ import annotations

import asyncio
import decimal
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.clients import IngestClient
from usameter_billing.domain.auditing import (
    Audited,
    AuditPlace,
    BilledFeeSum,
    BilledUse,
    CoverDifference,
    Stage,
    StoredInvoice,
    StoredLine,
)
from usameter_billing.domain.invoice import Snapshot
from usameter_billing.domain.plan import Plan
from usameter_billing.store import auditing as store
from usameter_billing.store.ledger import load_snapshots, load_through_epoch
from usameter_core.audit import VIOLATIONS_MAX, Violation, report_violations
from usameter_core.decimals import CONTEXT, canonical
from usameter_core.ids import OrgId, format_id
from usameter_proof.pricing import PriceVersion
from usameter_proof.rating import due_amount, prorated_fee, tax_amount

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

# Some seconds of work a page at most, unless one epoch is larger: it is not divided.
SNAPSHOTS_MAX = 20_000
TENANTS_MAX = 100
INVOICES_MAX = 500

_ZERO = Decimal(0)


class InvoiceAudits:
    """Compares an organization's invoices with its use and with themselves, a page at a time.

    A page reads what it compares at one moment, so that what is finalized or voided meanwhile is either in all of it or
    in none. In memory is one page.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        ingest: IngestClient,
        snapshots_max: int = SNAPSHOTS_MAX,
        tenants_max: int = TENANTS_MAX,
        invoices_max: int = INVOICES_MAX,
    ) -> None:
        self._pool = pool
        self._ingest = ingest
        self._snapshots_max = snapshots_max
        self._tenants_max = tenants_max
        self._invoices_max = invoices_max
        # Of the pool's connections audits have one at a time, whoever asks for them.
        self._turn = asyncio.Lock()

    async def audit(self, org_id: OrgId, place: AuditPlace) -> Audited:
        """Compare the next page.

        Raises:
            Unavailable: Ingest or the database cannot be reached. A retry is safe.
        """
        async with self._turn, store.open_moment(self._pool) as connection:
            match place.stage:
                case Stage.LEDGER:
                    audited = await self._audit_ledger(connection, org_id, place)
                case Stage.TENANTS:
                    audited = await self._audit_tenants(connection, org_id, place)
                case Stage.INVOICES:
                    audited = await self._audit_invoices(connection, org_id, place)
        report_violations(org_id, audited.violations)
        return audited

    async def _audit_ledger(self, connection: Connection, org_id: OrgId, place: AuditPlace) -> Audited:
        """I5: each sealed snapshot is here as ingest has it, up to the epoch that was pulled, and no other is."""
        pulled = await load_through_epoch(connection, org_id)
        checked = missing = 0
        found: list[Violation] = []
        through, begun = pulled, place.epoch + 1
        async for page in self._ingest.snapshot_pages(org_id, after_epoch=place.epoch):
            if page.through_epoch < pulled and not place.epoch and not checked:
                problem = "epochs were pulled that the ledger does not have"
                found.append(Violation("I5", problem, f"through {page.through_epoch}", f"through {pulled}"))
            theirs = [each for each in page.snapshots if each.epoch <= pulled]
            ends = page.is_last or len(theirs) < len(page.snapshots)
            # The last epoch on a page may go on with the next one: the next call begins with it, unless this one has.
            if not ends and checked + len(theirs) >= self._snapshots_max and theirs[-1].epoch > begun:
                through, ends = theirs[-1].epoch - 1, True
                theirs = [each for each in theirs if each.epoch <= through]
            ours = await load_snapshots(connection, org_id, [each.snapshot_id for each in theirs])
            found += _copy_violations(theirs, ours)
            checked += len(theirs)
            missing += len(theirs) - len(ours)
            if ends:
                break
            begun = theirs[-1].epoch
        here = await store.count_snapshots(connection, org_id, after_epoch=place.epoch, through_epoch=through)
        if here != checked - missing:
            problem = "snapshots are here that the ledger does not have"
            found.append(Violation("I5", problem, str(checked - missing), str(here), {"epoch": through}))
        next_place = AuditPlace(Stage.TENANTS) if through == pulled else AuditPlace(epoch=through)
        return Audited(checked, found[:VIOLATIONS_MAX], next_place)

    async def _audit_tenants(self, connection: Connection, org_id: OrgId, place: AuditPlace) -> Audited:
        tenant_ids = await store.list_tenants(connection, org_id, after=place.tenant_id, limit=self._tenants_max)
        found = [_cover_violation(each) for each in await store.list_cover_differences(connection, org_id, tenant_ids)]
        lost = await store.list_lost_snapshots(connection, org_id, tenant_ids)
        found += [_lost_violation(each) for each in (await load_snapshots(connection, org_id, lost)).values()]
        uses = await store.load_billed_uses(connection, org_id, tenant_ids)
        prices = await store.load_audited_prices(connection, org_id, [use.price_id for use in uses if use.price_id])
        found += [violation for use in uses for violation in _use_violations(use, prices)]
        found += [_fee_violation(each) for each in await store.list_fee_differences(connection, org_id, tenant_ids)]
        next_place = AuditPlace(Stage.INVOICES)
        if len(tenant_ids) == self._tenants_max:
            next_place = AuditPlace(Stage.TENANTS, tenant_id=tenant_ids[-1])
        return Audited(len(uses), found, next_place)

    async def _audit_invoices(self, connection: Connection, org_id: OrgId, place: AuditPlace) -> Audited:
        invoices = await store.list_stored_invoices(connection, org_id, after=place.number, limit=self._invoices_max)
        lines = [line for invoice in invoices for line in invoice.lines]
        prices = await store.load_audited_prices(connection, org_id, [line.price_id for line in lines if line.price_id])
        plans = await store.load_audited_plans(connection, org_id, [line.plan_id for line in lines if line.plan_id])
        found: list[Violation] = []
        number = place.number
        for invoice in invoices:
            found += _number_violations(number + 1, invoice.number)
            found += _total_violations(invoice)
            for line in invoice.lines:
                found += _line_violations(invoice, line, prices, plans)
            number = invoice.number
        if len(invoices) == self._invoices_max:
            return Audited(len(invoices), found, AuditPlace(Stage.INVOICES, number=number))
        last = await store.load_last_number(connection, org_id)
        if last > number:
            found += _number_violations(number + 1, last + 1)
        elif last < number:
            found.append(Violation("I7", "a number was not counted", str(number), str(last)))
        return Audited(len(invoices), found, None)


def _copy_violations(theirs: Sequence[Snapshot], ours: Mapping[UUID, Snapshot]) -> Iterator[Violation]:
    for snapshot in theirs:
        ours_of = ours.get(snapshot.snapshot_id)
        if ours_of != snapshot:
            problem = "the copy of a snapshot is not as the ledger has it"
            found = "nothing" if ours_of is None else _shown(ours_of)
            yield Violation("I5", problem, _shown(snapshot), found, _place_of(snapshot))


def _cover_violation(difference: CoverDifference) -> Violation:
    """I5: a snapshot is counted once, by the one invoice that covers it."""
    return Violation(
        "I5",
        "what an invoice covers is not what its lines count",
        "covered and counted once, or neither",
        f"{'covered' if difference.is_covered else 'not covered'}, counted {difference.times_counted} times",
        {
            "snapshot_id": format_id("snp", difference.snapshot_id),
            "invoice_id": format_id("inv", difference.invoice_id),
        },
    )


def _lost_violation(snapshot: Snapshot) -> Violation:
    return Violation("I6", "use is neither covered nor pending", "one of both", "neither", _place_of(snapshot))


def _use_violations(use: BilledUse, prices: Mapping[UUID, PriceVersion | None]) -> Iterator[Violation]:
    """I6: the lines add up to what was last due; where all of the period's use is covered, that is its rating."""
    if use.billed is None or use.last_due is None:
        return
    due, problem = use.last_due, "the lines of a period do not add up to what was last due of it"
    version = None if use.price_id is None else prices.get(use.price_id)
    # Where there is none, its line says so.
    if use.is_covered and version is not None:
        due = due_amount(version.price, use.quantity, subscribed=version.plan_id is not None)
        problem = "the lines of a period do not add up to the rating of its use"
    if due != use.billed:
        yield Violation(
            "I6",
            problem,
            canonical(due),
            canonical(use.billed),
            {
                "tenant_id": use.tenant_id,
                "event_type": use.event_type,
                "period_start": use.period_start.date().isoformat(),
            },
        )


def _fee_violation(fee: BilledFeeSum) -> Violation:
    """I6, of a base fee."""
    return Violation(
        "I6",
        "the lines of a base fee do not add up to what is due of it",
        canonical(fee.due),
        canonical(fee.billed),
        {
            "tenant_id": fee.tenant_id,
            "subscription_id": format_id("sub", fee.subscription_id),
            "period_start": fee.period_start.date().isoformat(),
        },
    )


def _number_violations(expected: int, found: int) -> Iterator[Violation]:
    """I7: no number is left out. Unique they are by a key of the table."""
    if expected != found:
        missing = f"{expected}" if found == expected + 1 else f"{expected} to {found - 1}"
        yield Violation("I7", "a number is missing", f"invoice {missing}", "none")


def _total_violations(invoice: StoredInvoice) -> Iterator[Violation]:
    """I7: the total is lines and tax."""
    by_rate: dict[Decimal, Decimal] = {}
    for line in invoice.lines:
        by_rate[line.tax_rate] = CONTEXT.add(by_rate.get(line.tax_rate, _ZERO), line.amount)
    with decimal.localcontext(CONTEXT):
        subtotal = sum(by_rate.values(), _ZERO)
        tax = sum((tax_amount(amount, rate, invoice.currency) for rate, amount in by_rate.items()), _ZERO)
    place = {"invoice_id": format_id("inv", invoice.invoice_id)}
    for problem, expected, found in (
        ("an invoice's subtotal is not the sum of its lines", subtotal, invoice.subtotal),
        ("an invoice's tax is not that of its lines", tax, invoice.tax),
        ("an invoice's total is not subtotal and tax", CONTEXT.add(invoice.subtotal, invoice.tax), invoice.total),
    ):
        if expected != found:
            yield Violation("I7", problem, canonical(expected), canonical(found), place)


def _line_violations(
    invoice: StoredInvoice, line: StoredLine, prices: Mapping[UUID, PriceVersion | None], plans: Mapping[UUID, Plan]
) -> Iterator[Violation]:
    """I7: a line's amounts follow from its price and quantity, or from its plan and seconds."""
    place = {
        "invoice_id": format_id("inv", invoice.invoice_id),
        "line_id": format_id("lin", line.line_id),
    }
    rated = _rated_amount(line, prices, plans)
    if line.price_id in prices and prices[line.price_id] is None:
        yield Violation("I7", "a line's price is none", "a price", "terms that describe none", place)
    elif rated is None:
        yield Violation("I7", "a line's price or plan is missing", "one", "none", place)
    elif rated != line.rated_amount:
        problem = "a line's rated amount is not that of its price and quantity"
        yield Violation("I7", problem, canonical(rated), canonical(line.rated_amount), place)
    amount = CONTEXT.subtract(line.rated_amount, line.previously_billed)
    if amount != line.amount:
        problem = "a line's amount is not what is due less what was billed"
        yield Violation("I7", problem, canonical(amount), canonical(line.amount), place)


def _rated_amount(
    line: StoredLine, prices: Mapping[UUID, PriceVersion | None], plans: Mapping[UUID, Plan]
) -> Decimal | None:
    """None where the price or the plan is not there, or is none."""
    if line.price_id is not None and line.quantity is not None:
        version = prices.get(line.price_id)
        if version is None:
            return None
        return due_amount(version.price, line.quantity, subscribed=version.plan_id is not None)
    plan = None if line.plan_id is None else plans.get(line.plan_id)
    if plan is None or line.fee_seconds is None:
        return None
    return prorated_fee(plan.base_fee, plan.currency, seconds=line.fee_seconds, interval_seconds=line.period.seconds)


def _place_of(snapshot: Snapshot) -> dict[str, str | int]:
    return {
        "snapshot_id": format_id("snp", snapshot.snapshot_id),
        "epoch": snapshot.epoch,
        "tenant_id": snapshot.tenant_id,
        "event_type": snapshot.event_type,
        "day": snapshot.day.isoformat(),
    }


def _shown(snapshot: Snapshot) -> str:
    key = f"epoch {snapshot.epoch}, {snapshot.tenant_id}, {snapshot.event_type}, {snapshot.day}"
    return f"{key}: {snapshot.entry_count} entries, {canonical(snapshot.total)}, {snapshot.root.hex()}"
