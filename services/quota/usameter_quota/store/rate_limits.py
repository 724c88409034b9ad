"""Rate limits in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_core.ratelimit.policy import OrganizationPolicies, RatePolicy
from usameter_quota.domain.rate_limits import SetRatePolicy
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

_DEFAULT = ""


class RateLimitStore:
    """Reads and changes rate limits. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def set_policy(self, org_id: OrgId, api_key_id: str, policy: RatePolicy, *, now: datetime) -> SetRatePolicy:
        """Set or replace a policy."""
        rows = await fetch(
            self._pool,
            """
            INSERT INTO quota.rate_limit (
                org_id, api_key_id, requests_per_second, requests_per_minute, requests_per_hour, updated_at
            )
            VALUES ($1, $2, $3, $4, $5, $6)
            ON CONFLICT ON CONSTRAINT rate_limit_pkey DO UPDATE SET
                requests_per_second = excluded.requests_per_second,
                requests_per_minute = excluded.requests_per_minute,
                requests_per_hour = excluded.requests_per_hour,
                updated_at = excluded.updated_at
            RETURNING api_key_id, requests_per_second, requests_per_minute, requests_per_hour, updated_at
            """,
            org_id,
            api_key_id,
            policy.requests_per_second,
            policy.requests_per_minute,
            policy.requests_per_hour,
            now,
        )
        return set_policy_from_row(rows[0])

    async def delete_policy(self, org_id: OrgId, api_key_id: str) -> bool:
        """Remove a policy; False where there was none."""
        rows = await fetch(
            self._pool,
            "DELETE FROM quota.rate_limit WHERE org_id = $1 AND api_key_id = $2 RETURNING api_key_id",
            org_id,
            api_key_id,
        )
        return bool(rows)

    async def list_policies(self, org_id: OrgId, *, after: str | None, limit: int) -> list[SetRatePolicy]:
        """Up to `limit` policies above `after`, the default first, then by key."""
        rows = await fetch(
            self._pool,
            """
            SELECT api_key_id, requests_per_second, requests_per_minute, requests_per_hour, updated_at
            FROM quota.rate_limit
            WHERE org_id = $1 AND ($2::text IS NULL OR api_key_id > $2)
            ORDER BY api_key_id
            LIMIT $3
            """,
            org_id,
            after,
            limit,
        )
        return [set_policy_from_row(row) for row in rows]

    async def find_organization(self, org_id: OrgId) -> OrganizationPolicies:
        """All policies of an organization."""
        rows = await fetch(
            self._pool,
            """
            SELECT api_key_id, requests_per_second, requests_per_minute, requests_per_hour
            FROM quota.rate_limit
            WHERE org_id = $1
            """,
            org_id,
        )
        return _organization_from_rows(rows)

    async def list_organizations(self) -> dict[OrgId, OrganizationPolicies]:
        """All policies there are, for the mirror: the one query here that crosses organizations."""
        rows = await fetch(
            self._pool,
            """
            SELECT org_id, api_key_id, requests_per_second, requests_per_minute, requests_per_hour
            FROM quota.rate_limit
            """,
        )
        by_organization: dict[UUID, list[Record]] = {}
        for row in rows:
            by_organization.setdefault(row["org_id"], []).append(row)
        return {OrgId(org_id): _organization_from_rows(own) for org_id, own in by_organization.items()}


def set_policy_from_row(row: Record) -> SetRatePolicy:
    """A policy from its row."""
    return SetRatePolicy(row["api_key_id"], _policy_from_row(row), row["updated_at"])


def _organization_from_rows(rows: Iterable[Record]) -> OrganizationPolicies:
    by_api_key = {row["api_key_id"]: _policy_from_row(row) for row in rows}
    default = by_api_key.pop(_DEFAULT, RatePolicy())
    return OrganizationPolicies(default, by_api_key)


def _policy_from_row(row: Record) -> RatePolicy:
    return RatePolicy(row["requests_per_second"], row["requests_per_minute"], row["requests_per_hour"])
