"""What is stored of the counters that quota keeps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from usameter_core.ids import OrgId, ReservationId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_ingest.domain.reconciliation import CounterKey, CounterUnit
from usameter_ingest.store.outcomes import GivenBack, given_back_from_row

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

# By unit: the rollup, its column, and the column's type. Connections are UTC (`open_pool`), so a day is cast to
# its start and back.
_ROLLUPS = {CounterUnit.HOUR: ("usage_hour", "hour", "timestamptz"), CounterUnit.DAY: ("usage_day", "day", "date")}


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored of some counters, in one snapshot.

    Attributes:
        entries: Sums of entries; a counter that is absent has none.
        committed: Those of the reservations asked for whose entries are among them.
        given_back: What corrections of the counters' tenants give back, and quota has not confirmed.
    """

    entries: Mapping[CounterKey, Decimal]
    committed: Set[ReservationId]
    given_back: Sequence[GivenBack]


class ReconciliationStore:
    """Sums entries as quota counts them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list_sums(self, org_id: OrgId, *, after: CounterKey, limit: int) -> list[tuple[CounterKey, Decimal]]:
        """Up to `limit` sums of the unit of `after` above it, by key."""
        rollup, column, kind = _ROLLUPS[after.unit]
        async with self._snapshot() as connection:
            # Where statistics are older than most of the table, a plan sorts all that is left for each page: 2 s
            # instead of 0.2 where 240,000 were left.
            await connection.execute("SET LOCAL enable_sort = off")
            rows = await connection.fetch(
                f"""
                SELECT u.tenant_id, u.event_type, u.{column}::timestamptz AS start, sum(u.quantity) AS quantity
                FROM ingest.{rollup} AS u
                WHERE u.org_id = $1 AND (u.tenant_id, u.event_type, u.{column}) > ($2, $3, $4::timestamptz::{kind})
                GROUP BY u.tenant_id, u.event_type, u.{column}
                ORDER BY u.tenant_id, u.event_type, u.{column}
                LIMIT $5
                """,
                org_id,
                after.tenant_id,
                after.event_type,
                after.start,
                limit,
            )
        return [(key_from_row(row, after.unit), row["quantity"]) for row in rows]

    async def read_stored(
        self, org_id: OrgId, keys: Sequence[CounterKey], reservation_ids: Sequence[ReservationId]
    ) -> Stored:
        """All that the counters have to be compared with."""
        async with self._snapshot() as connection:
            committed = await connection.fetch(
                """
                SELECT reservation_id FROM ingest.reservation_outcome
                WHERE org_id = $1 AND reservation_id = ANY($2::uuid[]) AND outcome = 'COMMITTED'
                """,
                org_id,
                reservation_ids,
            )
            given_back = await connection.fetch(
                """
                SELECT org_id, event_id, tenant_id, event_type, occurred_at, quantity FROM ingest.quota_outbox
                WHERE org_id = $1 AND (tenant_id, event_type) IN (SELECT * FROM unnest($2::text[], $3::text[]))
                """,
                org_id,
                [key.tenant_id for key in keys],
                [key.event_type for key in keys],
            )
            return Stored(
                entries=await _sum_rollups(connection, org_id, keys),
                committed={ReservationId(row["reservation_id"]) for row in committed},
                given_back=[given_back_from_row(row) for row in given_back],
            )

    async def find_contradicted(self, org_id: OrgId, keys: Sequence[CounterKey]) -> set[CounterKey]:
        """Those whose rollup is not the sum of its entries (invariant I2). Reads the entries themselves."""
        async with self._snapshot() as connection:
            rollups = await _sum_rollups(connection, org_id, keys)
            entries = await _sum_entries(connection, org_id, keys)
        return {key for key in keys if rollups.get(key, Decimal(0)) != entries.get(key, Decimal(0))}

    @asynccontextmanager
    async def _snapshot(self) -> AsyncIterator[Connection]:
        with unavailable_without_postgres():
            async with (
                self._pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                yield connection


# Both look each key up by itself: LATERAL with a sum leaves no other plan, and so none that reads the organization's
# other tenants while heads are locked.


async def _sum_rollups(connection: Connection, org_id: OrgId, keys: Sequence[CounterKey]) -> dict[CounterKey, Decimal]:
    sums: dict[CounterKey, Decimal] = {}
    for unit, (rollup, column, kind) in _ROLLUPS.items():
        rows = await connection.fetch(
            f"""
            SELECT k.tenant_id, k.event_type, k.start, total.quantity
            FROM unnest($2::text[], $3::text[], $4::timestamptz[]) AS k(tenant_id, event_type, start)
            CROSS JOIN LATERAL (
                SELECT sum(u.quantity) AS quantity FROM ingest.{rollup} AS u
                WHERE u.org_id = $1 AND u.tenant_id = k.tenant_id AND u.event_type = k.event_type
                AND u.{column} = k.start::{kind}
            ) AS total
            WHERE total.quantity IS NOT NULL
            """,
            org_id,
            *_columns([key for key in keys if key.unit is unit]),
        )
        sums |= {key_from_row(row, unit): row["quantity"] for row in rows}
    return sums


async def _sum_entries(connection: Connection, org_id: OrgId, keys: Sequence[CounterKey]) -> dict[CounterKey, Decimal]:
    sums: dict[CounterKey, Decimal] = {}
    for unit in CounterUnit:
        # Up to the last microsecond, and not below the end: that of the first hour of time is its start, -infinity.
        until = f"k.start + interval '1 {unit.value.lower()}' - interval '1 microsecond'"
        rows = await connection.fetch(
            f"""
            SELECT k.tenant_id, k.event_type, k.start, total.quantity
            FROM unnest($2::text[], $3::text[], $4::timestamptz[]) AS k(tenant_id, event_type, start)
            CROSS JOIN LATERAL (
                SELECT sum(entry.quantity) AS quantity
                FROM (
                    SELECT event.quantity
                    FROM ingest.usage_event AS event
                    WHERE event.org_id = $1 AND event.tenant_id = k.tenant_id AND event.event_type = k.event_type
                    AND event.occurred_at BETWEEN k.start AND {until}
                    UNION ALL
                    SELECT correction.quantity_delta
                    FROM ingest.correction AS correction
                    WHERE correction.org_id = $1 AND correction.tenant_id = k.tenant_id
                    AND correction.event_type = k.event_type AND correction.occurred_at BETWEEN k.start AND {until}
                ) AS entry
            ) AS total
            WHERE total.quantity IS NOT NULL
            """,
            org_id,
            *_columns([key for key in keys if key.unit is unit]),
        )
        sums |= {key_from_row(row, unit): row["quantity"] for row in rows}
    return sums


def key_from_row(row: Record, unit: CounterUnit) -> CounterKey:
    """The key of a sum."""
    # asyncpg writes the first moment that Python knows as -infinity, and reads that without a zone.
    return CounterKey(row["tenant_id"], row["event_type"], unit, row["start"].replace(tzinfo=UTC))


def _columns(keys: Sequence[CounterKey]) -> tuple[list[str], list[str], list[datetime]]:
    return [key.tenant_id for key in keys], [key.event_type for key in keys], [key.start for key in keys]
