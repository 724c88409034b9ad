"""Limits and their status in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_core.ids import OrgId
from usameter_core.period import hour_start
from usameter_quota.domain.admission import Finding
from usameter_quota.domain.limits import (
    EVERY_TENANT,
    EnforcementMode,
    LimitPeriod,
    LimitTerms,
    Quota,
    QuotaDefault,
)
from usameter_quota.store.findings import findings_from_json
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

# $1 organization, $2 now; "{keys}" is a query of (tenant_id, event_type).
_QUOTAS = """
    WITH line AS MATERIALIZED (
        SELECT k.tenant_id, k.event_type, l.tenant_id = '' AS from_default, l.limit_value, l.enforcement_mode, l.period,
            l.soft_limit_percent, l.grace_period_hours, l.set_at, p.*
        FROM ({keys}) AS k
        CROSS JOIN LATERAL quota.limit_of($1, k.tenant_id, k.event_type) AS l
        CROSS JOIN LATERAL quota.period_of(l.period, $2, $2) AS p
    ),
    -- What is open is read once for all lines, and not for each.
    open_of_line AS MATERIALIZED (
        SELECT line.tenant_id, line.event_type, sum(o.quantity) AS quantity
        FROM line
        JOIN quota.open_use($1) AS o ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type
            AND o.hour >= line.counted_from AND o.hour < line.counted_until
        GROUP BY line.tenant_id, line.event_type
    )
    SELECT line.*, s.grace_ends_at, used.quantity AS current, coalesce(o.quantity, 0) AS reserved
    FROM line
    CROSS JOIN LATERAL quota.period_use(
        $1, line.tenant_id, line.event_type, line.period, line.counted_from, line.counted_until
    ) AS used
    LEFT JOIN open_of_line AS o ON o.tenant_id = line.tenant_id AND o.event_type = line.event_type
    LEFT JOIN quota.limit_state AS s
        ON s.org_id = $1 AND s.tenant_id = line.tenant_id AND s.event_type = line.event_type
        AND s.period_key = line.period_key
    ORDER BY line.tenant_id, line.event_type
"""


@dataclass(frozen=True, slots=True)
class HeadKey:
    """A tenant's event type."""

    org_id: OrgId
    tenant_id: str
    event_type: str


class LimitStore:
    """Reads and changes limits; the tenant EVERY_TENANT has the defaults.

    Every method raises Unavailable without the database.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def set_limit(
        self,
        org_id: OrgId,
        tenant_id: str,
        event_type: str,
        terms: LimitTerms,
        *,
        now: datetime,
        changed_by: str,
    ) -> None:
        """Set or replace the limit; equal terms change nothing, not even `updated_at`."""
        await fetch(
            self._pool,
            "SELECT quota.set_limit($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            org_id,
            tenant_id,
            event_type,
            now,
            changed_by,
            terms.limit_value,
            terms.enforcement_mode.value,
            terms.period.value,
            terms.soft_limit_percent,
            terms.grace_period_hours,
        )

    async def delete_limit(
        self, org_id: OrgId, tenant_id: str, event_type: str, *, now: datetime, changed_by: str
    ) -> bool:
        """Remove the limit; False where there was none."""
        rows = await fetch(
            self._pool,
            "SELECT quota.delete_limit($1, $2, $3, $4, $5) AS deleted",
            org_id,
            tenant_id,
            event_type,
            now,
            changed_by,
        )
        return bool(rows[0]["deleted"])

    async def find_quota(self, org_id: OrgId, tenant_id: str, event_type: str, *, now: datetime) -> Quota | None:
        """The limit in force and its use at `now`."""
        keys = "SELECT $3::text AS tenant_id, $4::text AS event_type"
        rows = await fetch(self._pool, _QUOTAS.format(keys=keys), org_id, now, tenant_id, event_type)
        return quota_from_row(rows[0]) if rows else None

    async def list_quotas(
        self, org_id: OrgId, *, tenant_id: str | None, after: tuple[str, str], limit: int, now: datetime
    ) -> list[Quota]:
        """Up to `limit` quotas above `after`, by (tenant, event type) in the database's collation.

        Defaults are listed for every tenant and event type that has been used.
        """
        # Two queries of one index each: a join of heads with limits would look at every head that has none.
        keys = """
            (
                SELECT l.tenant_id, l.event_type
                FROM quota.quota_limit AS l
                WHERE l.org_id = $1 AND l.tenant_id <> '' AND (l.tenant_id, l.event_type) > ($3, $4)
                    AND ($5::text IS NULL OR l.tenant_id = $5)
                ORDER BY l.tenant_id, l.event_type
                LIMIT $6
            )
            UNION
            (
                SELECT h.tenant_id, h.event_type
                FROM quota.quota_head AS h
                WHERE h.org_id = $1 AND h.tenant_id <> '' AND (h.tenant_id, h.event_type) > ($3, $4)
                    AND ($5::text IS NULL OR h.tenant_id = $5)
                    AND h.event_type = ANY (
                        ARRAY(SELECT d.event_type FROM quota.quota_limit AS d WHERE d.org_id = $1 AND d.tenant_id = '')
                    )
                ORDER BY h.tenant_id, h.event_type
                LIMIT $6
            )
            ORDER BY tenant_id, event_type
            LIMIT $6
        """
        rows = await fetch(self._pool, _QUOTAS.format(keys=keys), org_id, now, *after, tenant_id, limit)
        return [quota_from_row(row) for row in rows]

    async def list_defaults(
        self, org_id: OrgId, *, event_type: str | None, after: str, limit: int
    ) -> list[QuotaDefault]:
        """Up to `limit` defaults above `after`, by event type; of one event type where one is given."""
        rows = await fetch(
            self._pool,
            """
            SELECT event_type, limit_value, enforcement_mode, period, soft_limit_percent, grace_period_hours, set_at
            FROM quota.quota_limit
            WHERE org_id = $1 AND tenant_id = $2 AND event_type > $3 AND ($4::text IS NULL OR event_type = $4)
            ORDER BY event_type
            LIMIT $5
            """,
            org_id,
            EVERY_TENANT,
            after,
            event_type,
            limit,
        )
        return [default_from_row(row) for row in rows]

    async def check_quantity(
        self, org_id: OrgId, tenant_id: str, event_type: str, quantity: Decimal, *, now: datetime
    ) -> list[Finding]:
        """What a reservation of `quantity` at `now` would be told, were it the next one."""
        rows = await fetch(
            self._pool,
            """
            SELECT findings
            FROM quota.decide(
                $1, $2, ARRAY[$3], ARRAY[$4], ARRAY[$5::timestamptz], ARRAY[$6::numeric],
                ARRAY[0], ARRAY[1], ARRAY[$6::text]
            )
            """,
            org_id,
            now,
            tenant_id,
            event_type,
            hour_start(now),
            quantity,
        )
        return findings_from_json(rows[0]["findings"])

    async def list_ended_periods(self, *, until: datetime, limit: int) -> list[HeadKey]:
        """Up to `limit` heads, of all organizations, that reached a line in a period that ended by then."""
        rows = await fetch(
            self._pool,
            """
            SELECT org_id, tenant_id, event_type
            FROM quota.limit_state
            WHERE period_end <= $1
            ORDER BY period_end
            LIMIT $2
            """,
            until,
            limit,
        )
        return [HeadKey(*row) for row in rows]

    async def end_periods(self, org_id: OrgId, heads: Sequence[HeadKey], *, until: datetime) -> None:
        """End the periods of these heads of an organization that ended by then. Idempotent."""
        await fetch(
            self._pool,
            "SELECT quota.end_periods($1, $2, $3, $4)",
            org_id,
            until,
            [head.tenant_id for head in heads],
            [head.event_type for head in heads],
        )


def quota_from_row(row: Record) -> Quota:
    """A quota from the columns of `_QUOTAS`."""
    return Quota(
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        terms=terms_from_row(row),
        from_default=row["from_default"],
        current=row["current"],
        reserved=row["reserved"],
        reset_at=row["ends_at"],
        grace_ends_at=row["grace_ends_at"],
        updated_at=row["set_at"],
    )


def default_from_row(row: Record) -> QuotaDefault:
    """A default from a row of `quota_limit`."""
    return QuotaDefault(row["event_type"], terms_from_row(row), row["set_at"])


def terms_from_row(row: Record) -> LimitTerms:
    """Terms from the columns of `quota_limit`."""
    return LimitTerms(
        limit_value=row["limit_value"],
        enforcement_mode=EnforcementMode(row["enforcement_mode"]),
        period=LimitPeriod(row["period"]),
        soft_limit_percent=row["soft_limit_percent"],
        grace_period_hours=row["grace_period_hours"],
    )
