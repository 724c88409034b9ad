"""Setting rate limits, and telling every service of them."""

from __future__ import annotations

from usameter_core.clock import Clock
from usameter_core.errors import NotFound
from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.ratelimit.mirror import PolicyMirror
from usameter_core.ratelimit.policy import RatePolicy
from usameter_core.redis.breaker import CircuitOpen
from usameter_quota.domain.rate_limits import SetRatePolicy
from usameter_quota.store.rate_limits import RateLimitStore

log = get_logger()


class RateLimitService:
    """Rate limits of organizations; an empty `api_key_id` is the organization's default."""

    def __init__(self, *, clock: Clock, store: RateLimitStore, mirror: PolicyMirror) -> None:
        self._clock = clock
        self._store = store
        self._mirror = mirror

    async def set_rate_limit(self, org_id: OrgId, api_key_id: str, policy: RatePolicy) -> SetRatePolicy:
        """Set or replace a policy. Idempotent."""
        stored = await self._store.set_policy(org_id, api_key_id, policy, now=self._clock.now())
        log.info("rate_limit_set", api_key_id=api_key_id)
        await self._publish(org_id)
        return stored

    async def delete_rate_limit(self, org_id: OrgId, api_key_id: str) -> None:
        """Remove a policy; else NotFound."""
        if not await self._store.delete_policy(org_id, api_key_id):
            raise NotFound("rate_limit", api_key_id or "default")
        log.info("rate_limit_deleted", api_key_id=api_key_id)
        await self._publish(org_id)

    async def list_rate_limits(self, org_id: OrgId, *, after: str | None, limit: int) -> list[SetRatePolicy]:
        """Up to `limit` policies above `after`, the default first, then by key."""
        return await self._store.list_policies(org_id, after=after, limit=limit)

    async def _publish(self, org_id: OrgId) -> None:
        policies = await self._store.find_organization(org_id)
        try:
            await self._mirror.write(org_id, policies)
        except CircuitOpen:
            # Stored all the same; the refresh brings it to the mirror when Redis is back.
            log.warning("rate_limit_not_mirrored")

    async def refresh_mirror(self) -> None:
        """Make the mirror what the database says: after Redis came back empty, or missed a change."""
        try:
            listed = await self._mirror.list_organizations()
            await self._mirror.replace(await self._store.list_organizations(), listed=listed)
        except CircuitOpen:
            pass  # the breaker says so, and nobody could read the mirror either
