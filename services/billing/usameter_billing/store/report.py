"""Sums over an organization's invoices."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import asyncpg

from usameter_billing.domain.report import CurrencyReport, ReportSum
from usameter_core.ids import OrgId
from usameter_core.period import Period

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# What each sum of the report adds up, and which invoices are in it. $4 is the present moment.
_SUMS = {
    "billed": ("total", "status NOT IN ('draft', 'void')"),
    "paid": ("amount_paid", "amount_paid > 0"),
    "pending": ("amount_due", "status = 'open'"),
    "overdue": ("amount_due", "status = 'open' AND due_at <= $4"),
    "uncollectible": ("amount_due", "status = 'uncollectible'"),
    "credit_drawn": ("drawn", "drawn > 0 AND status <> 'void'"),
    "void": ("total", "status = 'void'"),
    "draft": ("total", "status = 'draft'"),
}


async def load_report(
    connection: Connection, org_id: OrgId, *, starting_in: Period, now: datetime
) -> list[CurrencyReport]:
    """By currency code, the sums over invoices whose billing period starts within `starting_in`."""
    sums = ", ".join(
        f"coalesce(sum({amount}) FILTER (WHERE {which}), 0) AS {name}_amount, "
        f"count(*) FILTER (WHERE {which}) AS {name}_count"
        for name, (amount, which) in _SUMS.items()
    )
    rows = await connection.fetch(
        f"""
        WITH invoice AS (
            SELECT invoice.currency, invoice.status, invoice.total, invoice.amount_due, invoice.amount_paid,
                   invoice.due_at, -entry.amount AS drawn, note.amount AS credited, note.count AS notes
            FROM billing.any_invoice AS invoice
            LEFT JOIN billing.credit_entry AS entry
                ON entry.org_id = $1 AND coalesce(entry.credit_note_id, entry.invoice_id) = invoice.invoice_id
                AND entry.kind = 'DRAWN'
            LEFT JOIN (
                SELECT invoice_id, sum(total) AS amount, count(*) AS count FROM billing.credit_note
                WHERE org_id = $1 GROUP BY invoice_id
            ) AS note ON note.invoice_id = invoice.invoice_id
            WHERE invoice.org_id = $1 AND invoice.period_start >= $2 AND invoice.period_start < $3
        )
        SELECT currency, {sums}, coalesce(sum(credited), 0) AS credited_amount,
               coalesce(sum(notes), 0)::bigint AS credited_count
        FROM invoice GROUP BY currency ORDER BY currency
        """,
        org_id,
        starting_in.start,
        starting_in.end,
        now,
    )
    return [report_from_row(row) for row in rows]


def report_from_row(row: asyncpg.Record) -> CurrencyReport:
    """The sums of one currency."""
    names = (*_SUMS, "credited")
    sums = {name: ReportSum(row[f"{name}_amount"], row[f"{name}_count"]) for name in names}
    return CurrencyReport(row["currency"], **sums)
