"""What an audit reads: a part of the ledger at one moment, without a lock that others wait for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.audit import VIOLATIONS_MAX
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_ingest.store.epochs import NewSnapshot, snapshot_from_row

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

# As in sealing: a fetch is at most 25,600 leaves, 0.8 MB and 15 ms of hashing.
_PIECE_LEAVES = 256
_FETCHED_PIECES = 100
_FETCHED_SNAPSHOTS = 1_000
# With metadata of 16 KiB each 8 MB; hashing them takes 10 ms, between which others have their turn.
_FETCHED_EVENTS = 500

# The days of a span (see `DaySpan`) in a table whose moment, as a column `at`, is a timestamptz.
_FROM = "org_id = $1 AND (tenant_id, {at}) >= ($2::text, $3::timestamptz)"
_UNTIL = " AND (tenant_id, {at}) < ($4::text, $5::timestamptz)"
_DAY_OF_ENTRY = "(occurred_at AT TIME ZONE 'UTC')::date"


@dataclass(frozen=True, slots=True)
class EpochRow:
    """An epoch as it is stored; what only a sealed one has is None before."""

    epoch: int
    state: str
    entry_count: int | None
    snapshot_count: int | None
    snapshots_root: bytes | None
    previous_root: bytes | None
    root: bytes | None


@dataclass(frozen=True, slots=True)
class Totals:
    """How many and how much."""

    events: int
    corrections: int
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class RollupDifference:
    """A rollup that is not the sum of its entries; `epoch` is None for one of an hour, which has no corrections."""

    tenant_id: str
    event_type: str
    start: datetime
    epoch: int | None
    entries: Totals
    rollup: Totals


@dataclass(frozen=True, slots=True)
class SnapshotDifference:
    """A snapshot and its rollups that are not alike; counts are of events and corrections, None where there is none."""

    tenant_id: str
    event_type: str
    day: date
    rollup_count: int | None
    rollup_quantity: Decimal | None
    snapshot_count: int | None
    snapshot_quantity: Decimal | None


@dataclass(frozen=True, slots=True)
class SnapshotLeaves:
    """Some consecutive leaves of a snapshot, packed, 32 bytes each."""

    snapshot_id: UUID
    epoch: int
    tenant_id: str
    event_type: str
    day: date
    root: bytes
    leaves: bytes


@dataclass(frozen=True, slots=True)
class StoredCorrection:
    """A correction as it is stored."""

    tenant_id: str
    event_type: str
    occurred_at: datetime
    ingested_at: datetime
    epoch: int
    kind: str
    quantity_delta: Decimal
    reason: str
    leaf_hash: bytes


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """An event as it is stored, with its correction where it has one."""

    event_id: UUID
    tenant_id: str
    event_type: str
    quantity: Decimal
    occurred_at: datetime
    timestamp_given: bool
    ingested_at: datetime
    epoch: int
    metadata: str
    idempotency_key: str | None
    request_hash: bytes
    leaf_hash: bytes
    correction: StoredCorrection | None


@dataclass(frozen=True, slots=True)
class DaySpan:
    """Whole UTC days of tenants, in the order of (tenant, day): from one up to another.

    Attributes:
        until: Not included; None: all that follow.
    """

    since: tuple[str, datetime]
    until: tuple[str, datetime] | None

    def within(self, at: str) -> str:
        """The condition on a table whose moment is the expression `at`; its parameters begin with $1."""
        return (_FROM if self.until is None else _FROM + _UNTIL).format(at=at)

    @property
    def parameters(self) -> tuple[object, ...]:
        """Those of the condition from $2 on."""
        return (*self.since, *(self.until or ()))


class LedgerMoment:
    """The ledger of one organization as it was when the transaction began."""

    def __init__(self, connection: Connection, org_id: OrgId) -> None:
        self._connection = connection
        self._org_id = org_id

    async def list_epochs(self, *, since: int, limit: int) -> list[EpochRow]:
        """Epochs from a number on, ascending."""
        rows = await self._connection.fetch(
            """
            SELECT epoch, state, entry_count, snapshot_count, snapshots_root, previous_root, root
            FROM ingest.epoch WHERE org_id = $1 AND epoch >= $2 ORDER BY epoch LIMIT $3
            """,
            self._org_id,
            since,
            limit,
        )
        return [
            EpochRow(
                row["epoch"],
                row["state"],
                row["entry_count"],
                row["snapshot_count"],
                row["snapshots_root"],
                row["previous_root"],
                row["root"],
            )
            for row in rows
        ]

    async def has_entries(self) -> bool:
        """Whether there is any."""
        found: bool = await self._connection.fetchval(
            "SELECT EXISTS (SELECT FROM ingest.usage_event WHERE org_id = $1)", self._org_id
        )
        return found

    async def stream_snapshots(self, epoch: int) -> AsyncIterator[NewSnapshot]:
        """The snapshots of an epoch with their places and leaves, by (tenant, type, day)."""
        query = """
            SELECT snapshot_id, epoch, tenant_id, event_type, day, entry_count, quantity, root, position, leaf_hash
            FROM ingest.snapshot WHERE org_id = $1 AND epoch = $2 ORDER BY tenant_id, event_type, day
            """
        async for row in self._stream(query, epoch, rows_at_once=_FETCHED_SNAPSHOTS):
            yield NewSnapshot(snapshot_from_row(row), row["position"], row["leaf_hash"])

    async def list_snapshot_differences(self, epoch: int) -> list[SnapshotDifference]:
        """Where the snapshots of an epoch are not its rollups; the first so many."""
        rows = await self._connection.fetch(
            """
            SELECT * FROM (
                SELECT tenant_id, event_type, day, sum(event_count + correction_count)::bigint AS rollup_count,
                       sum(quantity) AS rollup_quantity
                FROM ingest.usage_day WHERE org_id = $1 AND epoch = $2 GROUP BY tenant_id, event_type, day
            ) AS rollup FULL JOIN (
                SELECT tenant_id, event_type, day, entry_count AS snapshot_count, quantity AS snapshot_quantity
                FROM ingest.snapshot WHERE org_id = $1 AND epoch = $2
            ) AS snapshot USING (tenant_id, event_type, day)
            WHERE (rollup_count, rollup_quantity) IS DISTINCT FROM (snapshot_count, snapshot_quantity)
            ORDER BY tenant_id, event_type, day LIMIT $3
            """,
            self._org_id,
            epoch,
            VIOLATIONS_MAX,
        )
        return [SnapshotDifference(**dict(row)) for row in rows]

    async def span_from(self, since: tuple[str, datetime], *, entries: int) -> DaySpan:
        """The days that follow, as many as hold that many events or a few more; the last is whole."""
        row = await self._connection.fetchrow(
            f"""
            SELECT tenant_id, date_trunc('day', occurred_at, 'UTC') + interval '1 day' AS until FROM ingest.usage_event
            WHERE {_FROM.format(at="occurred_at")} ORDER BY tenant_id, occurred_at OFFSET $4 LIMIT 1
            """,
            self._org_id,
            *since,
            entries,
        )
        return DaySpan(since, None if row is None else (row["tenant_id"], row["until"]))

    async def count_events(self, span: DaySpan) -> int:
        """Events of a span."""
        count: int = await self._connection.fetchval(
            f"SELECT count(*) FROM ingest.usage_event WHERE {span.within('occurred_at')}",
            self._org_id,
            *span.parameters,
        )
        return count

    async def list_day_differences(self, span: DaySpan) -> list[RollupDifference]:
        """Where the rollups by day and epoch are not the sums of the entries; the first so many."""
        return await self._rollup_differences(
            span,
            rollup="usage_day",
            at="day::timestamptz",
            key="day, epoch",
            of_entry=f"{_DAY_OF_ENTRY} AS day, epoch",
            corrections="sum(correction_count)",
            of_corrections="count(*) FILTER (WHERE is_correction)",
        )

    async def list_hour_differences(self, span: DaySpan) -> list[RollupDifference]:
        """Where the rollups by hour are not the sums of the entries; the first so many."""
        return await self._rollup_differences(
            span,
            rollup="usage_hour",
            at="hour",
            key="hour",
            of_entry="date_trunc('hour', occurred_at, 'UTC') AS hour",
            # Not counted by the hour.
            corrections="0",
            of_corrections="0",
        )

    async def stream_snapshot_leaves(self, span: DaySpan) -> AsyncIterator[SnapshotLeaves]:
        """The leaves of all snapshots of a span, from its entries; those of one snapshot together and in order."""
        query = f"""
            WITH entry AS (
                SELECT epoch, tenant_id, event_type, {_DAY_OF_ENTRY} AS day, event_id, is_correction, leaf_hash
                FROM ({_entries(span)}) AS entry
            ), of_snapshot AS (
                SELECT snapshot_id, epoch, tenant_id, event_type, day, root
                FROM (SELECT DISTINCT epoch, tenant_id, event_type, day FROM entry) AS key
                CROSS JOIN LATERAL (
                    SELECT snapshot_id, root FROM ingest.snapshot
                    WHERE org_id = $1 AND epoch = key.epoch AND tenant_id = key.tenant_id
                    AND event_type = key.event_type AND day = key.day
                    OFFSET 0
                ) AS snapshot
            ), numbered AS (
                SELECT snapshot_id, event_id, is_correction, leaf_hash,
                       (row_number() OVER (PARTITION BY snapshot_id ORDER BY event_id, is_correction) - 1)
                           / {_PIECE_LEAVES} AS piece
                FROM entry JOIN of_snapshot USING (epoch, tenant_id, event_type, day)
            ), piece AS (
                SELECT snapshot_id, piece, string_agg(leaf_hash, '' ORDER BY event_id, is_correction) AS leaves
                FROM numbered GROUP BY snapshot_id, piece
            )
            SELECT snapshot_id, epoch, tenant_id, event_type, day, root, leaves
            FROM piece JOIN of_snapshot USING (snapshot_id) ORDER BY snapshot_id, piece
            """
        async for row in self._stream(query, *span.parameters, rows_at_once=_FETCHED_PIECES):
            yield SnapshotLeaves(**dict(row))

    async def stream_entries(self, *, after: tuple[datetime, UUID], limit: int) -> AsyncIterator[StoredEntry]:
        """Events by (occurred_at, event_id) behind one, each with its correction."""
        query = """
            SELECT event.event_id, event.tenant_id, event.event_type, event.quantity, event.occurred_at,
                   event.timestamp_given, event.ingested_at, event.epoch, event.metadata, event.idempotency_key,
                   event.request_hash, event.leaf_hash,
                   correction.tenant_id AS correction_tenant_id, correction.event_type AS correction_event_type,
                   correction.occurred_at AS correction_occurred_at, correction.ingested_at AS correction_ingested_at,
                   correction.epoch AS correction_epoch, correction.kind, correction.quantity_delta, correction.reason,
                   correction.leaf_hash AS correction_leaf_hash
            FROM ingest.usage_event AS event
            LEFT JOIN LATERAL (
                SELECT * FROM ingest.correction WHERE org_id = $1 AND event_id = event.event_id OFFSET 0
            ) AS correction ON true
            WHERE event.org_id = $1 AND (event.occurred_at, event.event_id) > ($2, $3)
            ORDER BY event.occurred_at, event.event_id LIMIT $4
            """
        async for row in self._stream(query, *after, limit, rows_at_once=_FETCHED_EVENTS):
            yield stored_entry_from_row(row)

    async def _rollup_differences(
        self, span: DaySpan, *, rollup: str, at: str, key: str, of_entry: str, corrections: str, of_corrections: str
    ) -> list[RollupDifference]:
        key = f"tenant_id, event_type, {key}"
        rows = await self._connection.fetch(
            f"""
            SELECT {key}, {at} AS start,
                   coalesce(events, 0) AS events, coalesce(corrections, 0) AS corrections,
                   coalesce(quantity, 0) AS quantity, coalesce(rollup_events, 0) AS rollup_events,
                   coalesce(rollup_corrections, 0) AS rollup_corrections,
                   coalesce(rollup_quantity, 0) AS rollup_quantity
            FROM (
                SELECT tenant_id, event_type, {of_entry}, count(*) FILTER (WHERE NOT is_correction) AS events,
                       {of_corrections} AS corrections, sum(quantity) AS quantity
                FROM ({_entries(span)}) AS entry GROUP BY {key}
            ) AS of_entries FULL JOIN (
                SELECT {key}, sum(event_count)::bigint AS rollup_events, {corrections}::bigint AS rollup_corrections,
                       sum(quantity) AS rollup_quantity
                FROM ingest.{rollup} WHERE {span.within(at)} GROUP BY {key}
            ) AS of_rollups USING ({key})
            WHERE (events, corrections, quantity) IS DISTINCT FROM (rollup_events, rollup_corrections, rollup_quantity)
            ORDER BY {key} LIMIT {VIOLATIONS_MAX}
            """,
            self._org_id,
            *span.parameters,
        )
        return [
            RollupDifference(
                tenant_id=row["tenant_id"],
                event_type=row["event_type"],
                start=_moment(row["start"]),
                epoch=row.get("epoch"),
                entries=Totals(row["events"], row["corrections"], row["quantity"]),
                rollup=Totals(row["rollup_events"], row["rollup_corrections"], row["rollup_quantity"]),
            )
            for row in rows
        ]

    async def _stream(self, query: str, *arguments: object, rows_at_once: int) -> AsyncIterator[Record]:
        cursor = await self._connection.cursor(query, self._org_id, *arguments)
        while rows := await cursor.fetch(rows_at_once):
            for row in rows:
                yield row


class AuditStore:
    """Opens what an audit reads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def moment(self, org_id: OrgId) -> AsyncIterator[LedgerMoment]:
        """A read-only transaction whose statements all see the same."""
        with unavailable_without_postgres():
            async with (
                self._pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                # What PostgreSQL knows of its tables may be older than most of what is in them. Plans for few entries,
                # which compare each with every other or read the whole table for each part, would not end with a
                # million. (LATERAL with OFFSET 0 looks up each row by its key, whatever is known and set.)
                await connection.execute("SET LOCAL enable_nestloop = off; SET LOCAL enable_seqscan = off")
                yield LedgerMoment(connection, org_id)


def stored_entry_from_row(row: Record) -> StoredEntry:
    """The only reader of an audited event's row."""
    correction = None
    if row["kind"] is not None:
        correction = StoredCorrection(
            tenant_id=row["correction_tenant_id"],
            event_type=row["correction_event_type"],
            occurred_at=_moment(row["correction_occurred_at"]),
            ingested_at=row["correction_ingested_at"],
            epoch=row["correction_epoch"],
            kind=row["kind"],
            quantity_delta=row["quantity_delta"],
            reason=row["reason"],
            leaf_hash=row["correction_leaf_hash"],
        )
    return StoredEntry(
        event_id=row["event_id"],
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        quantity=row["quantity"],
        occurred_at=_moment(row["occurred_at"]),
        timestamp_given=row["timestamp_given"],
        ingested_at=row["ingested_at"],
        epoch=row["epoch"],
        metadata=row["metadata"],
        idempotency_key=row["idempotency_key"],
        request_hash=row["request_hash"],
        leaf_hash=row["leaf_hash"],
        correction=correction,
    )


def _entries(span: DaySpan) -> str:
    columns = "tenant_id, event_type, occurred_at, epoch, event_id, leaf_hash"
    return f"""
        SELECT {columns}, quantity, false AS is_correction FROM ingest.usage_event WHERE {span.within("occurred_at")}
        UNION ALL
        SELECT {columns}, quantity_delta, true FROM ingest.correction WHERE {span.within("occurred_at")}"""


def _moment(value: datetime) -> datetime:
    # asyncpg writes the first moment that Python knows as -infinity, and reads that without a zone.
    return value.replace(tzinfo=UTC)
