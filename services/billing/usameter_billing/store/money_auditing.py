"""What became of invoices beside what was credited on them, and the credit of their tenants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.auditing import InvoiceMoney, NegativeCredit, NoteNumbers, OrphanEntry
from usameter_core.audit import VIOLATIONS_MAX
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def load_invoice_money(
    connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]
) -> dict[UUID, InvoiceMoney]:
    """Of each invoice; entries and credit notes of another tenant or currency are not among its own."""
    rows = await connection.fetch(
        """
        SELECT invoice.invoice_id, invoice.status = 'void' AS is_void, invoice.subtotal, invoice.tax, invoice.total,
               invoice.amount_due, invoice.amount_paid, own.credit_change, note.*
        FROM billing.invoice AS invoice
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(amount), 0) AS credit_change FROM billing.credit_entry
            WHERE org_id = $1 AND coalesce(credit_note_id, invoice_id) = invoice.invoice_id
              AND tenant_id = invoice.tenant_id AND currency = invoice.currency
            OFFSET 0
        ) AS own
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(note.subtotal), 0) AS credited_subtotal, coalesce(sum(note.tax), 0) AS credited_tax,
                   coalesce(sum(note.total), 0) AS credited, coalesce(sum(note.amount_due_reduced), 0) AS reduced,
                   count(*) FILTER (WHERE note.credit_granted <> entry.granted) AS notes_not_granted,
                   count(*) FILTER (WHERE note.subtotal <> line.subtotal) AS notes_not_of_lines
            FROM billing.credit_note AS note
            CROSS JOIN LATERAL (
                SELECT coalesce(sum(amount), 0) AS granted FROM billing.credit_entry
                WHERE org_id = $1 AND coalesce(credit_note_id, invoice_id) = note.credit_note_id
                  AND tenant_id = invoice.tenant_id AND currency = invoice.currency
                OFFSET 0
            ) AS entry
            CROSS JOIN LATERAL (
                -- Null where the credit note was made by amount.
                SELECT sum(amount) AS subtotal FROM billing.credit_note_line
                WHERE org_id = $1 AND credit_note_id = note.credit_note_id
                OFFSET 0
            ) AS line
            WHERE note.org_id = $1 AND note.invoice_id = invoice.invoice_id
              AND note.tenant_id = invoice.tenant_id AND note.currency = invoice.currency
            OFFSET 0
        ) AS note
        WHERE invoice.org_id = $1 AND invoice.invoice_id = ANY($2::uuid[])
        """,
        org_id,
        invoice_ids,
    )
    return {row["invoice_id"]: InvoiceMoney(**dict(row)) for row in rows}


async def list_negative_credit(
    connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]
) -> list[NegativeCredit]:
    """Credit of the tenants that is below 0; the first so much."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, currency, sum(amount) AS balance FROM billing.credit_entry
        WHERE org_id = $1 AND tenant_id = ANY($2::text[])
        GROUP BY tenant_id, currency HAVING sum(amount) < 0
        ORDER BY tenant_id, currency LIMIT $3
        """,
        org_id,
        tenant_ids,
        VIOLATIONS_MAX,
    )
    return [NegativeCredit(**dict(row)) for row in rows]


async def list_orphan_entries(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> list[OrphanEntry]:
    """Entries of the tenants' credit that no invoice or credit note of the same tenant and currency made."""
    rows = await connection.fetch(
        """
        SELECT entry.tenant_id, entry.invoice_id, entry.currency, entry.amount
        FROM billing.credit_entry AS entry
        LEFT JOIN billing.invoice AS invoice
            ON invoice.org_id = entry.org_id AND invoice.invoice_id = entry.invoice_id
            AND invoice.tenant_id = entry.tenant_id AND invoice.currency = entry.currency
        LEFT JOIN billing.credit_note AS note
            ON note.org_id = entry.org_id AND note.credit_note_id = entry.credit_note_id
            AND note.invoice_id = entry.invoice_id
        WHERE entry.org_id = $1 AND entry.tenant_id = ANY($2::text[])
          AND (invoice.invoice_id IS NULL OR entry.credit_note_id IS NOT NULL AND note.credit_note_id IS NULL)
        ORDER BY entry.tenant_id, entry.entry_id LIMIT $3
        """,
        org_id,
        tenant_ids,
        VIOLATIONS_MAX,
    )
    return [OrphanEntry(**dict(row)) for row in rows]


async def load_note_numbers(connection: Connection, org_id: OrgId) -> NoteNumbers:
    """Of the organization's credit notes; they are unique by a key of the table."""
    row = await connection.fetchrow(
        """
        SELECT count(*) AS notes, coalesce(min(number), 1) AS first, coalesce(max(number), 0) AS last,
               coalesce((SELECT last_number FROM billing.credit_note_number WHERE org_id = $1), 0) AS counted
        FROM billing.credit_note WHERE org_id = $1
        """,
        org_id,
    )
    assert row is not None
    return NoteNumbers(**dict(row))
