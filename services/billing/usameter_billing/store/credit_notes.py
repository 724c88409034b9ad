"""Credit notes: written once; whoever writes one has locked the account of its tenant."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.credit_notes import CreditedLine, CreditNote
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

_COLUMNS = """credit_note_id, number, invoice_id, tenant_id, currency, subtotal, tax, total, amount_due_reduced,
    credit_granted, reason, issued_at"""


async def take_number(connection: Connection, org_id: OrgId) -> int:
    """The organization's next number; others wait for it until the commit, and get it where this rolls back."""
    number: int = await connection.fetchval(
        """
        INSERT INTO billing.credit_note_number AS counter (org_id, last_number) VALUES ($1, 1)
        ON CONFLICT ON CONSTRAINT credit_note_number_pkey DO UPDATE SET last_number = counter.last_number + 1
        RETURNING last_number
        """,
        org_id,
    )
    return number


async def insert_credit_note(connection: Connection, org_id: OrgId, note: CreditNote) -> bool:
    """Write it with its lines; false where its id is taken, and nothing was written."""
    taken = await connection.fetchval(
        """
        INSERT INTO billing.credit_note
            (org_id, credit_note_id, number, invoice_id, tenant_id, currency, subtotal, tax, total,
             amount_due_reduced, credit_granted, reason, issued_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        ON CONFLICT ON CONSTRAINT credit_note_pkey DO NOTHING
        RETURNING true
        """,
        org_id,
        note.credit_note_id,
        note.number,
        note.invoice_id,
        note.tenant_id,
        note.currency,
        note.subtotal,
        note.tax,
        note.total,
        note.amount_due_reduced,
        note.credit_granted,
        note.reason,
        note.issued_at,
    )
    if not taken:
        return False
    await connection.execute(
        """
        INSERT INTO billing.credit_note_line (org_id, credit_note_id, position, line_id, amount, tax_rate)
        SELECT $1, $2, * FROM unnest($3::smallint[], $4::uuid[], $5::numeric[], $6::numeric[])
        """,
        org_id,
        note.credit_note_id,
        range(len(note.lines)),
        [line.line_id for line in note.lines],
        [line.amount for line in note.lines],
        [line.tax_rate for line in note.lines],
    )
    return True


async def load_credit_note(connection: Connection, org_id: OrgId, credit_note_id: UUID) -> CreditNote | None:
    """The credit note with this id."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM billing.credit_note WHERE org_id = $1 AND credit_note_id = $2", org_id, credit_note_id
    )
    return next(iter(await _with_lines(connection, org_id, rows)), None)


async def load_credit_notes_of(connection: Connection, org_id: OrgId, invoice_id: UUID) -> list[CreditNote]:
    """All credit notes on an invoice, oldest first."""
    rows = await connection.fetch(
        f"SELECT {_COLUMNS} FROM billing.credit_note WHERE org_id = $1 AND invoice_id = $2 ORDER BY number",
        org_id,
        invoice_id,
    )
    return await _with_lines(connection, org_id, rows)


async def list_credit_notes(
    connection: Connection,
    org_id: OrgId,
    *,
    tenant_id: str,
    invoice_id: UUID | None,
    before: int | None,
    limit: int,
) -> list[CreditNote]:
    """At most `limit`, newest first; empty filters pass all."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM billing.credit_note
        WHERE org_id = $1 AND ($2 = '' OR tenant_id = $2) AND ($3::uuid IS NULL OR invoice_id = $3)
          AND ($4::bigint IS NULL OR number < $4)
        ORDER BY number DESC LIMIT $5
        """,
        org_id,
        tenant_id,
        invoice_id,
        before,
        limit,
    )
    return await _with_lines(connection, org_id, rows)


async def _with_lines(connection: Connection, org_id: OrgId, rows: Sequence[asyncpg.Record]) -> list[CreditNote]:
    line_rows = await connection.fetch(
        """
        SELECT credit_note_id, line_id, amount, tax_rate FROM billing.credit_note_line
        WHERE org_id = $1 AND credit_note_id = ANY($2::uuid[])
        ORDER BY credit_note_id, position
        """,
        org_id,
        [row["credit_note_id"] for row in rows],
    )
    lines: dict[UUID, list[CreditedLine]] = defaultdict(list)
    for row in line_rows:
        lines[row["credit_note_id"]].append(CreditedLine(row["line_id"], row["amount"], row["tax_rate"]))
    return [CreditNote(lines=tuple(lines[row["credit_note_id"]]), **row) for row in rows]
