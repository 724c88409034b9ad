"""Invoices: finalized ones are written once; reading takes drafts and finalized ones alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.invoice import DueInvoice, Invoice, InvoiceStatus, Parties, UseCharge
from usameter_billing.store.lines import NewLine, insert_lines
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# Of `any_invoice`; $2 is the present moment.
_COLUMNS = """invoice_id, number, tenant_id, status, currency, period_start, period_end, through_epoch,
    subtotal, tax, total, amount_due, amount_paid, status = 'open' AND due_at <= $2 AS overdue, issued_at, due_at,
    seller_name, bill_to_address, paid_at, payment_reference, voided_at, void_reason, uncollectible_at,
    uncollectible_reason, unpriced_event_types"""


@dataclass(frozen=True, slots=True)
class NewInvoice:
    """An invoice to be finalized.

    `line_ids` are those of its draft where its lines are the same; None: it gets new ones.
    """

    invoice_id: UUID
    invoice: DueInvoice
    line_ids: tuple[UUID, ...] | None
    amount_due: Decimal
    due_at: datetime
    parties: Parties


async def insert_invoices(
    connection: Connection,
    org_id: OrgId,
    invoices: Sequence[NewInvoice],
    *,
    through_epoch: int,
    issued_at: datetime,
) -> None:
    """Write finalized invoices with their lines and what they cover, under the next numbers, in order.

    Their date of issue is `issued_at`, or that of the number before where somebody was faster or has a clock that is
    ahead; they are due as much later.
    The transaction's last writes, and the numbers the last of them: others of the organization wait
    for these until the commit.
    """
    lines = [
        NewLine(new.invoice_id, position, line_id, new.invoice.tenant_id, line)
        for new in invoices
        for position, (line_id, line) in enumerate(
            zip(new.line_ids or [new_uuid() for _ in new.invoice.lines], new.invoice.lines, strict=True)
        )
    ]
    await insert_lines(connection, org_id, lines, table="invoice_line")
    await _cover_snapshots(connection, org_id, [new.invoice_id for new in invoices])
    await _delete_pending(connection, org_id, lines, through_epoch=through_epoch)
    await _enqueue_marks(connection, org_id, [new.invoice_id for new in invoices], billed_at=issued_at)
    await connection.execute(
        """
        WITH block AS (
            INSERT INTO billing.invoice_number AS counter (org_id, last_number, last_issued_at) VALUES ($1, $2, $4)
            ON CONFLICT ON CONSTRAINT invoice_number_pkey DO UPDATE
            SET last_number = counter.last_number + $2,
                last_issued_at = greatest(counter.last_issued_at, excluded.last_issued_at)
            RETURNING last_number - $2 AS before_first, last_issued_at AS issued_at
        )
        INSERT INTO billing.invoice
            (org_id, invoice_id, number, tenant_id, status, period_start, period_end, currency, through_epoch,
             subtotal, tax, total, amount_due, unpriced_event_types, issued_at, due_at, seller_name,
             bill_to_address, paid_at)
        SELECT $1, invoice_id, block.before_first + place, tenant_id,
               CASE WHEN amount_due = 0 THEN 'paid' ELSE 'open' END,
               period_start, period_end, currency, $3, subtotal, tax, subtotal + tax, amount_due,
               string_to_array(unpriced, ' '), block.issued_at, due_at + (block.issued_at - $4), seller_name,
               bill_to_address, CASE WHEN amount_due = 0 THEN block.issued_at END
        FROM block, unnest($5::uuid[], $6::text[], $7::timestamptz[], $8::timestamptz[], $9::text[], $10::numeric[],
                           $11::numeric[], $12::numeric[], $13::timestamptz[], $14::text[], $15::text[], $16::text[])
            WITH ORDINALITY
            AS new (invoice_id, tenant_id, period_start, period_end, currency, subtotal, tax, amount_due, due_at,
                    unpriced, seller_name, bill_to_address, place)
        """,
        org_id,
        len(invoices),
        through_epoch,
        issued_at,
        [new.invoice_id for new in invoices],
        [new.invoice.tenant_id for new in invoices],
        [new.invoice.period.start for new in invoices],
        [new.invoice.period.end for new in invoices],
        [new.invoice.currency for new in invoices],
        [new.invoice.subtotal for new in invoices],
        [new.invoice.tax for new in invoices],
        [new.amount_due for new in invoices],
        [new.due_at for new in invoices],
        # Event types hold no blanks (the contract's grammar).
        [" ".join(new.invoice.unpriced_event_types) for new in invoices],
        [new.parties.seller_name for new in invoices],
        [new.parties.bill_to_address for new in invoices],
    )


async def _cover_snapshots(connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]) -> None:
    # From the lines just written, since the ids need not travel twice. Without ON CONFLICT: a snapshot
    # that somebody covers already must fail the transaction (I5).
    await connection.execute(
        """
        INSERT INTO billing.snapshot_cover (org_id, snapshot_id, invoice_id)
        SELECT $1, snapshot_id, new.invoice_id
        FROM unnest($2::uuid[]) AS new (invoice_id)
        CROSS JOIN LATERAL (
            SELECT snapshot_ids FROM billing.invoice_line
            WHERE org_id = $1 AND invoice_id = new.invoice_id
            OFFSET 0
        ) AS line
        CROSS JOIN LATERAL unnest(line.snapshot_ids) AS snapshot_id
        """,
        org_id,
        invoice_ids,
    )


async def _delete_pending(
    connection: Connection, org_id: OrgId, lines: Sequence[NewLine], *, through_epoch: int
) -> None:
    uses = [(line, line.due.charge) for line in lines if isinstance(line.due.charge, UseCharge)]
    # Later epochs may have arrived meanwhile; they stay pending. By ctid, which cannot move: rows are never
    # updated, and only whoever holds the tenant's account deletes them. A join took 0.9 seconds a batch.
    await connection.execute(
        """
        DELETE FROM billing.pending_use
        WHERE org_id = $1 AND ctid = ANY (ARRAY(
            SELECT pending.ctid
            FROM unnest($2::text[], $3::timestamptz[], $4::text[]) AS line (tenant_id, period_start, event_type)
            CROSS JOIN LATERAL (
                SELECT ctid FROM billing.pending_use
                WHERE org_id = $1 AND tenant_id = line.tenant_id AND period_start = line.period_start
                  AND event_type = line.event_type AND epoch <= $5
                OFFSET 0
            ) AS pending
        ))
        """,
        org_id,
        [line.tenant_id for line, _ in uses],
        [line.due.period.start for line, _ in uses],
        [charge.event_type for _, charge in uses],
        through_epoch,
    )


async def _enqueue_marks(
    connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID], *, billed_at: datetime
) -> None:
    await connection.execute(
        """
        INSERT INTO billing.mark_outbox (org_id, invoice_id, billed_at, attempt_after)
        SELECT $1, invoice_id, $3, now() FROM unnest($2::uuid[]) AS invoice_id
        """,
        org_id,
        invoice_ids,
        billed_at,
    )


async def load_invoice(connection: Connection, org_id: OrgId, invoice_id: UUID, *, now: datetime) -> Invoice | None:
    """A draft or an invoice, without its lines."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM billing.any_invoice WHERE org_id = $1 AND invoice_id = $3", org_id, now, invoice_id
    )
    return None if row is None else invoice_from_row(row)


async def load_invoiced_until(connection: Connection, org_id: OrgId, tenant_id: str) -> datetime | None:
    """The end of the last period of which the tenant has an invoice that is not void; None: it has none."""
    until: datetime | None = await connection.fetchval(
        "SELECT max(period_end) FROM billing.invoice WHERE org_id = $1 AND tenant_id = $2 AND status <> 'void'",
        org_id,
        tenant_id,
    )
    return until


async def find_latest_invoice(connection: Connection, org_id: OrgId, *, tenant_id: str, period: Period) -> UUID | None:
    """The invoice finalized last for the tenant's period."""
    invoice_id: UUID | None = await connection.fetchval(
        """
        SELECT invoice_id FROM billing.invoice
        WHERE org_id = $1 AND tenant_id = $2 AND period_start = $3 AND status <> 'void'
        ORDER BY number DESC LIMIT 1
        """,
        org_id,
        tenant_id,
        period.start,
    )
    return invoice_id


async def list_invoices(
    connection: Connection,
    org_id: OrgId,
    *,
    now: datetime,
    tenant_id: str,
    status: InvoiceStatus | None,
    overdue: bool,
    period_start: datetime | None,
    period_ends_after: datetime | None,
    period_ends_by: datetime | None,
    before: UUID | None,
    limit: int,
) -> list[Invoice]:
    """At most `limit` drafts and invoices, newest first, without lines; empty filters pass all."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM billing.any_invoice
        WHERE org_id = $1 AND ($3 = '' OR tenant_id = $3) AND ($4::text IS NULL OR status = $4)
          AND (NOT $5 OR status = 'open' AND due_at <= $2)
          AND ($6::timestamptz IS NULL OR period_start = $6)
          AND ($7::timestamptz IS NULL OR period_end > $7) AND ($8::timestamptz IS NULL OR period_end <= $8)
          AND ($9::uuid IS NULL OR invoice_id < $9)
        ORDER BY invoice_id DESC LIMIT $10
        """,
        org_id,
        now,
        tenant_id,
        status,
        overdue,
        period_start,
        period_ends_after,
        period_ends_by,
        before,
        limit,
    )
    return [invoice_from_row(row) for row in rows]


def invoice_from_row(row: asyncpg.Record) -> Invoice:
    """The invoice in a row of `any_invoice`."""
    return Invoice(
        invoice_id=row["invoice_id"],
        number=row["number"],
        tenant_id=row["tenant_id"],
        status=InvoiceStatus(row["status"]),
        currency=row["currency"],
        period=Period(row["period_start"], row["period_end"]),
        through_epoch=row["through_epoch"],
        subtotal=row["subtotal"],
        tax=row["tax"],
        total=row["total"],
        amount_due=row["amount_due"],
        amount_paid=row["amount_paid"],
        overdue=bool(row["overdue"]),
        issued_at=row["issued_at"],
        due_at=row["due_at"],
        parties=None if row["number"] is None else Parties(row["seller_name"], row["bill_to_address"]),
        paid_at=row["paid_at"],
        payment_reference=row["payment_reference"],
        voided_at=row["voided_at"],
        void_reason=row["void_reason"],
        uncollectible_at=row["uncollectible_at"],
        uncollectible_reason=row["uncollectible_reason"],
        unpriced_event_types=tuple(row["unpriced_event_types"]),
    )
