"""Drafts: one per (tenant, period, currency), replaced as often as needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.invoice import DueInvoice, DueLine, FeeCharge, UseCharge
from usameter_billing.store.lines import NewLine, insert_lines
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# What a line is about: event type, price and quantity; or subscription, plan and seconds of a base fee.
Charge = tuple[str, UUID, Decimal] | tuple[UUID, UUID, int]
# All that can differ between two computations of one line; the rest follows from it.
LineContent = tuple[str, Period, Charge, Decimal, Decimal, Decimal, tuple[UUID, ...]]


@dataclass(frozen=True, slots=True)
class StoredDraft:
    """A draft as it was last computed."""

    invoice_id: UUID
    tenant_id: str
    currency: str
    line_ids: tuple[UUID, ...]
    contents: tuple[LineContent, ...]

    def holds(self, invoice: DueInvoice) -> bool:
        """Whether its lines are those of `invoice`."""
        return self.contents == tuple(content_of(line) for line in invoice.lines)


@dataclass(frozen=True, slots=True)
class NewDraft:
    """A draft to be written under `invoice_id`, new or known."""

    invoice_id: UUID
    invoice: DueInvoice
    lines_changed: bool


def content_of(line: DueLine) -> LineContent:
    """What a line says, for comparison."""
    return (
        line.kind.value,
        line.period,
        _charge_of(line.charge),
        line.tax_rate,
        line.rated_amount,
        line.amount,
        line.snapshot_ids,
    )


def _charge_of(charge: UseCharge | FeeCharge) -> Charge:
    match charge:
        case UseCharge(event_type, price, quantity):
            return event_type, price.price_id, quantity
        case FeeCharge(subscription_id, plan, seconds):
            return subscription_id, plan.plan_id, seconds


async def load_drafts(
    connection: Connection, org_id: OrgId, periods: Mapping[str, Period]
) -> dict[tuple[str, str], StoredDraft]:
    """The drafts of each tenant for its period in `periods`, by (tenant, currency)."""
    rows = await connection.fetch(
        """
        SELECT draft.invoice_id, draft.tenant_id, draft.currency, line.line_id, line.kind, line.period_start,
               line.period_end, line.event_type, line.price_id, line.quantity, line.subscription_id, line.plan_id,
               line.fee_seconds, line.tax_rate, line.rated_amount, line.amount, line.snapshot_ids
        FROM unnest($2::text[], $3::timestamptz[]) AS asked (tenant_id, period_start)
        JOIN billing.draft AS draft
          ON draft.org_id = $1 AND draft.tenant_id = asked.tenant_id AND draft.period_start = asked.period_start
        CROSS JOIN LATERAL (
            SELECT position, line_id, kind, period_start, period_end, event_type, price_id, quantity, subscription_id,
                   plan_id, fee_seconds, tax_rate, rated_amount, amount, snapshot_ids
            FROM billing.draft_line WHERE org_id = $1 AND invoice_id = draft.invoice_id
            OFFSET 0
        ) AS line
        ORDER BY draft.invoice_id, line.position
        """,
        org_id,
        list(periods),
        [period.start for period in periods.values()],
    )
    drafts: dict[tuple[str, str], StoredDraft] = {}
    for row in rows:
        key = (row["tenant_id"], row["currency"])
        known = drafts.get(key) or StoredDraft(row["invoice_id"], *key, (), ())
        content: LineContent = (
            row["kind"],
            Period(row["period_start"], row["period_end"]),
            (row["event_type"], row["price_id"], row["quantity"])
            if row["plan_id"] is None
            else (row["subscription_id"], row["plan_id"], row["fee_seconds"]),
            row["tax_rate"],
            row["rated_amount"],
            row["amount"],
            tuple(row["snapshot_ids"]),
        )
        drafts[key] = StoredDraft(known.invoice_id, *key, (*known.line_ids, row["line_id"]), (*known.contents, content))
    return drafts


async def save_drafts(connection: Connection, org_id: OrgId, drafts: Sequence[NewDraft], *, through_epoch: int) -> None:
    """Write drafts; lines that have not changed keep their rows and ids."""
    await connection.execute(
        """
        INSERT INTO billing.draft
            (org_id, invoice_id, tenant_id, period_start, period_end, currency, through_epoch,
             subtotal, tax, total, unpriced_event_types)
        SELECT $1, invoice_id, tenant_id, period_start, period_end, currency, $2,
               subtotal, tax, subtotal + tax, string_to_array(unpriced, ' ')
        FROM unnest($3::uuid[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::text[], $8::numeric[],
                    $9::numeric[], $10::text[])
            AS draft (invoice_id, tenant_id, period_start, period_end, currency, subtotal, tax, unpriced)
        ON CONFLICT ON CONSTRAINT draft_pkey DO UPDATE
        SET through_epoch = excluded.through_epoch, subtotal = excluded.subtotal, tax = excluded.tax,
            total = excluded.total, unpriced_event_types = excluded.unpriced_event_types
        """,
        org_id,
        through_epoch,
        [draft.invoice_id for draft in drafts],
        [draft.invoice.tenant_id for draft in drafts],
        [draft.invoice.period.start for draft in drafts],
        [draft.invoice.period.end for draft in drafts],
        [draft.invoice.currency for draft in drafts],
        [draft.invoice.subtotal for draft in drafts],
        [draft.invoice.tax for draft in drafts],
        # Event types hold no blanks (the contract's grammar).
        [" ".join(draft.invoice.unpriced_event_types) for draft in drafts],
    )
    changed = [draft for draft in drafts if draft.lines_changed]
    await _delete_lines(connection, org_id, [draft.invoice_id for draft in changed])
    lines = [
        NewLine(draft.invoice_id, position, new_uuid(), draft.invoice.tenant_id, line)
        for draft in changed
        for position, line in enumerate(draft.invoice.lines)
    ]
    await insert_lines(connection, org_id, lines, table="draft_line")


async def load_draft_periods(
    connection: Connection, org_id: OrgId, tenant_id: str, *, since: datetime
) -> list[tuple[UUID, Period]]:
    """The tenant's drafts of periods that start at `since` or later."""
    rows = await connection.fetch(
        """
        SELECT invoice_id, period_start, period_end FROM billing.draft
        WHERE org_id = $1 AND tenant_id = $2 AND period_start >= $3
        """,
        org_id,
        tenant_id,
        since,
    )
    return [(row["invoice_id"], Period(row["period_start"], row["period_end"])) for row in rows]


async def delete_drafts(connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]) -> None:
    """Remove drafts with their lines: finalized now, nothing is left of them, or their period is no more."""
    await _delete_lines(connection, org_id, invoice_ids)
    await connection.execute(
        "DELETE FROM billing.draft WHERE org_id = $1 AND invoice_id = ANY($2::uuid[])", org_id, invoice_ids
    )


async def _delete_lines(connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]) -> None:
    await connection.execute(
        "DELETE FROM billing.draft_line WHERE org_id = $1 AND invoice_id = ANY($2::uuid[])", org_id, invoice_ids
    )
