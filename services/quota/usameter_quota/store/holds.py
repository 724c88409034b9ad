"""Holds in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import asyncpg

from usameter_core.errors import Internal
from usameter_core.ids import OrgId, ReservationId
from usameter_core.period import hour_start
from usameter_quota.domain.admission import Finding
from usameter_quota.domain.holds import Hold, HoldState, HoldTerms, hold_id_of
from usameter_quota.store.findings import findings_from_json
from usameter_quota.store.statement import fetch

if TYPE_CHECKING:
    from asyncpg import Record

    from usameter_core.postgres.pool import Pool


@dataclass(frozen=True, slots=True)
class DueHold:
    """A hold that is to be given back."""

    org_id: OrgId
    hold_id: ReservationId
    expires_at: datetime


class HoldStore:
    """Makes holds and gives them back. Every method raises Unavailable without the database."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def hold(self, org_id: OrgId, public_id: str, terms: HoldTerms, *, now: datetime) -> list[Finding]:
        """Make a hold, if its limit admits it and its id is not known; what refuses it, if that does."""
        rows = await fetch(
            self._pool,
            "SELECT quota.hold($1, $2, $3, $4, $5, $6, $7, $8, $9) AS findings",
            org_id,
            hold_id_of(org_id, public_id),
            public_id,
            now,
            now + terms.ttl,
            terms.tenant_id,
            terms.event_type,
            hour_start(now),
            terms.quantity,
        )
        return findings_from_json(rows[0]["findings"])

    async def find(self, org_id: OrgId, public_id: str) -> Hold | None:
        """The hold, until a day after it was closed."""
        rows = await fetch(
            self._pool,
            """
            SELECT public_id, state, claimed_by IS NOT NULL AS claimed, tenant_ids, event_types, held_quantity,
                created_at, expires_at, findings
            FROM quota.reservation
            WHERE org_id = $1 AND reservation_id = $2
            """,
            org_id,
            hold_id_of(org_id, public_id),
        )
        return hold_from_row(rows[0]) if rows else None

    async def cancel(self, org_id: OrgId, public_id: str, *, now: datetime) -> None:
        """Give the hold back, unless it is closed or claimed; an unknown id is cancelled from now on."""
        await fetch(
            self._pool,
            "SELECT quota.cancel_hold($1, $2, $3, $4)",
            org_id,
            hold_id_of(org_id, public_id),
            public_id,
            now,
        )

    async def list_due(self, *, until: datetime, after: DueHold | None, limit: int) -> list[DueHold]:
        """Up to `limit` holds, of all organizations, that expire at or before that moment and are not claimed.

        Args:
            after: Those above it, in the order of their expiry and ids; None: the first.
        """
        rows = await fetch(
            self._pool,
            """
            SELECT org_id, reservation_id, expires_at
            FROM quota.reservation
            WHERE state = 'OPEN' AND public_id IS NOT NULL AND claimed_by IS NULL AND expires_at <= $1
                AND ($2::timestamptz IS NULL OR (expires_at, reservation_id) > ($2, $3::uuid))
            ORDER BY expires_at, reservation_id
            LIMIT $4
            """,
            until,
            after and after.expires_at,
            after and after.hold_id,
            limit,
        )
        return [DueHold(*row) for row in rows]

    async def expire(self, org_id: OrgId, hold_ids: Sequence[ReservationId], *, now: datetime) -> int:
        """Give holds of an organization back that nobody did in the meantime; how many that were.

        Raises:
            Internal: A counter is smaller than what is to be given back; all of them stay.
        """
        try:
            rows = await fetch(
                self._pool,
                "SELECT quota.give_holds_back($1, $2, $3, 'EXPIRED') AS count",
                org_id,
                now,
                hold_ids,
            )
        except asyncpg.CheckViolationError as error:
            raise Internal(f"I4: {error.constraint_name} while giving holds back") from error
        return int(rows[0]["count"])


def hold_from_row(row: Record) -> Hold:
    """The only reader of a hold's row."""
    terms = None
    if row["held_quantity"] is not None:
        terms = HoldTerms(
            tenant_id=row["tenant_ids"][0],
            event_type=row["event_types"][0],
            quantity=row["held_quantity"],
            ttl=row["expires_at"] - row["created_at"],
        )
    state = row["state"]
    return Hold(
        public_id=row["public_id"],
        state=HoldState.HELD if state == "OPEN" else HoldState(state),
        claimed=state == "OPEN" and row["claimed"],
        terms=terms,
        created_at=row["created_at"],
        warnings=findings_from_json(row["findings"]),
    )
