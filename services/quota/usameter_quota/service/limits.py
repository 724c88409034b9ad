"""Setting limits, and telling what is left of them."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from usameter_core.clock import Clock
from usameter_core.errors import NotFound
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_quota.domain.admission import verdicts_from_findings
from usameter_quota.domain.limits import EVERY_TENANT, LimitTerms, Quota, QuotaDefault
from usameter_quota.store.limits import LimitStore

log = get_logger()


@dataclass(frozen=True, slots=True)
class QuotaCheck:
    """What a reservation would be told; `quota` is None where no limit is set, nor a default."""

    allowed: bool
    quota: Quota | None


class QuotaService:
    """Limits of organizations."""

    def __init__(self, *, clock: Clock, store: LimitStore) -> None:
        self._clock = clock
        self._store = store

    async def set_quota(self, caller: Principal, tenant_id: str, event_type: str, terms: LimitTerms) -> Quota:
        """Set or replace a limit, in force from this answer on. Idempotent."""
        now = self._clock.now()
        await self._store.set_limit(caller.org_id, tenant_id, event_type, terms, now=now, changed_by=caller.api_key_id)
        log.info("quota_set", enforcement_mode=terms.enforcement_mode.value, period=terms.period.value)
        quota = await self._store.find_quota(caller.org_id, tenant_id, event_type, now=now)
        if quota is None:
            # Somebody deleted it in between: what was asked for did happen, and is over.
            raise NotFound("quota", f"{tenant_id}/{event_type}")
        return quota

    async def get_quota(self, org_id: OrgId, tenant_id: str, event_type: str) -> Quota:
        """The limit in force, its own or the default, and its use now; else NotFound."""
        quota = await self._store.find_quota(org_id, tenant_id, event_type, now=self._clock.now())
        if quota is None:
            raise NotFound("quota", f"{tenant_id}/{event_type}")
        return quota

    async def delete_quota(self, caller: Principal, tenant_id: str, event_type: str) -> None:
        """Remove a limit of the tenant's own at once; else NotFound. The default applies from then on."""
        deleted = await self._store.delete_limit(
            caller.org_id, tenant_id, event_type, now=self._clock.now(), changed_by=caller.api_key_id
        )
        if not deleted:
            raise NotFound("quota", f"{tenant_id}/{event_type}")
        log.info("quota_deleted")

    async def list_quotas(
        self, org_id: OrgId, *, tenant_id: str | None, after: tuple[str, str], limit: int
    ) -> list[Quota]:
        """Up to `limit` quotas above `after`, by (tenant, event type)."""
        return await self._store.list_quotas(
            org_id, tenant_id=tenant_id, after=after, limit=limit, now=self._clock.now()
        )

    async def set_default(self, caller: Principal, event_type: str, terms: LimitTerms) -> QuotaDefault:
        """Set or replace a default, in force for every tenant from this answer on. Idempotent."""
        await self._store.set_limit(
            caller.org_id, EVERY_TENANT, event_type, terms, now=self._clock.now(), changed_by=caller.api_key_id
        )
        log.info("quota_default_set", enforcement_mode=terms.enforcement_mode.value, period=terms.period.value)
        # NotFound where somebody deleted it in between, as in `set_quota`.
        return await self.get_default(caller.org_id, event_type)

    async def get_default(self, org_id: OrgId, event_type: str) -> QuotaDefault:
        """The default of an event type; else NotFound."""
        defaults = await self._store.list_defaults(org_id, event_type=event_type, after="", limit=1)
        if not defaults:
            raise NotFound("quota default", event_type)
        return defaults[0]

    async def delete_default(self, caller: Principal, event_type: str) -> None:
        """Remove a default at once; else NotFound."""
        deleted = await self._store.delete_limit(
            caller.org_id, EVERY_TENANT, event_type, now=self._clock.now(), changed_by=caller.api_key_id
        )
        if not deleted:
            raise NotFound("quota default", event_type)
        log.info("quota_default_deleted")

    async def list_defaults(self, org_id: OrgId, *, after: str, limit: int) -> list[QuotaDefault]:
        """Up to `limit` defaults above `after`, by event type."""
        return await self._store.list_defaults(org_id, event_type=None, after=after, limit=limit)

    async def check_quota(self, org_id: OrgId, tenant_id: str, event_type: str, quantity: Decimal) -> QuotaCheck:
        """Whether `quantity` would be admitted now; nothing is reserved, so it may not be a moment later."""
        now = self._clock.now()
        findings = await self._store.check_quantity(org_id, tenant_id, event_type, quantity, now=now)
        quota = await self._store.find_quota(org_id, tenant_id, event_type, now=now)
        return QuotaCheck(allowed=verdicts_from_findings(1, findings)[0].admitted, quota=quota)
