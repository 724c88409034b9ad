"""Tenants' accounts: the lock that serialises whatever bills a tenant or changes what was billed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def lock_accounts(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> None:
    """Lock these tenants' accounts to the end of the transaction; read what they protect in later statements.

    In key order, so that two batches cannot deadlock; a statement's snapshot is older than a lock
    it waits for, so whatever is read in this one may be out of date.
    """
    ordered = sorted(tenant_ids, key=str.encode)
    await connection.execute(
        """
        INSERT INTO billing.tenant_account (org_id, tenant_id)
        SELECT $1, * FROM unnest($2::text[])
        ON CONFLICT ON CONSTRAINT tenant_account_pkey DO NOTHING
        """,
        org_id,
        ordered,
    )
    await connection.execute(
        """
        SELECT FROM billing.tenant_account
        WHERE org_id = $1 AND tenant_id = ANY($2::text[])
        ORDER BY tenant_id FOR UPDATE
        """,
        org_id,
        ordered,
    )
