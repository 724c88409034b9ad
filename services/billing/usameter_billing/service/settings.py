"""Tenants' billing settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter_billing.domain.settings import TenantSettings
from usameter_billing.store import accounts, subscriptions
from usameter_billing.store import settings as store
from usameter_core.clock import Clock
from usameter_core.ids import OrgId
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool


class Settings:
    """The settings of organizations' tenants."""

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def set(self, org_id: OrgId, tenant_id: str, settings: TenantSettings) -> None:
        """Set or replace the settings as a whole.

        Raises:
            FailedPrecondition: CURRENCY_MISMATCH: the tenant is, or will be, on a plan in another currency.
        """
        now = self._clock.now()

        async def work(connection: Connection) -> None:
            await accounts.lock_accounts(connection, org_id, [tenant_id])
            held = await subscriptions.load_subscriptions(connection, org_id, [tenant_id])
            for each in held.get(tenant_id, ()):
                for span in each.spans():
                    if span.end is None or span.end > now:
                        settings.check_currency(span.plan.currency, what=f"The plan {span.plan.name}")
            await store.save_settings(connection, org_id, tenant_id, settings)

        await run_transaction(self._pool, work)

    async def get(self, org_id: OrgId, tenant_id: str) -> TenantSettings:
        """The settings of a tenant; the defaults where it has none."""
        found = await run_transaction(
            self._pool, lambda connection: store.load_settings(connection, org_id, [tenant_id])
        )
        return found[tenant_id]
