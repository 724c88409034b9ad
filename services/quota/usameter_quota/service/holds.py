"""Holding quota before the work is done."""

from __future__ import annotations

from usameter_core.clock import Clock
from usameter_core.errors import FailedPrecondition, IdempotencyConflict, LimitViolation, NotFound, QuotaExceeded
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_quota.domain.admission import Finding, verdicts_from_findings
from usameter_quota.domain.holds import Hold, HoldState, HoldTerms
from usameter_quota.store.holds import HoldStore

log = get_logger()


class HoldService:
    """Public reservations of organizations. What consumes them is `AdmissionService`."""

    def __init__(self, *, clock: Clock, store: HoldStore) -> None:
        self._clock = clock
        self._store = store

    async def reserve(self, org_id: OrgId, public_id: str | None, terms: HoldTerms) -> Hold:
        """Hold quota; the hold is HELD. Idempotent by id; None: a fresh one.

        Raises:
            QuotaExceeded: A limit refuses it. Nothing is held, and the id stays free.
            IdempotencyConflict: The id is known, with other terms.
            FailedPrecondition: RESERVATION_CLOSED, it is known and no longer held.
        """
        public_id = public_id or format_id("rsv", new_uuid())
        refused = await self._store.hold(org_id, public_id, terms, now=self._clock.now())
        if refused:
            (verdict,) = verdicts_from_findings(1, refused)
            raise QuotaExceeded([_violation(each) for each in verdict.violations], batch=False)
        hold = await self.get(org_id, public_id)
        if hold.terms is not None and hold.terms != terms:
            raise IdempotencyConflict(field="reservation_id", idempotency_key=public_id, event_id=public_id)
        if hold.state is not HoldState.HELD:
            raise FailedPrecondition("RESERVATION_CLOSED", f"Reservation {public_id} is {hold.state.value}")
        log.info("quota_held")
        return hold

    async def get(self, org_id: OrgId, public_id: str) -> Hold:
        """The hold; NotFound where there is none, or it was closed more than a day ago."""
        hold = await self._store.find(org_id, public_id)
        if hold is None:
            raise NotFound("reservation", public_id)
        return hold

    async def cancel(self, org_id: OrgId, public_id: str) -> Hold:
        """Give it back; it is CANCELLED or EXPIRED. Idempotent.

        An unknown id is cancelled as well, so that a reserve that comes late takes nothing.

        Raises:
            FailedPrecondition: RESERVATION_CONSUMED; RESERVATION_IN_USE, an event that names it is
                being recorded, and may or may not consume it.
        """
        await self._store.cancel(org_id, public_id, now=self._clock.now())
        hold = await self.get(org_id, public_id)
        if hold.state is HoldState.CONSUMED:
            raise FailedPrecondition("RESERVATION_CONSUMED", f"Reservation {public_id} is consumed by an event")
        if hold.state is HoldState.HELD:
            sentence = f"An event that names reservation {public_id} is being recorded; ask again"
            raise FailedPrecondition("RESERVATION_IN_USE", sentence)
        log.info("hold_cancelled")
        return hold


def _violation(finding: Finding) -> LimitViolation:
    return LimitViolation(
        tenant_id=finding.tenant_id,
        event_type=finding.event_type,
        limit=finding.limit,
        current=finding.current,
        requested=finding.requested,
        reset_at=finding.reset_at,
    )
