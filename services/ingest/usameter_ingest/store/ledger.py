"""The sealed ledger, as it is shown and proven: the chain, snapshots, and the entries behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.ids import OrgId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_ingest.domain.event import CorrectionKind
from usameter_ingest.store.epochs import Snapshot, snapshot_from_row
from usameter_proof.ledger_format import snapshot_id_of

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

# As in sealing: a fetch is at most 25,600 leaves, 0.8 MB and 15 ms of hashing.
_PIECE_LEAVES = 256
_FETCHED_PIECES = 100

_EPOCH_COLUMNS = "epoch, entry_count, snapshot_count, snapshots_root, previous_root, root, sealed_at"
_EVENT_COLUMNS = """
    event_id, false AS is_correction, epoch, tenant_id, event_type, quantity, occurred_at, ingested_at, leaf_hash,
    metadata, timestamp_given, idempotency_key, NULL AS kind, NULL AS reason"""
_CORRECTION_COLUMNS = """
    event_id, true, epoch, tenant_id, event_type, quantity_delta, occurred_at, ingested_at, leaf_hash,
    NULL, NULL, NULL, kind, reason"""
# The entries of a row `snapshot` of an organization $1, by the index of a tenant's time: it reads the tenant's events
# of that day. (The index of the epoch would read everybody's.) OFFSET 0: whatever the planner
# knows of the tables, it does not join them in another way.
_OF_SNAPSHOT = """
    org_id = $1 AND tenant_id = snapshot.tenant_id AND event_type = snapshot.event_type AND epoch = snapshot.epoch
    AND occurred_at >= snapshot.day::timestamptz AND occurred_at < (snapshot.day + 1)::timestamptz"""
_ENTRIES = f"""
    SELECT {_EVENT_COLUMNS} FROM ingest.usage_event WHERE {_OF_SNAPSHOT}
    UNION ALL
    SELECT {_CORRECTION_COLUMNS} FROM ingest.correction WHERE {_OF_SNAPSHOT}
    OFFSET 0"""
# The same without what is not sorted by.
_PLACES = f"""
    SELECT event_id, false AS is_correction FROM ingest.usage_event WHERE {_OF_SNAPSHOT}
    UNION ALL
    SELECT event_id, true FROM ingest.correction WHERE {_OF_SNAPSHOT}
    OFFSET 0"""
_SNAPSHOT_ENTRIES = f"""
    ingest.snapshot AS snapshot CROSS JOIN LATERAL ({_ENTRIES}) AS entry
    WHERE snapshot.org_id = $1 AND snapshot.snapshot_id = $2"""


@dataclass(frozen=True, slots=True)
class LedgerEpoch:
    """A link of the chain: `root` follows from `previous_root` and `snapshots_root`."""

    epoch: int
    entry_count: int
    snapshot_count: int
    snapshots_root: bytes
    previous_root: bytes
    root: bytes
    sealed_at: datetime


@dataclass(frozen=True, slots=True)
class PlacedSnapshot:
    """A snapshot, its place in its epoch's tree, and the invoice that covers it as far as is known here."""

    snapshot: Snapshot
    position: int
    invoice_id: str | None


@dataclass(frozen=True, slots=True)
class EventContent:
    """What an event's leaf covers beside what all entries have."""

    metadata: str
    timestamp_given: bool
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class CorrectionContent:
    """What a correction's leaf covers beside what all entries have."""

    kind: CorrectionKind
    reason: str


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """An event or a correction; `quantity` of a correction is signed."""

    snapshot_id: UUID
    epoch: int
    tenant_id: str
    event_type: str
    event_id: UUID
    quantity: Decimal
    occurred_at: datetime
    ingested_at: datetime
    leaf_hash: bytes
    content: EventContent | CorrectionContent

    @property
    def place(self) -> EntryPlace:
        """Where it stands in its snapshot."""
        return self.event_id, isinstance(self.content, CorrectionContent)


# Event and whether it is its correction: entries of a snapshot, and leaves of its tree, are in this order.
EntryPlace = tuple[UUID, bool]
# Packed: the event's id, and 1 for its correction or 0; in the order of bytes they are in that of leaves.
PLACE_BYTES = 17


class LedgerStore:
    """Reads what was sealed; all of it is append-only."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def find_head(self, org_id: OrgId) -> LedgerEpoch | None:
        """The last sealed epoch; None before the first."""
        with unavailable_without_postgres():
            row = await self._pool.fetchrow(
                f"""
                SELECT {_EPOCH_COLUMNS} FROM ingest.epoch WHERE org_id = $1 AND state = 'SEALED'
                ORDER BY epoch DESC LIMIT 1
                """,
                org_id,
            )
        return None if row is None else ledger_epoch_from_row(row)

    async def list_epochs(self, org_id: OrgId, *, after: int, through: int | None, limit: int) -> list[LedgerEpoch]:
        """Sealed epochs after one and up to another (None: all), ascending."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                f"""
                SELECT {_EPOCH_COLUMNS} FROM ingest.epoch
                WHERE org_id = $1 AND state = 'SEALED' AND epoch > $2 AND ($3::bigint IS NULL OR epoch <= $3)
                ORDER BY epoch LIMIT $4
                """,
                org_id,
                after,
                through,
                limit,
            )
        return [ledger_epoch_from_row(row) for row in rows]

    async def load_snapshots(self, org_id: OrgId, snapshot_ids: Sequence[UUID]) -> dict[UUID, PlacedSnapshot]:
        """Those of the snapshots that there are."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                """
                SELECT snapshot.snapshot_id, snapshot.epoch, snapshot.tenant_id, snapshot.event_type, snapshot.day,
                       snapshot.entry_count, snapshot.quantity, snapshot.root, snapshot.position, mark.invoice_id
                FROM ingest.snapshot AS snapshot LEFT JOIN ingest.snapshot_mark AS mark USING (org_id, snapshot_id)
                WHERE snapshot.org_id = $1 AND snapshot.snapshot_id = ANY($2::uuid[])
                """,
                org_id,
                snapshot_ids,
            )
        return {
            row["snapshot_id"]: PlacedSnapshot(snapshot_from_row(row), row["position"], row["invoice_id"])
            for row in rows
        }

    async def list_entries(
        self, org_id: OrgId, snapshot_ids: Sequence[UUID], *, after: EntryPlace | None, limit: int
    ) -> list[LedgerEntry]:
        """Entries of the snapshots in the order named, each by place; of the first those behind `after`.

        Reads all entries of every snapshot that is named, whatever the limit.
        """
        event_id, is_correction = after or (None, None)
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                f"""
                SELECT asked.snapshot_id, entry.*
                FROM unnest($2::uuid[]) WITH ORDINALITY AS asked (snapshot_id, number)
                CROSS JOIN LATERAL (
                    SELECT epoch, tenant_id, event_type, day FROM ingest.snapshot
                    WHERE org_id = $1 AND snapshot_id = asked.snapshot_id
                    OFFSET 0
                ) AS snapshot
                CROSS JOIN LATERAL ({_ENTRIES}) AS entry
                WHERE asked.number > 1 OR $3::uuid IS NULL
                   OR (entry.event_id, entry.is_correction) > ($3::uuid, $4::boolean)
                ORDER BY asked.number, entry.event_id, entry.is_correction
                LIMIT $5
                """,
                org_id,
                snapshot_ids,
                event_id,
                is_correction,
                limit,
            )
        return [entry_from_row(row, row["snapshot_id"]) for row in rows]

    async def read_places(self, org_id: OrgId, snapshot_id: UUID, *, after: EntryPlace | None, limit: int) -> bytes:
        """The first `limit` places of a snapshot's entries behind `after`, packed. Reads all its entries."""
        event_id, is_correction = after or (None, None)
        with unavailable_without_postgres():
            places: bytes | None = await self._pool.fetchval(
                f"""
                SELECT string_agg(
                    uuid_send(event_id) || set_byte('\\x00', 0, is_correction::integer), ''
                    ORDER BY event_id, is_correction)
                FROM (
                    SELECT place.event_id, place.is_correction
                    FROM ingest.snapshot AS snapshot CROSS JOIN LATERAL ({_PLACES}) AS place
                    WHERE snapshot.org_id = $1 AND snapshot.snapshot_id = $2
                      AND ($3::uuid IS NULL OR (place.event_id, place.is_correction) > ($3::uuid, $4::boolean))
                    ORDER BY place.event_id, place.is_correction LIMIT $5
                ) AS place
                """,
                org_id,
                snapshot_id,
                event_id,
                is_correction,
                limit,
            )
        return places or b""

    async def list_entries_at(
        self, org_id: OrgId, snapshot_id: UUID, places: Sequence[EntryPlace]
    ) -> list[LedgerEntry]:
        """The entries of a snapshot at these places, in their order; each is looked up by its key."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                f"""
                SELECT entry.*
                FROM unnest($2::uuid[], $3::boolean[]) WITH ORDINALITY AS place (event_id, of_correction, number)
                CROSS JOIN LATERAL (
                    SELECT {_EVENT_COLUMNS} FROM ingest.usage_event
                    WHERE org_id = $1 AND event_id = place.event_id AND NOT place.of_correction
                    UNION ALL
                    SELECT {_CORRECTION_COLUMNS} FROM ingest.correction
                    WHERE org_id = $1 AND event_id = place.event_id AND place.of_correction
                    OFFSET 0
                ) AS entry
                ORDER BY place.number
                """,
                org_id,
                [event_id for event_id, _ in places],
                [is_correction for _, is_correction in places],
            )
        return [entry_from_row(row, snapshot_id) for row in rows]

    async def find_entries(self, org_id: OrgId, event_id: UUID) -> list[LedgerEntry]:
        """An event and, where it has one, its correction, sealed or not; nothing where there is no such event."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                f"""
                SELECT {_EVENT_COLUMNS} FROM ingest.usage_event WHERE org_id = $1 AND event_id = $2
                UNION ALL
                SELECT {_CORRECTION_COLUMNS} FROM ingest.correction WHERE org_id = $1 AND event_id = $2
                ORDER BY is_correction
                """,
                org_id,
                event_id,
            )
        return [entry_from_row(row, _snapshot_id_of(org_id, row)) for row in rows]

    async def count_entries_before(self, org_id: OrgId, snapshot_id: UUID, place: EntryPlace) -> int:
        """How many entries of a snapshot stand before a place."""
        with unavailable_without_postgres():
            count: int = await self._pool.fetchval(
                f"SELECT count(*) FROM {_SNAPSHOT_ENTRIES} AND (entry.event_id, entry.is_correction) < ($3, $4)",
                org_id,
                snapshot_id,
                *place,
            )
        return count

    def stream_entry_leaves(self, org_id: OrgId, snapshot_id: UUID) -> AsyncIterator[bytes]:
        """The leaves of a snapshot's tree, packed; a stream."""
        return self._stream(
            f"""
            SELECT string_agg(leaf_hash, '' ORDER BY event_id, is_correction) AS leaves
            FROM (
                SELECT entry.event_id, entry.is_correction, entry.leaf_hash,
                       (row_number() OVER (ORDER BY entry.event_id, entry.is_correction) - 1) / {_PIECE_LEAVES} AS piece
                FROM {_SNAPSHOT_ENTRIES}
            ) AS numbered
            GROUP BY piece ORDER BY piece
            """,
            org_id,
            snapshot_id,
        )

    def stream_snapshot_leaves(self, org_id: OrgId, epoch: int) -> AsyncIterator[bytes]:
        """The leaves of an epoch's tree, packed; a stream."""
        return self._stream(
            f"""
            SELECT string_agg(leaf_hash, '' ORDER BY position) AS leaves
            FROM ingest.snapshot WHERE org_id = $1 AND epoch = $2
            GROUP BY position / {_PIECE_LEAVES} ORDER BY position / {_PIECE_LEAVES}
            """,
            org_id,
            epoch,
        )

    async def _stream(self, query: str, *arguments: object) -> AsyncIterator[bytes]:
        with unavailable_without_postgres():
            async with self._pool.acquire() as connection, connection.transaction(readonly=True):
                cursor = await connection.cursor(query, *arguments)
                while rows := await cursor.fetch(_FETCHED_PIECES):
                    yield b"".join(row["leaves"] for row in rows)


def ledger_epoch_from_row(row: Record) -> LedgerEpoch:
    """The only reader of a link's row."""
    return LedgerEpoch(
        row["epoch"],
        row["entry_count"],
        row["snapshot_count"],
        row["snapshots_root"],
        row["previous_root"],
        row["root"],
        row["sealed_at"],
    )


def entry_from_row(row: Record, snapshot_id: UUID) -> LedgerEntry:
    """The only reader of an entry's row."""
    content: EventContent | CorrectionContent
    if row["is_correction"]:
        content = CorrectionContent(CorrectionKind(row["kind"]), row["reason"])
    else:
        content = EventContent(row["metadata"], row["timestamp_given"], row["idempotency_key"])
    return LedgerEntry(
        snapshot_id=snapshot_id,
        epoch=row["epoch"],
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        event_id=row["event_id"],
        quantity=row["quantity"],
        occurred_at=row["occurred_at"],
        ingested_at=row["ingested_at"],
        leaf_hash=row["leaf_hash"],
        content=content,
    )


def _snapshot_id_of(org_id: OrgId, row: Record) -> UUID:
    return snapshot_id_of(
        org_id=org_id,
        epoch=row["epoch"],
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        day=row["occurred_at"].date(),
    )
