"""Tenants' billing settings: one row each, replaced as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import asyncpg

from usameter_billing.domain.settings import TenantSettings
from usameter_core.ids import OrgId

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection


async def save_settings(connection: Connection, org_id: OrgId, tenant_id: str, settings: TenantSettings) -> None:
    """Set or replace a tenant's settings."""
    await connection.execute(
        """
        INSERT INTO billing.tenant_settings (org_id, tenant_id, currency, tax_rate, due_days, address)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT ON CONSTRAINT tenant_settings_pkey DO UPDATE
        SET currency = excluded.currency, tax_rate = excluded.tax_rate, due_days = excluded.due_days,
            address = excluded.address
        """,
        org_id,
        tenant_id,
        settings.currency,
        settings.tax_rate,
        settings.due_days,
        settings.address,
    )


async def load_settings(connection: Connection, org_id: OrgId, tenant_ids: Sequence[str]) -> dict[str, TenantSettings]:
    """Of each of these tenants; the defaults where it has none."""
    rows = await connection.fetch(
        """
        SELECT tenant_id, currency, tax_rate, due_days, address FROM billing.tenant_settings
        WHERE org_id = $1 AND tenant_id = ANY($2::text[])
        """,
        org_id,
        tenant_ids,
    )
    found = {row["tenant_id"]: _settings_from_row(row) for row in rows}
    return {tenant_id: found.get(tenant_id, TenantSettings()) for tenant_id in tenant_ids}


def _settings_from_row(row: asyncpg.Record) -> TenantSettings:
    return TenantSettings(
        currency=row["currency"], tax_rate=row["tax_rate"], due_days=row["due_days"], address=row["address"]
    )
