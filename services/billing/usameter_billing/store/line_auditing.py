"""What the lines of invoices say beside what they were made of: snapshots, and the lines before them.

Rows are looked up one by one, by index, as generation does and for the same reason (`store.ledger`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.auditing import CountDifference, QuantityDifference, StrangeSnapshot
from usameter_billing.store.counted_lines import READABLE_LINES
from usameter_core.audit import VIOLATIONS_MAX
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# Of an organization $1 and invoices $2, whatever became of these.
_LINE = f"""
    line AS MATERIALIZED (
        SELECT line.invoice_id, line.line_id, line.tenant_id, line.event_type, line.period_start, line.period_end,
               line.price_id, line.quantity, line.subscription_id, line.plan_id, line.tax_rate,
               {READABLE_LINES} AS previously_billed, line.snapshot_ids, invoice.number, invoice.through_epoch
        FROM billing.invoice_line AS line JOIN billing.invoice AS invoice USING (org_id, invoice_id)
        WHERE line.org_id = $1 AND line.invoice_id = ANY($2::uuid[]) AND invoice.invoice_id = ANY($2::uuid[])
    )"""


async def list_quantity_differences(
    connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]
) -> list[QuantityDifference]:
    """Lines of a use whose quantity is not that of its snapshots; the first so many.

    Exactly those up to the invoice's `through_epoch` are counted, covered or not, whatever was void; they
    were all here then, and more of these epochs do not come.
    """
    rows = await connection.fetch(
        f"""
        WITH {_LINE}
        SELECT line.invoice_id, line.line_id, line.quantity, used.quantity AS used
        FROM line CROSS JOIN LATERAL (
            SELECT coalesce(sum(total), 0) AS quantity FROM billing.snapshot
            WHERE org_id = $1 AND tenant_id = line.tenant_id AND event_type = line.event_type
              AND day >= (line.period_start AT TIME ZONE 'UTC')::date
              AND day < (line.period_end AT TIME ZONE 'UTC')::date
              AND epoch <= line.through_epoch
            OFFSET 0
        ) AS used
        WHERE line.event_type IS NOT NULL AND line.quantity <> used.quantity
        ORDER BY line.number, line.line_id LIMIT $3
        """,
        org_id,
        invoice_ids,
        VIOLATIONS_MAX,
    )
    return [QuantityDifference(**dict(row)) for row in rows]


async def list_strange_snapshots(
    connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]
) -> list[StrangeSnapshot]:
    """Snapshots that lines cover and that are not of their use, or not here; the first so many."""
    rows = await connection.fetch(
        f"""
        WITH {_LINE}
        SELECT line.invoice_id, line.line_id, covered.snapshot_id
        FROM line CROSS JOIN LATERAL unnest(line.snapshot_ids) AS covered (snapshot_id)
        LEFT JOIN LATERAL (
            SELECT tenant_id, event_type, day, epoch FROM billing.snapshot
            WHERE org_id = $1 AND snapshot_id = covered.snapshot_id
            OFFSET 0
        ) AS snapshot ON true
        WHERE (
            snapshot.tenant_id = line.tenant_id AND snapshot.event_type = line.event_type
            AND snapshot.day >= (line.period_start AT TIME ZONE 'UTC')::date
            AND snapshot.day < (line.period_end AT TIME ZONE 'UTC')::date
            AND snapshot.epoch <= line.through_epoch
        ) IS NOT TRUE
        ORDER BY line.number, line.line_id, covered.snapshot_id LIMIT $3
        """,
        org_id,
        invoice_ids,
        VIOLATIONS_MAX,
    )
    return [StrangeSnapshot(**dict(row)) for row in rows]


async def list_count_differences(
    connection: Connection, org_id: OrgId, invoice_ids: Sequence[UUID]
) -> list[CountDifference]:
    """Where what lines count as billed before is not what was; the first so many.

    A line counts all lines of its subject on invoices with smaller numbers, once and with their amounts, but for those
    that were void then. Which is known only of those that are not void now: these must be counted, the others may.
    All that a line counts has its price and tax rate, since the first of them pins both.
    """
    rows = await connection.fetch(
        f"""
        WITH {_LINE}
        SELECT line.invoice_id, line.line_id, billed.*
        FROM line CROSS JOIN LATERAL (
            SELECT line_id AS counted_id, invoice_id AS counted_invoice_id, amount, earlier.is_void,
                   earlier.is_alike, coalesce(counted.times, 0) AS times_counted
            FROM (
                SELECT other.line_id, other.invoice_id, other.amount, invoice.is_void,
                       other.price_id IS NOT DISTINCT FROM line.price_id AND other.tax_rate = line.tax_rate AS is_alike
                FROM (
                    SELECT line_id, invoice_id, amount, price_id, tax_rate FROM billing.invoice_line
                    WHERE org_id = $1 AND tenant_id = line.tenant_id AND period_start = line.period_start
                      AND event_type IS NOT DISTINCT FROM line.event_type
                      AND subscription_id IS NOT DISTINCT FROM line.subscription_id
                      AND plan_id IS NOT DISTINCT FROM line.plan_id
                    OFFSET 0
                ) AS other
                CROSS JOIN LATERAL (
                    SELECT number, status = 'void' AS is_void FROM billing.invoice
                    WHERE org_id = $1 AND invoice_id = other.invoice_id
                    OFFSET 0
                ) AS invoice
                WHERE invoice.number < line.number
            ) AS earlier
            FULL JOIN (
                SELECT (each->>'line_id')::uuid AS line_id, (each->>'invoice_id')::uuid AS invoice_id,
                       (each->>'amount')::numeric AS amount, count(*) AS times
                FROM json_array_elements(line.previously_billed) AS each
                GROUP BY 1, 2, 3
            ) AS counted USING (line_id, invoice_id, amount)
        ) AS billed
        WHERE billed.is_void IS NULL OR billed.times_counted > 1 OR billed.times_counted = 0 AND NOT billed.is_void
           OR billed.times_counted > 0 AND NOT billed.is_alike
        ORDER BY line.number, line.line_id, billed.counted_id LIMIT $3
        """,
        org_id,
        invoice_ids,
        VIOLATIONS_MAX,
    )
    return [CountDifference(**dict(row)) for row in rows]
