"""Drafting and finalizing for any number of tenants at once: the one way in which invoices come to be.

A single call is a batch of one tenant. All functions run inside a transaction of the caller's, in
this order: `assess`, which locks the tenants' accounts, then `save_drafts` or `finalize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_billing.domain.credit import CreditEntry, CreditKind
from usameter_billing.domain.invoice import DueInvoice, Parties
from usameter_billing.domain.invoicing import Assessment, PriceBook, Standing, compute_invoices, standing_uses
from usameter_billing.domain.settings import TenantSettings
from usameter_billing.domain.tiling import Tiling
from usameter_billing.store import accounts, credit, drafts, invoices, ledger, lines, prices, settings, subscriptions
from usameter_billing.store.drafts import StoredDraft
from usameter_core.decimals import CONTEXT
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import Period

if TYPE_CHECKING:
    from uuid import UUID

    from usameter_core.postgres.pool import Connection


@dataclass(frozen=True, slots=True)
class Generation:
    """What is due of some tenants, each for one of its periods, and the drafts that stand, as of `through_epoch`."""

    org_id: OrgId
    tenant_ids: Sequence[str]
    through_epoch: int
    # By tenant.
    periods: Mapping[str, Period]
    settings: Mapping[str, TenantSettings]
    assessments: Sequence[Assessment]
    # By (tenant, currency); of the same periods.
    drafts: Mapping[tuple[str, str], StoredDraft]

    @property
    def invoices(self) -> list[DueInvoice]:
        """Of all tenants, by tenant and currency."""
        return [invoice for assessment in self.assessments for invoice in assessment.invoices]

    def draft_of(self, invoice: DueInvoice) -> StoredDraft | None:
        """The draft that `invoice` refreshes."""
        return self.drafts.get((invoice.tenant_id, invoice.currency))


async def assess(
    connection: Connection, org_id: OrgId, *, tenant_ids: Sequence[str], period_of: Callable[[Tiling], Period]
) -> Generation:
    """Lock the tenants' accounts and compute what they owe from all that was pulled.

    `period_of` picks the period to be invoiced from those of a tenant, as they are under the lock.
    """
    await accounts.lock_accounts(connection, org_id, tenant_ids)
    through_epoch = await ledger.load_through_epoch(connection, org_id)
    held = await subscriptions.load_subscriptions(connection, org_id, tenant_ids)
    periods = {tenant_id: period_of(Tiling(held.get(tenant_id, ()))) for tenant_id in tenant_ids}
    standing = [
        (tenant_id, event_type, period)
        for tenant_id, each in held.items()
        for event_type, period in standing_uses(each, through=periods[tenant_id])
    ]
    uses = await ledger.load_uses(connection, org_id, periods=periods, standing=standing, through_epoch=through_epoch)
    event_types = {use.event_type for of_tenant in uses.values() for use in of_tenant}
    versions = await prices.load_prices(connection, org_id, event_types=sorted(event_types), tenant_ids=tenant_ids)
    plans = {phase.plan.plan_id: phase.plan for each in held.values() for one in each for phase in one.phases}
    book = PriceBook([*versions, *(price for plan in plans.values() for price in plan.prices)])
    fees = await lines.load_billed_fees(connection, org_id, list(held))
    of_tenants = await settings.load_settings(connection, org_id, tenant_ids)
    return Generation(
        org_id,
        tenant_ids,
        through_epoch,
        periods,
        of_tenants,
        [
            compute_invoices(
                tenant_id,
                of_tenant,
                period=periods[tenant_id],
                prices=book,
                standing=Standing(held.get(tenant_id, ()), fees.get(tenant_id, ()), of_tenants[tenant_id].tax_rate),
            )
            for tenant_id, of_tenant in uses.items()
        ],
        await drafts.load_drafts(connection, org_id, periods),
    )


async def save_drafts(connection: Connection, generation: Generation) -> dict[tuple[str, str], UUID]:
    """Bring every draft up to date, drop those of which nothing is left; ids by (tenant, currency)."""
    refreshed = []
    for invoice in generation.invoices:
        draft = generation.draft_of(invoice)
        refreshed.append(
            drafts.NewDraft(
                draft.invoice_id if draft else new_uuid(),
                invoice,
                lines_changed=draft is None or not draft.holds(invoice),
            )
        )
    await drafts.save_drafts(connection, generation.org_id, refreshed, through_epoch=generation.through_epoch)
    await _drop_drafts(connection, generation, kept={draft.invoice_id for draft in refreshed})
    return {(draft.invoice.tenant_id, draft.invoice.currency): draft.invoice_id for draft in refreshed}


async def finalize(
    connection: Connection,
    generation: Generation,
    due: Sequence[DueInvoice],
    *,
    issued_at: datetime,
    default_due: timedelta,
    seller_name: str,
) -> None:
    """Issue the invoices in `due`, under the ids of their drafts where they have one.

    Credit: a negative total is granted, a positive one draws on what there is. `default_due` is the time to pay
    of tenants whose settings say none. What documents print of seller and tenant is frozen with each.
    """
    balances = await credit.load_credit(connection, generation.org_id, generation.tenant_ids)
    issued, entries, replaced = [], [], []
    for invoice in due:
        draft = generation.draft_of(invoice)
        invoice_id = draft.invoice_id if draft else new_uuid()
        total = invoice.total
        drawn = min(max(total, Decimal(0)), balances.get((invoice.tenant_id, invoice.currency), Decimal(0)))
        change = CONTEXT.minus(drawn if total > 0 else total)
        if change:
            kind = CreditKind.DRAWN if total > 0 else CreditKind.GRANTED
            entries.append(
                CreditEntry(new_uuid(), invoice.tenant_id, invoice.currency, kind, change, invoice_id, None, issued_at)
            )
        if draft:
            replaced.append(draft.invoice_id)
        line_ids = draft.line_ids if draft and draft.holds(invoice) else None
        held = generation.settings[invoice.tenant_id]
        due_at = issued_at + (default_due if held.due_days is None else timedelta(days=held.due_days))
        parties = Parties(seller_name, held.address)
        amount_due = CONTEXT.subtract(max(total, Decimal(0)), drawn)
        issued.append(invoices.NewInvoice(invoice_id, invoice, line_ids, amount_due, due_at, parties))
    await drafts.delete_drafts(connection, generation.org_id, replaced)
    if entries:
        await credit.add_entries(connection, generation.org_id, entries)
    if issued:
        await invoices.insert_invoices(
            connection,
            generation.org_id,
            issued,
            through_epoch=generation.through_epoch,
            issued_at=issued_at,
        )


async def _drop_drafts(connection: Connection, generation: Generation, *, kept: set[UUID]) -> None:
    stale = [draft.invoice_id for draft in generation.drafts.values() if draft.invoice_id not in kept]
    if stale:
        await drafts.delete_drafts(connection, generation.org_id, stale)
