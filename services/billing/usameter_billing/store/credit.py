"""The credit ledger; whoever adds to it has locked the tenant's account."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_billing.domain.credit import CreditBalance, CreditEntry, CreditKind
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def load_credit(
    connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]
) -> dict[tuple[str, str], Decimal]:
    """The credit of each (tenant, currency) that has any."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, currency, sum(amount) AS balance FROM billing.credit_entry
        WHERE org_id = $1 AND tenant_id = ANY($2::text[])
        GROUP BY tenant_id, currency HAVING sum(amount) > 0
        """,
        org_id,
        tenant_ids,
    )
    return {(row["tenant_id"], row["currency"]): row["balance"] for row in rows}


async def load_change(connection: Connection, org_id: OrgId, invoice_id: UUID) -> Decimal:
    """What the invoice itself, not a credit note on it, granted (> 0) or drew (< 0)."""
    change: Decimal = await connection.fetchval(
        """
        SELECT coalesce(sum(amount), 0) FROM billing.credit_entry
        WHERE org_id = $1 AND coalesce(credit_note_id, invoice_id) = $2
        """,
        org_id,
        invoice_id,
    )
    return change


async def add_entries(connection: Connection, org_id: OrgId, entries: Sequence[CreditEntry]) -> None:
    """Append to the ledger."""
    await connection.execute(
        """
        INSERT INTO billing.credit_entry
            (org_id, entry_id, tenant_id, currency, kind, amount, invoice_id, credit_note_id, created_at)
        SELECT $1, * FROM unnest(
            $2::uuid[], $3::text[], $4::text[], $5::text[], $6::numeric[], $7::uuid[], $8::uuid[], $9::timestamptz[]
        )
        """,
        org_id,
        [entry.entry_id for entry in entries],
        [entry.tenant_id for entry in entries],
        [entry.currency for entry in entries],
        [entry.kind.value for entry in entries],
        [entry.amount for entry in entries],
        [entry.invoice_id for entry in entries],
        [entry.credit_note_id for entry in entries],
        [entry.created_at for entry in entries],
    )


async def list_balances(
    connection: Connection, org_id: OrgId, *, tenant_id: str, after: tuple[str, str] | None, limit: int
) -> list[CreditBalance]:
    """At most `limit` balances by (tenant, currency), ascending; an empty `tenant_id` passes all."""
    after_tenant, after_currency = after or ("", "")
    rows = await connection.fetch(
        """
        SELECT tenant_id, currency, sum(amount) AS balance FROM billing.credit_entry
        WHERE org_id = $1 AND ($2 = '' OR tenant_id = $2) AND (tenant_id, currency) > ($3, $4)
        GROUP BY tenant_id, currency
        ORDER BY tenant_id, currency LIMIT $5
        """,
        org_id,
        tenant_id,
        after_tenant,
        after_currency,
        limit,
    )
    return [CreditBalance(**row) for row in rows]


async def list_entries(
    connection: Connection, org_id: OrgId, *, tenant_id: str, before: UUID | None, limit: int
) -> list[CreditEntry]:
    """At most `limit` entries of the tenant, in all currencies, newest first."""
    rows = await connection.fetch(
        """
        SELECT entry_id, tenant_id, currency, kind, amount, invoice_id, credit_note_id, created_at
        FROM billing.credit_entry
        WHERE org_id = $1 AND tenant_id = $2 AND ($3::uuid IS NULL OR entry_id < $3)
        ORDER BY entry_id DESC LIMIT $4
        """,
        org_id,
        tenant_id,
        before,
        limit,
    )
    return [entry_from_row(row) for row in rows]


def entry_from_row(row: asyncpg.Record) -> CreditEntry:
    """The entry in a row."""
    return CreditEntry(
        entry_id=row["entry_id"],
        tenant_id=row["tenant_id"],
        currency=row["currency"],
        kind=CreditKind(row["kind"]),
        amount=row["amount"],
        invoice_id=row["invoice_id"],
        credit_note_id=row["credit_note_id"],
        created_at=row["created_at"],
    )
