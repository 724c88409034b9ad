"""What an invoice was made of: the snapshots behind its lines."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection

# Epoch, event type, day: the order of the ledger within one tenant.
SnapshotKey = tuple[int, str, date]


@dataclass(frozen=True, slots=True)
class UsedSnapshot:
    """A snapshot that is a part of a line's quantity, and the invoice that covers it; None: none any more."""

    snapshot_id: UUID
    key: SnapshotKey
    invoice_id: UUID | None


async def list_used_snapshots(
    connection: Connection, org_id: OrgId, invoice_id: UUID, *, start: SnapshotKey | None, limit: int
) -> list[UsedSnapshot]:
    """Those of a draft's or an invoice's lines by key, from `start` on, inclusive."""
    epoch, event_type, day = start or (0, "", date.min)
    rows = await connection.fetch(
        """
        SELECT snapshot.snapshot_id, snapshot.epoch, line.event_type, snapshot.day,
               CASE WHEN snapshot.snapshot_id = ANY (line.snapshot_ids) THEN $2 ELSE cover.invoice_id END AS invoice_id
        FROM (
            SELECT tenant_id, through_epoch FROM billing.any_invoice
            WHERE org_id = $1 AND invoice_id = $2
            OFFSET 0
        ) AS invoice
        CROSS JOIN LATERAL (
            SELECT event_type, period_start, period_end, snapshot_ids FROM billing.any_line
            WHERE org_id = $1 AND invoice_id = $2 AND event_type IS NOT NULL
            OFFSET 0
        ) AS line
        CROSS JOIN LATERAL (
            SELECT snapshot_id, epoch, day FROM billing.snapshot
            WHERE org_id = $1 AND tenant_id = invoice.tenant_id AND event_type = line.event_type
              AND day >= (line.period_start AT TIME ZONE 'UTC')::date
              AND day < (line.period_end AT TIME ZONE 'UTC')::date
              AND epoch <= invoice.through_epoch
            OFFSET 0
        ) AS snapshot
        LEFT JOIN billing.snapshot_cover AS cover ON cover.org_id = $1 AND cover.snapshot_id = snapshot.snapshot_id
        WHERE (snapshot.epoch, line.event_type, snapshot.day) >= ($3::bigint, $4::text, $5::date)
        ORDER BY snapshot.epoch, line.event_type, snapshot.day
        LIMIT $6
        """,
        org_id,
        invoice_id,
        epoch,
        event_type,
        day,
        limit,
    )
    return [used_snapshot_from_row(row) for row in rows]


def used_snapshot_from_row(row: asyncpg.Record) -> UsedSnapshot:
    """The only reader of such a row."""
    return UsedSnapshot(row["snapshot_id"], (row["epoch"], row["event_type"], row["day"]), row["invoice_id"])
