"""What became of reservations, and what quota must still learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_core.ids import OrgId, ReservationId
from usameter_core.postgres.pool import unavailable_without_postgres
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Connection, Pool


class Outcome(StrEnum):
    """What became of the entries that a reservation was made for."""

    COMMITTED = "COMMITTED"
    ABORTED = "ABORTED"


@dataclass(frozen=True, slots=True)
class GivenBack:
    """A quantity, below 0, that a correction takes off counted use."""

    org_id: OrgId
    event_id: UUID
    tenant_id: str
    event_type: str
    occurred_at: datetime
    quantity: Decimal


class OutcomeStore:
    """Reads and writes outcomes and the outbox to quota."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def decide(self, org_id: OrgId, reservation_id: ReservationId) -> Outcome:
        """What became of a reservation: ABORTED from now on, unless its entries are committed.

        A transaction that is still writing them is waited for; one that comes later rolls back.
        """

        async def work(connection: Connection) -> str:
            await connection.execute(
                """
                INSERT INTO ingest.reservation_outcome (org_id, reservation_id, outcome)
                VALUES ($1, $2, 'ABORTED')
                ON CONFLICT ON CONSTRAINT reservation_outcome_pkey DO NOTHING
                """,
                org_id,
                reservation_id,
            )
            outcome: str = await connection.fetchval(
                "SELECT outcome FROM ingest.reservation_outcome WHERE org_id = $1 AND reservation_id = $2",
                org_id,
                reservation_id,
            )
            return outcome

        return Outcome(await run_transaction(self._pool, work))

    async def prune(self, *, older_than: timedelta, still_open: Sequence[tuple[OrgId, ReservationId]]) -> None:
        """Delete outcomes that quota has confirmed: old ones whose reservation is no longer open.

        Over all organizations: a job of the operator's, not of a tenant's request.
        """
        with unavailable_without_postgres():
            await self._pool.execute(
                """
                DELETE FROM ingest.reservation_outcome AS outcome
                WHERE outcome.recorded_at < clock_timestamp() - $1::interval
                AND NOT EXISTS (
                    SELECT FROM unnest($2::uuid[], $3::uuid[]) AS still_open(org_id, reservation_id)
                    WHERE still_open.org_id = outcome.org_id
                    AND still_open.reservation_id = outcome.reservation_id)
                """,
                older_than,
                [org_id for org_id, _ in still_open],
                [reservation_id for _, reservation_id in still_open],
            )

    async def list_given_back(self, limit: int) -> list[GivenBack]:
        """The oldest rows of the outbox, over all organizations."""
        with unavailable_without_postgres():
            rows = await self._pool.fetch(
                """
                SELECT org_id, event_id, tenant_id, event_type, occurred_at, quantity
                FROM ingest.quota_outbox ORDER BY created_at LIMIT $1
                """,
                limit,
            )
        return [given_back_from_row(row) for row in rows]

    async def delete_given_back(self, delivered: Sequence[GivenBack]) -> None:
        """Forget rows that quota has confirmed."""
        with unavailable_without_postgres():
            await self._pool.execute(
                """
                DELETE FROM ingest.quota_outbox AS outbox
                USING unnest($1::uuid[], $2::uuid[]) AS delivered(org_id, event_id)
                WHERE outbox.org_id = delivered.org_id AND outbox.event_id = delivered.event_id
                """,
                [each.org_id for each in delivered],
                [each.event_id for each in delivered],
            )


def given_back_from_row(row: Record) -> GivenBack:
    """The only reader of a row of the outbox."""
    return GivenBack(
        OrgId(row["org_id"]),
        row["event_id"],
        row["tenant_id"],
        row["event_type"],
        row["occurred_at"],
        row["quantity"],
    )
