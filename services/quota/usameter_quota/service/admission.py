"""Reserve, settle, adjust: the quota side of recording usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from uuid import UUID

from prometheus_client import Counter

from usameter_core.clock import Clock
from usameter_core.errors import FailedPrecondition, Internal
from usameter_core.ids import OrgId, ReservationId
from usameter_core.logging import get_logger
from usameter_core.metrics import INVARIANT_VIOLATIONS
from usameter_quota.domain.admission import (
    Adjustment,
    OpenReservation,
    Outcome,
    UsageItem,
    Verdict,
    tabulate_usage,
    verdicts_from_findings,
)
from usameter_quota.store.admission import AdmissionStore

log = get_logger()

REQUESTS = Counter("usameter_quota_requests_total", "Requests that were judged.", ["verdict"])


class AdmissionService:
    """Counts every entry, limited or not, and admits what its limits allow (invariant I4)."""

    def __init__(self, *, clock: Clock, store: AdmissionStore) -> None:
        self._clock = clock
        self._store = store

    async def reserve(
        self, org_id: OrgId, reservation_id: ReservationId, requests: Sequence[Sequence[UsageItem]]
    ) -> list[Verdict]:
        """Take quota for a group; one verdict for each request, in order. Idempotent by id.

        Raises:
            InvalidArgument: An item claims a hold of another tenant or event type. Nothing was taken.
            FailedPrecondition: RESERVATION_CLOSED, the id was settled; RESERVATION_DIFFERS, it
                belongs to a group of another size. Nothing was taken.
        """
        reserved = await self._store.reserve(
            org_id,
            reservation_id,
            tabulate_usage(requests),
            request_count=len(requests),
            now=self._clock.now(),
        )
        if reserved.closed_as is not None:
            raise FailedPrecondition(
                "RESERVATION_CLOSED", f"Reservation {reservation_id} was settled as {reserved.closed_as.value}"
            )
        if reserved.request_count != len(requests):
            raise FailedPrecondition(
                "RESERVATION_DIFFERS",
                f"Reservation {reservation_id} holds {reserved.request_count} requests, not {len(requests)}",
            )
        verdicts = verdicts_from_findings(len(requests), reserved.findings)
        refused = sum(not verdict.admitted for verdict in verdicts)
        REQUESTS.labels("refused").inc(refused)
        REQUESTS.labels("admitted").inc(len(verdicts) - refused)
        return verdicts

    async def settle(self, outcomes: Mapping[OrgId, Mapping[ReservationId, Outcome]]) -> None:
        """Close reservations by what became of them, an organization a transaction. Idempotent.

        An unknown id is closed as what is said of it, so that a reserve that comes late is
        refused. To commit one is an error of somebody's (entries are stored that were not
        counted), or a settlement repeated more than a day later; it is logged, counted as a
        violation and accepted: refusing would only have the caller repeat for ever what
        nothing can mend. The audit of I4 shows what is missing.

        Raises:
            Internal: Giving some back would take a counter below zero: it lacks what they
                reserved (I4). They stay open; all others are settled.
            FailedPrecondition: RESERVATION_CONTRADICTED, some are closed with the other
                outcome; they stay that way, and all others are settled.
        """
        contradicted: list[UUID] = []
        refused = 0
        for org_id, of_org in outcomes.items():
            try:
                contradicted += await self._settle(org_id, of_org)
            except Internal:
                # It rolled back all of the organization's, so each is settled on its own.
                for reservation_id, outcome in of_org.items():
                    try:
                        contradicted += await self._settle(org_id, {reservation_id: outcome})
                    except Internal:
                        _report_violation("settlement_below_zero", org_id, reservation_id)
                        refused += 1
        if refused:
            raise Internal(f"I4: {refused} settlements would take a counter below zero")
        if contradicted:
            ids = ", ".join(str(reservation_id) for reservation_id in contradicted)
            raise FailedPrecondition("RESERVATION_CONTRADICTED", f"Settled with the other outcome before: {ids}")

    async def adjust(self, adjustments: Mapping[OrgId, Sequence[Adjustment]]) -> None:
        """Count corrections, an organization a transaction; limits do not matter. Idempotent by id.

        Raises:
            Internal: Some would take a counter below zero: it lacks the entries that they
                correct (I4). They are not counted; all others are.
        """
        refused = 0
        for org_id, of_org in adjustments.items():
            for adjustment_id in await self._store.adjust(org_id, of_org, now=self._clock.now()):
                _report_violation("adjustment_below_zero", org_id, adjustment_id)
                refused += 1
        if refused:
            raise Internal(f"I4: {refused} adjustments would take a counter below zero")

    async def list_open_reservations(self, *, min_age: timedelta, limit: int) -> list[OpenReservation]:
        """Reservations open for at least `min_age`, oldest first, of all organizations."""
        return await self._store.list_open_reservations(created_until=self._clock.now() - min_age, limit=limit)

    async def _settle(self, org_id: OrgId, outcomes: Mapping[ReservationId, Outcome]) -> Sequence[UUID]:
        """Close reservations of one organization; those that are closed with the other outcome."""
        settled = await self._store.settle(org_id, outcomes, now=self._clock.now())
        for reservation_id in settled.unknown_committed:
            _report_violation("unknown_reservation_committed", org_id, reservation_id)
        for reservation_id in settled.contradicted:
            _report_violation("settlement_contradicted", org_id, reservation_id)
        return settled.contradicted


def _report_violation(event: str, org_id: OrgId, subject_id: UUID) -> None:
    INVARIANT_VIOLATIONS.labels("I4").inc()
    log.error(event, org_id=str(org_id), id=str(subject_id))
