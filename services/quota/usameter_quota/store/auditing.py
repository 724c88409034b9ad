"""What an audit of limits reads: a part of them at one moment, without a lock that others wait for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_core.ids import OrgId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_quota.domain.auditing import (
    TIMES_DIFFER_MAX,
    Binding,
    BoundUse,
    LimitRecord,
    PeriodUse,
    bind_default,
)
from usameter_quota.domain.limits import LimitPeriod
from usameter_quota.domain.reconciliation import CounterUnit

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

_FETCHED_ROWS = 1_000
Head = tuple[str, str]  # tenant, event type
Change = tuple[str, str, int]  # tenant, event type, version


class AuditStore:
    """Reads limits and counters. Raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def moment(self, org_id: OrgId) -> AsyncIterator[LimitMoment]:
        """Limits, counters and what was recorded of them, all as they are when this begins."""
        with unavailable_without_postgres():
            async with (
                self._pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                # As in the functions that it calls: a plan is as old as the statistics of its tables.
                await connection.execute("SET LOCAL enable_seqscan = off")
                yield LimitMoment(connection, org_id)


class LimitMoment:
    """The limits of one organization as they were when the transaction began."""

    def __init__(self, connection: Connection, org_id: OrgId) -> None:
        self._connection = connection
        self._org_id = org_id

    async def stream_heads(
        self, *, after: Head, limit: int, now: datetime
    ) -> AsyncGenerator[tuple[Head, BoundUse | None], None]:
        """The next heads, each with the counters of its periods since its limit was set.

        A head has None in their place where it has no such counter, or no HARD limit.
        """
        query = """
            SELECT head.tenant_id, head.event_type, l.limit_value, l.period, l.set_at, l.from_default,
                own.changed_at, own.period AS own_period, own.current,
                p.counted_from, p.ends_at, p.quantity
            FROM (
                SELECT h.tenant_id, h.event_type
                FROM quota.quota_head AS h
                -- The heads of defaults have no tenant, and so no counters.
                WHERE h.org_id = $1 AND h.tenant_id <> '' AND (h.tenant_id, h.event_type) > ($2, $3)
                ORDER BY h.tenant_id, h.event_type
                LIMIT $4
            ) AS head
            LEFT JOIN LATERAL (
                SELECT limit_of.*, limit_of.tenant_id = '' AS from_default
                FROM quota.limit_of($1, head.tenant_id, head.event_type)
                WHERE limit_of.enforcement_mode = 'HARD'
            ) AS l ON true
            -- The last change of a limit of the tenant's own; a deletion is of the period of the change before.
            LEFT JOIN LATERAL (
                SELECT c.changed_at, c.current, coalesce(c.period, deleted.period) AS period
                FROM quota.limit_change AS c
                LEFT JOIN quota.limit_change AS deleted
                    ON deleted.org_id = c.org_id AND deleted.tenant_id = c.tenant_id
                    AND deleted.event_type = c.event_type AND deleted.version = c.version - 1
                WHERE c.org_id = $1 AND c.tenant_id = head.tenant_id AND c.event_type = head.event_type
                ORDER BY c.version DESC
                LIMIT 1
            ) AS own ON l.period IS NOT NULL
            LEFT JOIN LATERAL (
                SELECT p.counted_from, p.ends_at, sum(u.quantity) AS quantity
                FROM (
                    SELECT h.hour AS start, h.quantity
                    FROM quota.usage_hour AS h
                    WHERE h.org_id = $1 AND h.tenant_id = head.tenant_id AND h.event_type = head.event_type
                        AND h.hour > l.set_at - interval '1 hour' AND l.period = 'HOURLY'
                    UNION ALL
                    SELECT d.day::timestamp AT TIME ZONE 'UTC', d.quantity
                    FROM quota.usage_day AS d
                    WHERE d.org_id = $1 AND d.tenant_id = head.tenant_id AND d.event_type = head.event_type
                        AND d.day >= ((l.set_at - interval '31 days') AT TIME ZONE 'UTC')::date
                        AND l.period <> 'HOURLY'
                ) AS u
                CROSS JOIN LATERAL quota.period_of(l.period, u.start, $5) AS p
                WHERE u.start >= p.counted_from AND p.ends_at > l.set_at
                GROUP BY p.counted_from, p.ends_at
            ) AS p ON true
            ORDER BY head.tenant_id, head.event_type
            """
        # The rolling window is that of whoever may be first in the next one.
        arguments = (self._org_id, *after, limit, now + TIMES_DIFFER_MAX)
        async for row in self._connection.cursor(query, *arguments, prefetch=_FETCHED_ROWS):
            head = (row["tenant_id"], row["event_type"])
            yield head, None if row["quantity"] is None else _bound_in_force(row, now)

    async def list_changes(self, *, after: Change, limit: int) -> list[tuple[Change, BoundUse | None]]:
        """The next changes, each with the counter that it recorded and the HARD limit that had bound it until then.

        A change has None in their place where there was none, or it recorded the counter of another kind of period.
        """
        rows = await self._connection.fetch(
            """
            SELECT change.tenant_id, change.event_type, change.version, change.changed_at, change.current,
                bound.limit_value, bound.period, bound.changed_at AS set_at, bound.current AS current_before,
                p.counted_from, p.ends_at
            FROM (
                SELECT c.tenant_id, c.event_type, c.version, c.changed_at, c.period, c.current
                FROM quota.limit_change AS c
                WHERE c.org_id = $1 AND c.tenant_id <> '' AND (c.tenant_id, c.event_type, c.version) > ($2, $3, $4)
                ORDER BY c.tenant_id, c.event_type, c.version
                LIMIT $5
            ) AS change
            LEFT JOIN LATERAL (
                SELECT b.limit_value, b.period, b.changed_at, b.current
                FROM quota.limit_change AS b
                WHERE b.org_id = $1 AND b.tenant_id = change.tenant_id AND b.event_type = change.event_type
                    AND b.version = change.version - 1 AND b.enforcement_mode = 'HARD'
                    -- A deletion recorded the counter of what it deleted.
                    AND b.period = coalesce(change.period, b.period)
            ) AS bound ON true
            CROSS JOIN LATERAL quota.period_of(bound.period, change.changed_at, change.changed_at) AS p
            ORDER BY change.tenant_id, change.event_type, change.version
            """,
            self._org_id,
            *after,
            limit,
        )
        return [
            (
                (row["tenant_id"], row["event_type"], row["version"]),
                None if row["limit_value"] is None else _bound_until_changed(row),
            )
            for row in rows
        ]

    async def sum_raised(self, counted: Sequence[BoundUse]) -> list[Decimal]:
        """For each counter what may have raised it but admissions since its limit was set: repairs and adjustments.

        What a repair lowered counts too: what was recorded of the counter before was too much.
        """
        rows = await self._connection.fetch(
            """
            SELECT coalesce(sum(raised.quantity), 0) AS quantity
            FROM unnest($2::text[], $3::text[], $4::text[], $5::timestamptz[], $6::timestamptz[], $7::timestamptz[])
                WITH ORDINALITY AS c (tenant_id, event_type, unit, starts_at, ends_at, since, number)
            LEFT JOIN (
                SELECT r.tenant_id, r.event_type, r.unit, r.starts_at AS at, r.repaired_at AS raised_at,
                    abs(r.expected - r.counter) AS quantity
                FROM quota.repair AS r
                WHERE r.org_id = $1
                UNION ALL
                SELECT a.tenant_id, a.event_type, counter.unit, a.hour, a.adjusted_at, a.quantity
                FROM quota.adjustment AS a
                CROSS JOIN (VALUES ('HOUR'), ('DAY')) AS counter (unit)
                WHERE a.org_id = $1 AND a.quantity > 0
            ) AS raised
                ON raised.tenant_id = c.tenant_id AND raised.event_type = c.event_type AND raised.unit = c.unit
                AND raised.at >= c.starts_at AND (c.ends_at IS NULL OR raised.at < c.ends_at)
                AND raised.raised_at >= c.since
            GROUP BY c.number
            ORDER BY c.number
            """,
            self._org_id,
            [each.use.tenant_id for each in counted],
            [each.use.event_type for each in counted],
            [_unit_of(each.binding.period).value for each in counted],
            [each.use.starts_at for each in counted],
            # The rolling window has no end: see quota.period_of.
            [None if each.binding.period is LimitPeriod.ROLLING_30D else each.use.ends_at for each in counted],
            [each.binding.since - TIMES_DIFFER_MAX for each in counted],
        )
        return [row["quantity"] for row in rows]


def _unit_of(period: LimitPeriod) -> CounterUnit:
    """What counters are added up for it."""
    return CounterUnit.HOUR if period is LimitPeriod.HOURLY else CounterUnit.DAY


def _bound_in_force(row: Record, now: datetime) -> BoundUse:
    return BoundUse(_binding_in_force(row), _use(row, counter=row["quantity"], read_at=now))


def _binding_in_force(row: Record) -> Binding:
    period = LimitPeriod(row["period"])
    if not row["from_default"]:
        return Binding(row["limit_value"], period, row["set_at"], row["current"])
    last = None
    if row["changed_at"] is not None:
        last = LimitRecord(row["changed_at"], LimitPeriod(row["own_period"]), row["current"])
    return bind_default(row["limit_value"], period, set_at=row["set_at"], last=last)


def _bound_until_changed(row: Record) -> BoundUse:
    binding = Binding(row["limit_value"], LimitPeriod(row["period"]), row["set_at"], row["current_before"])
    return BoundUse(binding, _use(row, counter=row["current"], read_at=row["changed_at"]))


def _use(row: Record, *, counter: Decimal, read_at: datetime) -> PeriodUse:
    return PeriodUse(row["tenant_id"], row["event_type"], row["counted_from"], row["ends_at"], counter, read_at)
