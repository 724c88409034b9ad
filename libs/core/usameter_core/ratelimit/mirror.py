"""The policies of all organizations in Redis: quota, which owns them, writes; every service reads.

    usameter:rate_policies      hash: organization → its policies; "" → "", there once all policies are

A service may not ask quota (identity calls nobody), so the policies come to them. What is lost comes
back with quota's next refresh, and the field "" tells "has no policy" from "is lost".
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
from redis.asyncio import Redis

from usameter_core.ids import OrgId
from usameter_core.logging import get_logger
from usameter_core.ratelimit.policy import OrganizationPolicies, decode_policies, encode_policies
from usameter_core.redis.breaker import CircuitBreaker

log = get_logger()

_KEY = "usameter:rate_policies"
_COMPLETE = ""


class PolicyMirror:
    """Reads and writes the mirror. Every method raises CircuitOpen while Redis is away."""

    def __init__(self, redis: Redis, breaker: CircuitBreaker) -> None:
        self._redis = redis
        self._breaker = breaker

    async def read(self, org_id: OrgId) -> OrganizationPolicies | None:
        """The organization's policies; None where they were lost or are no policies, and nobody knows."""
        fields = [_COMPLETE, str(org_id)]
        complete, encoded = await self._breaker.call(partial(self._redis.hmget, _KEY, fields))
        if isinstance(encoded, bytes):
            try:
                return decode_policies(encoded)
            except msgspec.DecodeError as error:
                log.error("rate_policies_unreadable", org_id=str(org_id), error=str(error))
                return None
        return None if complete is None else OrganizationPolicies()

    async def write(self, org_id: OrgId, policies: OrganizationPolicies) -> None:
        """Replace the policies of one organization."""
        field, encoded = str(org_id), encode_policies(policies)
        await self._breaker.call(partial(self._redis.hset, _KEY, field, encoded))

    async def list_organizations(self) -> set[str]:
        """The fields of the mirror, for `replace`."""
        fields = await self._breaker.call(partial(self._redis.hkeys, _KEY))
        return {field.decode() for field in fields if isinstance(field, bytes)}

    async def replace(self, all_policies: Mapping[OrgId, OrganizationPolicies], *, listed: set[str]) -> None:
        """Make the mirror hold these policies, and say that it is complete.

        Args:
            all_policies: Of every organization that has any.
            listed: What `list_organizations` said before they were read; of those, the others are
                deleted. Who came in between stays.
        """
        fields: dict[Any, Any] = {str(org_id): encode_policies(each) for org_id, each in all_policies.items()}
        fields[_COMPLETE] = b""
        await self._breaker.call(partial(self._redis.hset, _KEY, mapping=fields))
        gone = listed - fields.keys()
        if gone:
            await self._breaker.call(partial(self._redis.hdel, _KEY, *gone))
