"""Counters and what is open on them, read and repaired under the locks of their heads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.grpc.context import remaining_seconds
from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_quota.domain.admission import UsageItem
from usameter_quota.domain.reconciliation import CounterKey, CounterUnit, Difference, HeldItem, StuckReservation
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

_READ_SECONDS_MAX = 10.0
_LOCK_SECONDS_MAX = 10.0
# By unit: the table, its column, and the column's type. Connections are UTC (`open_pool`), so a day is cast to
# its start and back.
_TABLES = {CounterUnit.HOUR: ("usage_hour", "hour", "timestamptz"), CounterUnit.DAY: ("usage_day", "day", "date")}


class ReconciliationStore:
    """Reads counters, and locks them to have them compared. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list_counters(self, org_id: OrgId, *, after: CounterKey, limit: int) -> list[tuple[CounterKey, Decimal]]:
        """Up to `limit` counters of the unit of `after` above it, by key."""
        table, column, kind = _TABLES[after.unit]
        with unavailable_without_postgres():
            async with self._pool.acquire() as connection, connection.transaction(readonly=True):
                # Where statistics are older than most of the table, a plan sorts all that is left for each page.
                await connection.execute("SET LOCAL enable_sort = off")
                rows = await connection.fetch(
                    f"""
                    SELECT u.tenant_id, u.event_type, u.{column}::timestamptz AS start, u.quantity
                    FROM quota.{table} AS u
                    WHERE u.org_id = $1
                        AND (u.tenant_id, u.event_type, u.{column}) > ($2, $3, $4::timestamptz::{kind})
                    ORDER BY u.tenant_id, u.event_type, u.{column}
                    LIMIT $5
                    """,
                    org_id,
                    after.tenant_id,
                    after.event_type,
                    after.start,
                    limit,
                    timeout=remaining_seconds(_READ_SECONDS_MAX),
                )
        return [(key_from_row(row, after.unit), row["quantity"]) for row in rows]

    async def list_stuck(self, org_id: OrgId, *, created_until: datetime, limit: int) -> list[StuckReservation]:
        """The organization's oldest open reservations made at or before that moment, and what they hold."""
        rows = await fetch(
            self._pool,
            """
            SELECT reservation_id, created_at, tenant_ids, event_types, hours, quantities
            FROM quota.reservation
            WHERE org_id = $1 AND state = 'OPEN' AND created_at <= $2
                -- Holds are open for as long as their customers want.
                AND public_id IS NULL
            ORDER BY created_at, reservation_id
            LIMIT $3
            """,
            org_id,
            created_until,
            limit,
        )
        return [
            StuckReservation(
                ReservationId(row["reservation_id"]),
                row["created_at"],
                [
                    UsageItem(tenant_id, event_type, _moment(hour), quantity)
                    for tenant_id, event_type, hour, quantity in zip(
                        row["tenant_ids"], row["event_types"], row["hours"], row["quantities"], strict=True
                    )
                ],
            )
            for row in rows
        ]

    @asynccontextmanager
    async def locked(self, org_id: OrgId, keys: Sequence[CounterKey]) -> AsyncIterator[LockedCounters]:
        """A transaction that holds the heads of these counters; commits at the end, rolls back where it raises."""
        with unavailable_without_postgres():
            async with self._pool.acquire() as connection, connection.transaction():
                # Should this process be stopped while it waits for its caller, others wait no longer than this.
                await connection.execute(
                    """
                    SELECT set_config('idle_in_transaction_session_timeout', '5s', true), quota.lock_heads($1, $2, $3)
                    """,
                    org_id,
                    [key.tenant_id for key in keys],
                    [key.event_type for key in keys],
                    timeout=remaining_seconds(_LOCK_SECONDS_MAX),
                )
                yield LockedCounters(connection, org_id, keys)


class LockedCounters:
    """Counters whose heads are locked: nobody else changes them."""

    def __init__(self, connection: Connection, org_id: OrgId, keys: Sequence[CounterKey]) -> None:
        self._connection = connection
        self._org_id = org_id
        self._keys = keys

    async def read(self) -> dict[CounterKey, Decimal]:
        """Each counter; 0 where there is no row."""
        counters = dict.fromkeys(self._keys, Decimal(0))
        for unit, (table, column, kind) in _TABLES.items():
            keys = [key for key in self._keys if key.unit is unit]
            rows = await self._connection.fetch(
                f"""
                SELECT k.tenant_id, k.event_type, k.start, u.quantity
                FROM unnest($2::text[], $3::text[], $4::timestamptz[]) AS k (tenant_id, event_type, start)
                CROSS JOIN LATERAL (
                    SELECT {table}.quantity
                    FROM quota.{table}
                    WHERE {table}.org_id = $1 AND {table}.tenant_id = k.tenant_id
                        AND {table}.event_type = k.event_type AND {table}.{column} = k.start::{kind}
                    -- LIMIT keeps this a look-up by primary key; see quota.lock_heads.
                    LIMIT 1
                ) AS u
                """,
                self._org_id,
                *_columns(keys),
            )
            counters |= {key_from_row(row, unit): row["quantity"] for row in rows}
        return counters

    async def list_held(self) -> list[HeldItem]:
        """What open reservations hold on these heads, of any hour."""
        rows = await self._connection.fetch(
            """
            SELECT r.reservation_id, i.tenant_id, i.event_type, i.hour, i.quantity
            FROM quota.reservation AS r
            CROSS JOIN LATERAL unnest(r.tenant_ids, r.event_types, r.hours, r.quantities)
                AS i (tenant_id, event_type, hour, quantity)
            WHERE r.org_id = $1 AND r.state = 'OPEN'
                AND (i.tenant_id, i.event_type) IN (SELECT * FROM unnest($2::text[], $3::text[]))
            """,
            self._org_id,
            [key.tenant_id for key in self._keys],
            [key.event_type for key in self._keys],
        )
        return [
            HeldItem(
                ReservationId(row["reservation_id"]),
                UsageItem(row["tenant_id"], row["event_type"], _moment(row["hour"]), row["quantity"]),
            )
            for row in rows
        ]

    async def find_adjusted(self, adjustment_ids: Sequence[UUID]) -> set[UUID]:
        """Those of the adjustments that are counted."""
        rows = await self._connection.fetch(
            "SELECT adjustment_id FROM quota.adjustment WHERE org_id = $1 AND adjustment_id = ANY ($2::uuid[])",
            self._org_id,
            adjustment_ids,
        )
        return {row["adjustment_id"] for row in rows}

    async def repair(self, differences: Sequence[Difference], *, now: datetime, repaired_by: str) -> None:
        """Set counters to what is expected of them, and keep what was done."""
        for unit, (table, column, kind) in _TABLES.items():
            of_unit = [difference for difference in differences if difference.key.unit is unit]
            await self._connection.execute(
                f"""
                INSERT INTO quota.{table} (org_id, tenant_id, event_type, {column}, quantity)
                SELECT $1, d.tenant_id, d.event_type, d.start::{kind}, d.expected
                FROM unnest($2::text[], $3::text[], $4::timestamptz[], $5::numeric[])
                    AS d (tenant_id, event_type, start, expected)
                ON CONFLICT ON CONSTRAINT {table}_pkey DO UPDATE SET quantity = EXCLUDED.quantity
                """,
                self._org_id,
                *_columns([difference.key for difference in of_unit]),
                [difference.expected for difference in of_unit],
            )
        tenant_ids, event_types, starts = _columns([difference.key for difference in differences])
        await self._connection.execute(
            """
            INSERT INTO quota.repair (
                org_id, repair_id, repaired_at, repaired_by, tenant_id, event_type, unit, starts_at,
                counter, entries, reserved, expected
            )
            SELECT $1, d.repair_id, $2, $3, d.tenant_id, d.event_type, d.unit, d.starts_at,
                d.counter, d.entries, d.reserved, d.expected
            FROM unnest(
                $4::uuid[], $5::text[], $6::text[], $7::text[], $8::timestamptz[],
                $9::numeric[], $10::numeric[], $11::numeric[], $12::numeric[]
            ) AS d (repair_id, tenant_id, event_type, unit, starts_at, counter, entries, reserved, expected)
            """,
            self._org_id,
            now,
            repaired_by,
            [new_uuid() for _ in differences],
            tenant_ids,
            event_types,
            [difference.key.unit.value for difference in differences],
            starts,
            [difference.counter for difference in differences],
            [difference.entries for difference in differences],
            [difference.reserved for difference in differences],
            [difference.expected for difference in differences],
        )
        await self._connection.execute(
            "SELECT quota.record_reached($1, $2, $3, $4, $5)", self._org_id, now, tenant_ids, event_types, starts
        )


def key_from_row(row: Record, unit: CounterUnit) -> CounterKey:
    """The key of a counter's row; the only reader of one."""
    return CounterKey(row["tenant_id"], row["event_type"], unit, _moment(row["start"]))


def _moment(read: datetime) -> datetime:
    # asyncpg writes the first moment that Python knows as -infinity, and reads that without a zone.
    return read.replace(tzinfo=UTC)


def _columns(keys: Sequence[CounterKey]) -> tuple[list[str], list[str], list[datetime]]:
    return [key.tenant_id for key in keys], [key.event_type for key in keys], [key.start for key in keys]
