"""Reservations, settlements and adjustments in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from uuid import UUID

import asyncpg

from usameter_core.errors import FieldViolation, Internal, InvalidArgument
from usameter_core.ids import OrgId, ReservationId
from usameter_quota.domain.admission import Adjustment, Finding, OpenReservation, Outcome, UsageTable
from usameter_quota.store.findings import findings_from_json
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Pool


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation as its id knows it: just made, or by an earlier call.

    Attributes:
        closed_as: What it was settled as; None: it is open.
        request_count: Requests of the group that made it.
    """

    closed_as: Outcome | None
    request_count: int
    findings: list[Finding]


@dataclass(frozen=True, slots=True)
class Settled:
    """What was unexpected about a settlement.

    Attributes:
        contradicted: Closed with the other outcome before; left as they are.
        unknown_committed: Committed, but never reserved (or pruned since).
    """

    contradicted: list[UUID]
    unknown_committed: list[UUID]


class AdmissionStore:
    """Counts use. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def reserve(
        self,
        org_id: OrgId,
        reservation_id: ReservationId,
        usage: UsageTable,
        *,
        request_count: int,
        now: datetime,
    ) -> Reserved:
        """Take what is admitted of a group. For an id that is known nothing is taken.

        Raises:
            InvalidArgument: An item claims a hold of another tenant or event type; nothing was taken.
        """
        try:
            rows = await fetch(
                self._pool,
                """
                SELECT state, request_count, findings
                FROM quota.reserve($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
                """,
                org_id,
                reservation_id,
                now,
                request_count,
                usage.tenant_ids,
                usage.event_types,
                usage.hours,
                usage.totals,
                usage.request_numbers,
                usage.cell_numbers,
                usage.quantities,
                usage.claim_items,
                usage.claim_ids,
            )
        except asyncpg.PostgresError as error:
            if error.sqlstate == "UM101":
                description = f"{error} is of another tenant or event type"
                raise InvalidArgument([FieldViolation("reservation_id", description)]) from error
            raise
        state, count, findings = rows[0]
        return Reserved(None if state == "OPEN" else Outcome(state), count, findings_from_json(findings))

    async def settle(self, org_id: OrgId, outcomes: Mapping[ReservationId, Outcome], *, now: datetime) -> Settled:
        """Close reservations and give back what was aborted; all of them, or none where it raises.

        Raises:
            Internal: A counter is smaller than what is to be given back.
        """
        try:
            rows = await fetch(
                self._pool,
                "SELECT contradicted, unknown_committed FROM quota.settle($1, $2, $3, $4)",
                org_id,
                now,
                list(outcomes),
                [outcome.value for outcome in outcomes.values()],
            )
        except asyncpg.CheckViolationError as error:
            raise Internal(f"I4: {error.constraint_name} while giving back aborted reservations") from error
        return Settled(*rows[0])

    async def adjust(self, org_id: OrgId, adjustments: Sequence[Adjustment], *, now: datetime) -> list[UUID]:
        """Count corrections, each id once; the ids that would take a counter below zero, which are not counted."""
        rows = await fetch(
            self._pool,
            "SELECT quota.adjust($1, $2, $3, $4, $5, $6, $7) AS refused",
            org_id,
            now,
            [each.adjustment_id for each in adjustments],
            [each.tenant_id for each in adjustments],
            [each.event_type for each in adjustments],
            [each.hour for each in adjustments],
            [each.quantity for each in adjustments],
        )
        return list(rows[0]["refused"])

    async def list_open_reservations(self, *, created_until: datetime, limit: int) -> list[OpenReservation]:
        """The oldest open reservations made at or before that moment, of all organizations; no holds."""
        rows = await fetch(
            self._pool,
            """
            SELECT org_id, reservation_id, created_at
            FROM quota.reservation
            WHERE state = 'OPEN' AND public_id IS NULL AND created_at <= $1
            ORDER BY created_at
            LIMIT $2
            """,
            created_until,
            limit,
        )
        return [OpenReservation(row["org_id"], ReservationId(row["reservation_id"]), row["created_at"]) for row in rows]

    async def delete_closed_reservations(self, *, closed_before: datetime, limit: int) -> int:
        """Delete up to `limit` reservations closed before that moment; how many. Open ones stay, however old."""
        rows = await fetch(
            self._pool,
            """
            WITH old AS (
                SELECT org_id, reservation_id
                FROM quota.reservation
                WHERE state <> 'OPEN' AND closed_at < $1
                ORDER BY closed_at
                LIMIT $2
                -- Several replicas prune at once; none waits for another.
                FOR UPDATE SKIP LOCKED
            ),
            deleted AS (
                DELETE FROM quota.reservation AS r
                USING old
                WHERE r.org_id = old.org_id AND r.reservation_id = old.reservation_id
                RETURNING 1
            )
            SELECT count(*) AS deleted FROM deleted
            """,
            closed_before,
            limit,
        )
        return int(rows[0]["deleted"])
