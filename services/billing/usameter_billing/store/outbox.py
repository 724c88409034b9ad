"""What ingest has still to be told: which finalized invoice covers which snapshots, or covers them no longer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.invoice import Mark
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def claim_marks(connection: Connection, *, limit: int, retry_after: timedelta) -> list[Mark]:
    """The oldest marks that are due; nobody else gets them before `retry_after` has passed.

    So no lock is held while ingest is called, and what a worker fails to deliver comes up again.
    """
    rows = await connection.fetch(
        """
        WITH claimed AS (
            UPDATE billing.mark_outbox SET attempt_after = now() + $2
            WHERE (org_id, invoice_id) IN (
                SELECT org_id, invoice_id FROM billing.mark_outbox
                WHERE attempt_after <= now()
                ORDER BY attempt_after LIMIT $1 FOR UPDATE SKIP LOCKED
            )
            RETURNING org_id, invoice_id, version, billed_at
        )
        SELECT claimed.org_id, claimed.invoice_id, claimed.version, claimed.billed_at,
               line.snapshot_ids
        FROM claimed
        CROSS JOIN LATERAL (
            SELECT array_agg(snapshot_id) AS snapshot_ids
            FROM billing.invoice_line, unnest(snapshot_ids) AS snapshot_id
            WHERE org_id = claimed.org_id AND invoice_id = claimed.invoice_id
        ) AS line
        ORDER BY claimed.version
        """,
        limit,
        retry_after,
    )
    return [
        Mark(
            row["org_id"],
            row["invoice_id"],
            row["version"],
            row["billed_at"],
            # Null where no line of the invoice covers any.
            tuple(row["snapshot_ids"] or ()),
        )
        for row in rows
    ]


async def replace_mark(connection: Connection, org_id: OrgId, invoice_id: UUID) -> None:
    """Have ingest told that an invoice covers nothing any more, whether or not it heard that it did.

    Under a new version, which is higher than that of the invoice's own mark and lower than that of
    any invoice which covers the snapshots later: all three are made under the tenant's lock.
    """
    await connection.execute(
        """
        INSERT INTO billing.mark_outbox AS outbox (org_id, invoice_id, billed_at, attempt_after)
        VALUES ($1, $2, NULL, now())
        ON CONFLICT ON CONSTRAINT mark_outbox_pkey DO UPDATE
        SET version = DEFAULT, billed_at = excluded.billed_at, attempt_after = excluded.attempt_after
        """,
        org_id,
        invoice_id,
    )


async def delete_marks(connection: Connection, org_id: OrgId, marks: Sequence[Mark]) -> None:
    """Forget what was delivered; a mark that was replaced meanwhile stays."""
    await connection.execute(
        """
        DELETE FROM billing.mark_outbox AS outbox
        USING unnest($2::uuid[], $3::bigint[]) AS sent (invoice_id, version)
        WHERE outbox.org_id = $1 AND outbox.invoice_id = sent.invoice_id AND outbox.version = sent.version
        """,
        org_id,
        [mark.invoice_id for mark in marks],
        [mark.version for mark in marks],
    )
