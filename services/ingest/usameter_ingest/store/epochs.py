"""Epochs and snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_core.errors import Unavailable
from usameter_core.ids import OrgId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_proof.ledger_format import ZERO_ROOT

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool

# Waiting longer for the entries under way would hold up those behind us.
_CLOSE_LOCK_TIMEOUT = "100ms"
_CLOSE_ATTEMPTS_MAX = 50
# An epoch is sealed in one transaction, however large it is.
_SEAL_STATEMENT_SECONDS = 3_600
# A fetch of leaves is at most 25,600 of them: 0.8 MB, and 15 ms of hashing between which others have their turn.
_PIECE_LEAVES = 256
_FETCHED_PIECES = 100
_FETCHED_TOTALS = 1_000

# Of an epoch $2 of an organization $1, numbered in the order of the snapshots.
_DAY_TOTALS = """
    SELECT row_number() OVER (ORDER BY tenant_id, event_type, day) AS number, tenant_id, event_type, day,
           sum(event_count + correction_count)::bigint AS entry_count, sum(quantity) AS quantity
    FROM ingest.usage_day WHERE org_id = $1 AND epoch = $2
    GROUP BY tenant_id, event_type, day"""


@dataclass(frozen=True, slots=True)
class SealedEpoch:
    """A closed page of an organization's ledger."""

    org_id: OrgId
    epoch: int
    entry_count: int
    snapshot_count: int
    root: bytes
    sealed_at: datetime


@dataclass(frozen=True, slots=True)
class SealProgress:
    """How far the epochs that one job closed have come.

    Attributes:
        epoch_count: Epochs that it closed.
        sealed: Those of them that are sealed.
        hashed_count: Of the entries of all of them, those that are in a tree already.
        entry_count: All of them.
    """

    job_id: UUID
    epoch_count: int
    sealed: Sequence[SealedEpoch]
    hashed_count: int
    entry_count: int


@dataclass(frozen=True, slots=True)
class DayTotal:
    """What the rollups say of one tenant and event type on one UTC day within an epoch."""

    # From 1, in the order of (tenant, type, day).
    number: int
    tenant_id: str
    event_type: str
    day: date
    entry_count: int
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class LeafPiece:
    """Some consecutive entries of one tenant and event type on one UTC day within an epoch."""

    # That of their DayTotal; None where the rollups have none.
    number: int | None
    # Leaf hashes by event id, an event before its correction; packed, 32 bytes each.
    leaves: bytes
    # Of these entries.
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The entries of one tenant and event type on one UTC day within one epoch."""

    snapshot_id: UUID
    epoch: int
    tenant_id: str
    event_type: str
    day: date
    entry_count: int
    quantity: Decimal
    root: bytes


@dataclass(frozen=True, slots=True)
class NewSnapshot:
    """A snapshot to be written, and its place in the epoch's tree, from 0, with the leaf there."""

    snapshot: Snapshot
    position: int
    leaf_hash: bytes


@dataclass(frozen=True, slots=True)
class SnapshotMark:
    """Which invoice covers a snapshot; None: none any more."""

    snapshot_id: UUID
    invoice_id: str | None
    billed_at: datetime | None
    version: int


class SealStore:
    """One epoch being sealed, in the transaction that seals it; it is closed and nobody else seals it."""

    def __init__(self, connection: Connection, org_id: OrgId, epoch: int, previous_root: bytes) -> None:
        self._connection = connection
        self.org_id = org_id
        self.epoch = epoch
        self.previous_root = previous_root

    async def day_totals(self) -> AsyncIterator[DayTotal]:
        """Totals by number, ascending; a stream."""
        async for row in self._stream(f"{_DAY_TOTALS} ORDER BY number", _FETCHED_TOTALS):
            yield DayTotal(
                row["number"], row["tenant_id"], row["event_type"], row["day"], row["entry_count"], row["quantity"]
            )

    async def leaf_pieces(self) -> AsyncIterator[LeafPiece]:
        """All entries of the epoch by number, ascending and None last; a stream of pieces of at most 256."""
        # Sorted by number instead of tenant, type and day: comparing texts takes twice as long as all the rest.
        query = f"""
            WITH total AS ({_DAY_TOTALS}
            ), entry AS (
                SELECT tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date AS day,
                       event_id, 0 AS kind, quantity, leaf_hash
                FROM ingest.usage_event WHERE org_id = $1 AND epoch = $2
                UNION ALL
                SELECT tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date,
                       event_id, 1, quantity_delta, leaf_hash
                FROM ingest.correction WHERE org_id = $1 AND epoch = $2
            ), numbered AS (
                SELECT total.number, entry.event_id, entry.kind, entry.quantity, entry.leaf_hash,
                       (row_number() OVER (PARTITION BY total.number ORDER BY entry.event_id, entry.kind) - 1)
                           / {_PIECE_LEAVES} AS piece
                FROM entry LEFT JOIN total USING (tenant_id, event_type, day)
            )
            SELECT number, string_agg(leaf_hash, '' ORDER BY event_id, kind) AS leaves, sum(quantity) AS quantity
            FROM numbered GROUP BY number, piece ORDER BY number, piece
            """
        async for row in self._stream(query, _FETCHED_PIECES):
            yield LeafPiece(row["number"], row["leaves"], row["quantity"])

    async def add_snapshots(self, written: Sequence[NewSnapshot]) -> None:
        """Write some of the epoch's snapshots."""
        snapshots = [each.snapshot for each in written]
        await self._connection.execute(
            """
            INSERT INTO ingest.snapshot (
                org_id, snapshot_id, epoch, tenant_id, event_type, day, entry_count, quantity, root,
                position, leaf_hash)
            SELECT $1, s.snapshot_id, $2, s.tenant_id, s.event_type, s.day, s.entry_count, s.quantity, s.root,
                   s.position, s.leaf_hash
            FROM unnest($3::uuid[], $4::text[], $5::text[], $6::date[], $7::bigint[], $8::numeric[], $9::bytea[],
                        $10::integer[], $11::bytea[])
                 AS s(snapshot_id, tenant_id, event_type, day, entry_count, quantity, root, position, leaf_hash)
            """,
            self.org_id,
            self.epoch,
            [each.snapshot_id for each in snapshots],
            [each.tenant_id for each in snapshots],
            [each.event_type for each in snapshots],
            [each.day for each in snapshots],
            [each.entry_count for each in snapshots],
            [each.quantity for each in snapshots],
            [each.root for each in snapshots],
            [each.position for each in written],
            [each.leaf_hash for each in written],
        )

    async def finish(self, *, entry_count: int, snapshot_count: int, snapshots_root: bytes, root: bytes) -> None:
        """Write the epoch's root; with the commit it is sealed for ever."""
        await self._connection.execute(
            """
            UPDATE ingest.epoch
            SET state = 'SEALED', sealed_at = clock_timestamp(), entry_count = $3, snapshot_count = $4,
                snapshots_root = $5, previous_root = $6, root = $7
            WHERE org_id = $1 AND epoch = $2
            """,
            self.org_id,
            self.epoch,
            entry_count,
            snapshot_count,
            snapshots_root,
            self.previous_root,
            root,
        )
        await self._connection.execute(
            "DELETE FROM ingest.seal_progress WHERE org_id = $1 AND epoch = $2", self.org_id, self.epoch
        )

    async def _stream(self, query: str, rows_at_once: int) -> AsyncIterator[Record]:
        cursor = await self._connection.cursor(query, self.org_id, self.epoch, timeout=_SEAL_STATEMENT_SECONDS)
        while rows := await cursor.fetch(rows_at_once, timeout=_SEAL_STATEMENT_SECONDS):
            for row in rows:
                yield row


class EpochStore:
    """Reads and writes epochs, snapshots and their marks."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list_open(self) -> list[OrgId]:
        """Organizations that have a ledger."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch("SELECT org_id FROM ingest.epoch WHERE state = 'OPEN' ORDER BY org_id")
        return [OrgId(row["org_id"]) for row in rows]

    async def list_closed(self) -> list[tuple[OrgId, int]]:
        """Epochs that are closed and not sealed, in the order in which they must be sealed."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                "SELECT org_id, epoch FROM ingest.epoch WHERE state = 'CLOSED' ORDER BY org_id, epoch"
            )
        return [(OrgId(row["org_id"]), row["epoch"]) for row in rows]

    async def close(self, org_id: OrgId, *, ingested_before: datetime, job_id: UUID) -> int | None:
        """Close the open epoch if it has an entry ingested before a moment, and open the next.

        Returns the closed epoch, or None. Holds ingest up for milliseconds: it gives up its place
        in the lock's queue after 100 ms and tries again.

        Raises:
            Unavailable: The lock could not be had; try again.
        """
        for attempt in range(_CLOSE_ATTEMPTS_MAX):
            try:
                with unavailable_without_postgres():
                    async with self._pool.acquire() as connection, connection.transaction():
                        await connection.execute(f"SET LOCAL lock_timeout = '{_CLOSE_LOCK_TIMEOUT}'")
                        epoch: int | None = await connection.fetchval(
                            "SELECT ingest.close_epoch($1, $2, $3)", org_id, ingested_before, job_id
                        )
                        return epoch
            except asyncpg.LockNotAvailableError:
                await asyncio.sleep(0.01 * min(attempt, 10))
        raise Unavailable("The ledger is too busy to close its epoch; try again", retry_safe=True)

    @asynccontextmanager
    async def sealing(self, org_id: OrgId, epoch: int) -> AsyncIterator[SealStore | None]:
        """A transaction that seals an epoch; None where it is sealed already.

        Waits for whoever is sealing it now. Leaving without `finish` changes nothing.
        """
        with unavailable_without_postgres():
            async with self._pool.acquire() as connection, connection.transaction():
                state = await connection.fetchval(
                    "SELECT state FROM ingest.epoch WHERE org_id = $1 AND epoch = $2 FOR UPDATE",
                    org_id,
                    epoch,
                    timeout=_SEAL_STATEMENT_SECONDS,
                )
                if state != "CLOSED":
                    yield None
                    return
                previous = await connection.fetchrow(
                    "SELECT state, root FROM ingest.epoch WHERE org_id = $1 AND epoch = $2", org_id, epoch - 1
                )
                if previous is not None and previous["state"] != "SEALED":
                    raise Unavailable(f"Epoch {epoch - 1} has to be sealed first; try again", retry_safe=True)
                # What PostgreSQL knows of its tables may be older than the epoch. A plan for few entries, which
                # compares each of them with every snapshot, would not end with a million.
                await connection.execute("SET LOCAL enable_nestloop = off")
                yield SealStore(connection, org_id, epoch, ZERO_ROOT if previous is None else previous["root"])

    async def note_progress(self, org_id: OrgId, epoch: int, *, entry_count: int) -> None:
        """Say how many entries of an epoch that is being sealed are hashed."""
        with unavailable_without_postgres():
            await self._pool.execute(
                """
                INSERT INTO ingest.seal_progress (org_id, epoch, entry_count) VALUES ($1, $2, $3)
                ON CONFLICT ON CONSTRAINT seal_progress_pkey DO UPDATE SET entry_count = EXCLUDED.entry_count
                """,
                org_id,
                epoch,
                entry_count,
            )

    async def find_progress(self, job_id: UUID) -> SealProgress:
        """How far a job has come; one that closed nothing has no epochs."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                """
                SELECT epoch.org_id, epoch.epoch, epoch.state, epoch.entry_count, epoch.snapshot_count, epoch.root,
                       epoch.sealed_at,
                       coalesce(epoch.entry_count, progress.entry_count, 0) AS hashed_count,
                       coalesce(epoch.entry_count, (
                           SELECT sum(day.event_count + day.correction_count)::bigint FROM ingest.usage_day AS day
                           WHERE day.org_id = epoch.org_id AND day.epoch = epoch.epoch), 0) AS rollup_count
                FROM ingest.epoch AS epoch LEFT JOIN ingest.seal_progress AS progress USING (org_id, epoch)
                WHERE epoch.seal_job_id = $1 ORDER BY epoch.org_id, epoch.epoch
                """,
                job_id,
            )
        return SealProgress(
            job_id=job_id,
            epoch_count=len(rows),
            sealed=[sealed_epoch_from_row(row) for row in rows if row["state"] == "SEALED"],
            hashed_count=sum(row["hashed_count"] for row in rows),
            entry_count=sum(row["rollup_count"] for row in rows),
        )

    async def list_snapshots(
        self, org_id: OrgId, *, after_epoch: int, after: tuple[int, str, str, date] | None, limit: int
    ) -> tuple[list[Snapshot], int]:
        """Sealed snapshots by (epoch, tenant, type, day), and the last sealed epoch (0: none)."""
        key = after or (after_epoch + 1, "", "", date.min)
        with unavailable_without_postgres():
            async with (
                self._pool.acquire() as connection,
                connection.transaction(isolation="repeatable_read"),
            ):
                through = await connection.fetchval(
                    "SELECT coalesce(max(epoch), 0) FROM ingest.epoch WHERE org_id = $1 AND state = 'SEALED'",
                    org_id,
                )
                rows = await connection.fetch(
                    """
                    SELECT snapshot_id, epoch, tenant_id, event_type, day, entry_count, quantity, root
                    FROM ingest.snapshot
                    WHERE org_id = $1
                    AND (epoch, tenant_id, event_type, day) > ($2::bigint, $3::text, $4::text, $5::date)
                    ORDER BY epoch, tenant_id, event_type, day
                    LIMIT $6
                    """,
                    org_id,
                    *key,
                    limit,
                )
        return [snapshot_from_row(row) for row in rows], through

    async def mark(self, org_id: OrgId, marks: Sequence[SnapshotMark]) -> None:
        """Note which invoices cover which snapshots; a mark with a smaller version changes nothing."""
        ordered = sorted(marks, key=lambda mark: mark.snapshot_id.int)
        with unavailable_without_postgres():
            await self._pool.execute(
                """
                INSERT INTO ingest.snapshot_mark AS standing (org_id, snapshot_id, invoice_id, billed_at, version)
                SELECT $1, m.snapshot_id, m.invoice_id, m.billed_at, m.version
                FROM unnest($2::uuid[], $3::text[], $4::timestamptz[], $5::bigint[])
                     AS m(snapshot_id, invoice_id, billed_at, version)
                ON CONFLICT ON CONSTRAINT snapshot_mark_pkey DO UPDATE
                SET invoice_id = EXCLUDED.invoice_id, billed_at = EXCLUDED.billed_at, version = EXCLUDED.version
                WHERE standing.version < EXCLUDED.version
                """,
                org_id,
                [mark.snapshot_id for mark in ordered],
                [mark.invoice_id for mark in ordered],
                [mark.billed_at for mark in ordered],
                [mark.version for mark in ordered],
            )


def sealed_epoch_from_row(row: Record) -> SealedEpoch:
    """The only reader of a sealed epoch's row."""
    return SealedEpoch(
        OrgId(row["org_id"]),
        row["epoch"],
        row["entry_count"],
        row["snapshot_count"],
        row["root"],
        row["sealed_at"],
    )


def snapshot_from_row(row: Record) -> Snapshot:
    """The only reader of a snapshot's row."""
    return Snapshot(
        row["snapshot_id"],
        row["epoch"],
        row["tenant_id"],
        row["event_type"],
        row["day"],
        row["entry_count"],
        row["quantity"],
        row["root"],
    )
