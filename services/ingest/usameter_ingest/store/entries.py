"""Entries: events and their corrections."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import asyncpg

from usameter_core.ids import OrgId, ReservationId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_core.postgres.transaction import run_statement
from usameter_ingest.domain.event import CorrectionKind, StoredEvent, UsageEvent

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool

_EVENT_COLUMNS = """
    event.event_id, event.tenant_id, event.event_type, event.quantity, event.metadata, event.occurred_at,
    event.timestamp_given, event.ingested_at, event.idempotency_key,
    correction.kind, correction.quantity_delta, correction.reason, correction.ingested_at AS corrected_at,
    mark.invoice_id, mark.billed_at"""
_EVENT_TABLES = """
    ingest.usage_event AS event
    LEFT JOIN ingest.correction AS correction USING (org_id, event_id)
    LEFT JOIN ingest.snapshot AS snapshot
        ON snapshot.org_id = event.org_id AND snapshot.epoch = event.epoch
        AND snapshot.tenant_id = event.tenant_id AND snapshot.event_type = event.event_type
        AND snapshot.day = (event.occurred_at AT TIME ZONE 'UTC')::date
    LEFT JOIN ingest.snapshot_mark AS mark
        ON mark.org_id = snapshot.org_id AND mark.snapshot_id = snapshot.snapshot_id"""


# For how long after it was asked for a generation (`ingest.cache_generation`) may be acted upon.
GENERATION_SECONDS = 0.5


class EventAlreadyStored(Exception):
    """Somebody stored one of the events since it was looked up; nothing was written."""


class ReservationGivenAway(Exception):
    """The reservation was aborted since it was made; nothing was written."""


class EntriesRefused(Exception):
    """The database refused what some event holds, which all checks had let pass; nothing was written."""


class CorrectionExists(Exception):
    """The event was corrected before; nothing was written."""


@dataclass(frozen=True, slots=True)
class Found:
    """Those events that were looked up and are stored."""

    # By id.
    events: dict[UUID, StoredEvent] = field(default_factory=dict)
    # In which that is so; None where there are none.
    generation: str | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """The signed entry beside an event."""

    event_id: UUID
    kind: CorrectionKind
    quantity_delta: Decimal
    # What the event counts with it.
    quantity: Decimal
    reason: str
    ingested_at: datetime


@dataclass(frozen=True, slots=True)
class ListedEvent:
    """An event as it is read: with its correction, and the invoice that covers it."""

    event_id: UUID
    tenant_id: str
    event_type: str
    quantity: Decimal
    metadata: str
    occurred_at: datetime
    timestamp_given: bool
    ingested_at: datetime
    idempotency_key: str | None
    correction: Correction | None
    invoice_id: str | None
    billed_at: datetime | None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events; None does not restrict. The time is the event's own, [start, end)."""

    tenant_id: str | None
    event_type: str | None
    start: datetime | None
    end: datetime | None


class EntryStore:
    """Reads and writes entries.

    Args:
        slot: The writer's slice of the rollups: writers with different slots do not wait for each other.
    """

    def __init__(self, pool: Pool, *, slot: int) -> None:
        self._pool = pool
        self._slot = slot

    async def find_stored(self, org_id: OrgId, event_ids: Sequence[UUID]) -> Found:
        """Those of the events that are stored."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                """
                SELECT event_id, request_hash, occurred_at, timestamp_given, voided,
                       (SELECT ingest.cache_generation($1)) AS generation
                FROM ingest.find_events($1, $2)
                """,
                org_id,
                event_ids,
            )
        events = {
            row["event_id"]: StoredEvent(
                row["event_id"],
                row["request_hash"],
                # asyncpg writes the first moment that Python knows as -infinity, and reads that without a zone.
                row["occurred_at"].replace(tzinfo=UTC),
                row["timestamp_given"],
                row["voided"],
            )
            for row in rows
        }
        return Found(events, rows[0]["generation"] if rows else None)

    async def record_events(self, org_id: OrgId, reservation_id: ReservationId, events: Sequence[UsageEvent]) -> str:
        """Commit new events with their rollups and their reservation's outcome; all or nothing.

        Returns the generation that they belong to.

        Raises:
            EventAlreadyStored, ReservationGivenAway: Nothing was written.
            Unavailable: Whether it was committed is unknown; the outcome row knows.
        """
        events = sorted(events, key=lambda event: event.event_id.int)
        generation: str = await self._write(
            """
            SELECT ingest.cache_generation($1)
            FROM ingest.record_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
            """,
            org_id,
            reservation_id,
            self._slot,
            [event.event_id for event in events],
            [event.tenant_id for event in events],
            [event.event_type for event in events],
            [event.quantity_text for event in events],
            [event.occurred_at for event in events],
            [event.timestamp_given for event in events],
            [event.metadata.decode() for event in events],
            [event.idempotency_key for event in events],
            [event.request_hash for event in events],
            [event.leaf_prefix for event in events],
        )
        return generation

    async def record_correction(
        self,
        org_id: OrgId,
        reservation_id: ReservationId | None,
        *,
        event_id: UUID,
        kind: CorrectionKind,
        quantity_delta: Decimal,
        reason: str,
        leaf_prefix: bytes,
    ) -> None:
        """Commit the correction of an event; `reservation_id` is None where it gives back.

        A void returns when nobody acts upon an older generation any more: whoever sends the event again from then on
        is told that it is voided.

        Raises:
            CorrectionExists, ReservationGivenAway: Nothing was written.
            Unavailable: Whether it was committed is unknown.
        """
        await self._write(
            "SELECT ingest.record_correction($1, $2, $3, $4, $5, $6, $7, $8)",
            org_id,
            reservation_id,
            self._slot,
            event_id,
            kind,
            quantity_delta,
            reason,
            leaf_prefix,
        )
        if kind is CorrectionKind.VOID:
            # A tenth more: clocks of two machines differ, and timers may ring a millisecond early.
            await asyncio.sleep(1.1 * GENERATION_SECONDS)

    async def find_event(self, org_id: OrgId, event_id: UUID) -> ListedEvent | None:
        """One event, or None where the organization has none with this id."""
        with unavailable_without_postgres():
            row = await self._pool.fetchrow(
                f"SELECT {_EVENT_COLUMNS} FROM {_EVENT_TABLES} WHERE event.org_id = $1 AND event.event_id = $2",
                org_id,
                event_id,
            )
        return None if row is None else event_from_row(row)

    async def list_events(
        self, org_id: OrgId, which: EventFilter, *, before: tuple[datetime, UUID] | None, limit: int
    ) -> list[ListedEvent]:
        """The latest `limit` events, descending by (occurred_at, event_id), before a key."""
        conditions = ["event.org_id = $1"]
        arguments: list[object] = [org_id]
        for condition, value in (
            ("event.tenant_id = ${}", which.tenant_id),
            ("event.event_type = ${}", which.event_type),
            ("event.occurred_at >= ${}", which.start),
            ("event.occurred_at < ${}", which.end),
        ):
            if value is not None:
                arguments.append(value)
                conditions.append(condition.format(len(arguments)))
        if before is not None:
            arguments.extend(before)
            conditions.append(
                f"(event.occurred_at, event.event_id) < (${len(arguments) - 1}::timestamptz, ${len(arguments)}::uuid)"
            )
        arguments.append(limit)
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                f"""
                SELECT {_EVENT_COLUMNS} FROM {_EVENT_TABLES}
                WHERE {" AND ".join(conditions)}
                ORDER BY event.occurred_at DESC, event.event_id DESC
                LIMIT ${len(arguments)}
                """,
                *arguments,
            )
        return [event_from_row(row) for row in rows]

    async def _write(self, statement: str, *arguments: object) -> Any:
        try:
            return await run_statement(self._pool, statement, *arguments)
        except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.RaiseError) as error:
            raise EntriesRefused from error
        except asyncpg.PostgresError as error:
            match error.sqlstate:
                case "UM001":
                    raise EventAlreadyStored from error
                case "UM002":
                    raise ReservationGivenAway from error
                case "UM003":
                    raise CorrectionExists from error
            raise


def event_from_row(row: Record) -> ListedEvent:
    """The only reader of an event's row."""
    correction = None
    if row["kind"] is not None:
        correction = Correction(
            event_id=row["event_id"],
            kind=CorrectionKind(row["kind"]),
            quantity_delta=row["quantity_delta"],
            quantity=row["quantity"] + row["quantity_delta"],
            reason=row["reason"],
            ingested_at=row["corrected_at"],
        )
    return ListedEvent(
        event_id=row["event_id"],
        tenant_id=row["tenant_id"],
        event_type=row["event_type"],
        quantity=row["quantity"],
        metadata=row["metadata"],
        occurred_at=row["occurred_at"],
        timestamp_given=row["timestamp_given"],
        ingested_at=row["ingested_at"],
        idempotency_key=row["idempotency_key"],
        correction=correction,
        invoice_id=row["invoice_id"],
        billed_at=row["billed_at"],
    )
