"""The audit of the invoices: what is billed beside what was used, and what is stored of it beside itself."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.clients import IngestClient
from usameter_billing.domain.auditing import (
    Audited,
    AuditPlace,
    BilledFeeSum,
    BilledUse,
    CountDifference,
    CoverDifference,
    NegativeCredit,
    OrphanEntry,
    QuantityDifference,
    Stage,
    StrangeSnapshot,
)
from usameter_billing.domain.invoice import Snapshot
from usameter_billing.domain.invoice_auditing import (
    line_place,
    line_violations,
    money_violations,
    note_number_violations,
    number_violations,
    total_violations,
)
from usameter_billing.store import auditing as store
from usameter_billing.store import line_auditing as line_store
from usameter_billing.store import money_auditing as money_store
from usameter_billing.store.ledger import load_snapshots, load_through_epoch
from usameter_core.audit import VIOLATIONS_MAX, Violation, report_violations
from usameter_core.decimals import canonical
from usameter_core.ids import OrgId, format_id
from usameter_proof.pricing import PriceVersion
from usameter_proof.rating import due_amount

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

# Some seconds of work a page at most, unless one epoch is larger: it is not divided.
SNAPSHOTS_MAX = 20_000
TENANTS_MAX = 100
INVOICES_MAX = 500


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
        negative = await money_store.list_negative_credit(connection, org_id, tenant_ids)
        found += [_credit_violation(each) for each in negative]
        orphans = await money_store.list_orphan_entries(connection, org_id, tenant_ids)
        found += [_orphan_violation(each) for each in orphans]
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
            found += number_violations(number + 1, invoice.number)
            found += total_violations(invoice)
            for line in invoice.lines:
                found += line_violations(invoice, line, prices, plans)
            number = invoice.number
        ids = [invoice.invoice_id for invoice in invoices]
        money = await money_store.load_invoice_money(connection, org_id, ids)
        found += [violation for each in money.values() for violation in money_violations(each)]
        quantities = await line_store.list_quantity_differences(connection, org_id, ids)
        found += [_quantity_violation(each) for each in quantities]
        found += [_strange_violation(each) for each in await line_store.list_strange_snapshots(connection, org_id, ids)]
        found += [_count_violation(each) for each in await line_store.list_count_differences(connection, org_id, ids)]
        if len(invoices) == self._invoices_max:
            return Audited(len(invoices), found, AuditPlace(Stage.INVOICES, number=number))
        found += note_number_violations(await money_store.load_note_numbers(connection, org_id))
        last = await store.load_last_number(connection, org_id)
        if last > number:
            found += number_violations(number + 1, last + 1)
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


def _credit_violation(credit: NegativeCredit) -> Violation:
    problem = "a tenant's credit is below 0"
    return Violation("I7", problem, "0 or more", canonical(credit.balance), {"tenant_id": credit.tenant_id})


def _orphan_violation(entry: OrphanEntry) -> Violation:
    return Violation(
        "I7",
        "no invoice or credit note made an entry of a tenant's credit",
        "none",
        f"{canonical(entry.amount)} {entry.currency}",
        {"tenant_id": entry.tenant_id, "invoice_id": format_id("inv", entry.invoice_id)},
    )


def _quantity_violation(difference: QuantityDifference) -> Violation:
    """I6: what was rated is what was used."""
    return Violation(
        "I6",
        "a line's quantity is not that of its snapshots",
        canonical(difference.used),
        canonical(difference.quantity),
        line_place(difference.invoice_id, difference.line_id),
    )


def _strange_violation(strange: StrangeSnapshot) -> Violation:
    """I5: a line covers snapshots of its own use."""
    return Violation(
        "I5",
        "a line covers a snapshot that is not of its use",
        "of its tenant, type, period and epochs",
        "another, or none that is here",
        {
            **line_place(strange.invoice_id, strange.line_id),
            "snapshot_id": format_id("snp", strange.snapshot_id),
        },
    )


def _count_violation(difference: CountDifference) -> Violation:
    """I6: what a line takes off was billed before it."""
    counted = "a line without an id" if difference.counted_id is None else format_id("lin", difference.counted_id)
    amount = "no amount" if difference.amount is None else canonical(difference.amount)
    found = f"counted {difference.times_counted} times"
    if difference.is_void is None:
        expected = "no such line before it"
    elif difference.times_counted == 1:
        expected, found = "of one price and tax rate", "of another"
    else:
        expected = "counted at most once" if difference.is_void else "counted once"
    return Violation(
        "I6",
        "what a line counts as billed is not what was billed before it",
        f"{counted}, {amount}: {expected}",
        f"{counted}, {amount}: {found}",
        line_place(difference.invoice_id, difference.line_id),
    )


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
