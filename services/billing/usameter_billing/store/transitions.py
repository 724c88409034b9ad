"""What became of finalized invoices: the only columns of an invoice that change. The tenant's account is locked."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def save_void(
    connection: Connection, org_id: OrgId, invoice_id: UUID, *, reason: str, voided_at: datetime
) -> None:
    """Nothing of it is due any more, for ever."""
    await connection.execute(
        """
        UPDATE billing.invoice SET status = 'void', amount_due = 0, voided_at = $3, void_reason = $4
        WHERE org_id = $1 AND invoice_id = $2
        """,
        org_id,
        invoice_id,
        voided_at,
        reason,
    )


async def save_paid(
    connection: Connection, org_id: OrgId, invoice_id: UUID, *, reference: str | None, paid_at: datetime
) -> None:
    """All that was due has been received."""
    await connection.execute(
        """
        UPDATE billing.invoice
        SET status = 'paid', amount_paid = amount_due, amount_due = 0, paid_at = $3, payment_reference = $4
        WHERE org_id = $1 AND invoice_id = $2
        """,
        org_id,
        invoice_id,
        paid_at,
        reference,
    )


async def save_uncollectible(
    connection: Connection, org_id: OrgId, invoice_id: UUID, *, reason: str, uncollectible_at: datetime
) -> None:
    """What is due of it is not expected any more."""
    await connection.execute(
        """
        UPDATE billing.invoice SET status = 'uncollectible', uncollectible_at = $3, uncollectible_reason = $4
        WHERE org_id = $1 AND invoice_id = $2
        """,
        org_id,
        invoice_id,
        uncollectible_at,
        reason,
    )


async def reduce_amount_due(
    connection: Connection, org_id: OrgId, invoice_id: UUID, *, by: Decimal, now: datetime
) -> None:
    """So much of it need not be paid; where nothing is left it is paid."""
    await connection.execute(
        """
        UPDATE billing.invoice
        SET amount_due = amount_due - $3,
            status = CASE WHEN amount_due = $3 THEN 'paid' ELSE status END,
            paid_at = CASE WHEN amount_due = $3 THEN $4::timestamptz END
        WHERE org_id = $1 AND invoice_id = $2
        """,
        org_id,
        invoice_id,
        by,
        now,
    )
