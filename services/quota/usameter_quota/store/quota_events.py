"""The log of quota events in PostgreSQL; quota.append_events alone writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter_core.ids import OrgId
from usameter_quota.domain.limits import EnforcementMode, LimitPeriod
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventFilter, QuotaEventType
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

# $1 organization, $2 to $4 the filter.
_EVENTS = """
    SELECT position, type, tenant_id, event_type, occurred_at, limit_value, enforcement_mode, period,
        soft_limit_percent, period_start, period_end, stored, grace_ends_at
    FROM quota.quota_event
    WHERE org_id = $1 AND ($2::text IS NULL OR tenant_id = $2) AND ($3::text IS NULL OR event_type = $3)
        AND ($4::text IS NULL OR type = $4)
"""


class QuotaEventStore:
    """Reads quota events. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def last_position(self, org_id: OrgId) -> int:
        """Of the organization's newest event, 0 where it has none; every event up to it is visible."""
        rows = await fetch(
            self._pool, "SELECT coalesce(max(position), 0) AS last FROM quota.quota_event WHERE org_id = $1", org_id
        )
        return int(rows[0]["last"])

    async def list_between(
        self, org_id: OrgId, wanted: QuotaEventFilter, *, after: int, through: int, limit: int
    ) -> list[QuotaEvent]:
        """Up to `limit` events with `after` < position <= `through`, ascending."""
        rows = await fetch(
            self._pool,
            f"{_EVENTS} AND position > $5 AND position <= $6 ORDER BY position LIMIT $7",
            org_id,
            wanted.tenant_id,
            wanted.event_type,
            wanted.type,
            after,
            through,
            limit,
        )
        return [event_from_row(row) for row in rows]

    async def list_before(
        self, org_id: OrgId, wanted: QuotaEventFilter, *, before: int | None, limit: int
    ) -> list[QuotaEvent]:
        """Up to `limit` events with position < `before` (None: any), descending."""
        rows = await fetch(
            self._pool,
            f"{_EVENTS} AND ($5::bigint IS NULL OR position < $5) ORDER BY position DESC LIMIT $6",
            org_id,
            wanted.tenant_id,
            wanted.event_type,
            wanted.type,
            before,
            limit,
        )
        return [event_from_row(row) for row in rows]


def event_from_row(row: Record) -> QuotaEvent:
    """An event from the columns of `_EVENTS`."""
    return QuotaEvent(
        position=row["position"],
        type=QuotaEventType(row["type"]),
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        occurred_at=row["occurred_at"],
        limit_value=row["limit_value"],
        enforcement_mode=EnforcementMode(row["enforcement_mode"]),
        period=LimitPeriod(row["period"]),
        soft_limit_percent=row["soft_limit_percent"],
        period_start=row["period_start"],
        period_end=row["period_end"],
        stored=row["stored"],
        grace_ends_at=row["grace_ends_at"],
    )
