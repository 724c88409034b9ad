"""Correcting: a signed entry beside an event, once."""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID

from usameter_core.errors import (
    AlreadyExists,
    FieldViolation,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    Unavailable,
)
from usameter_core.ids import OrgId, ReservationId, format_id, new_uuid
from usameter_ingest.clients import QuotaClient, Usage
from usameter_ingest.domain.event import CorrectionKind
from usameter_ingest.service.settling import Settler
from usameter_ingest.store.entries import (
    Correction,
    CorrectionExists,
    EntryStore,
    ListedEvent,
    ReservationGivenAway,
)
from usameter_ingest.store.outcomes import Outcome, OutcomeStore
from usameter_proof.ledger_format import correction_leaf_prefix


class CorrectingService:
    """Voids and amends events."""

    def __init__(self, *, entries: EntryStore, outcomes: OutcomeStore, quota: QuotaClient, settler: Settler) -> None:
        self._entries = entries
        self._outcomes = outcomes
        self._quota = quota
        self._settler = settler

    async def void(self, org_id: OrgId, event_id: UUID, *, reason: str) -> Correction:
        """Take an event's whole quantity back.

        Raises:
            NotFound: There is no such event.
            AlreadyExists: It has a correction.
        """
        event = await self._correctable(org_id, event_id)
        return await self._correct(org_id, event, CorrectionKind.VOID, -event.quantity, reason)

    async def amend(self, org_id: OrgId, event_id: UUID, *, quantity: Decimal, reason: str) -> Correction:
        """Replace an event's quantity; one above the recorded needs quota.

        Raises:
            NotFound, AlreadyExists: As for `void`.
            InvalidArgument: It has that quantity already.
            QuotaExceeded: The difference does not fit; nothing was stored.
        """
        event = await self._correctable(org_id, event_id)
        delta = quantity - event.quantity
        if not delta:
            raise InvalidArgument([FieldViolation("quantity", "is what the event has already")])
        return await self._correct(org_id, event, CorrectionKind.AMEND, delta, reason)

    async def _correctable(self, org_id: OrgId, event_id: UUID) -> ListedEvent:
        event = await self._entries.find_event(org_id, event_id)
        if event is None:
            raise NotFound("event", format_id("evt", event_id))
        if event.correction is not None:
            raise _already_corrected(event_id)
        return event

    async def _correct(
        self, org_id: OrgId, event: ListedEvent, kind: CorrectionKind, delta: Decimal, reason: str
    ) -> Correction:
        # Giving back needs no reservation: an outbox row in the same transaction tells quota.
        reservation_id = await self._reserve(org_id, event, delta) if delta > 0 else None
        try:
            await self._entries.record_correction(
                org_id,
                reservation_id,
                event_id=event.event_id,
                kind=kind,
                quantity_delta=delta,
                reason=reason,
                leaf_prefix=correction_leaf_prefix(
                    org_id=org_id,
                    event_id=event.event_id,
                    kind=kind,
                    quantity_delta=delta,
                    reason=reason,
                    occurred_at=event.occurred_at,
                ),
            )
        except CorrectionExists as error:
            self._settle(org_id, reservation_id, Outcome.ABORTED)
            raise _already_corrected(event.event_id) from error
        except ReservationGivenAway as error:
            self._settle(org_id, reservation_id, Outcome.ABORTED)
            raise Unavailable("The correction took too long; try again", retry_safe=True) from error
        except Exception as error:
            # The commit may have succeeded all the same; the outcome row knows, and decides.
            if reservation_id is not None:
                self._settle(org_id, reservation_id, await self._outcomes.decide(org_id, reservation_id))
            if isinstance(error, Unavailable):
                # A correction is once per event, so a retry is safe whether or not it was committed.
                raise Unavailable(str(error), retry_safe=True) from error
            raise
        self._settle(org_id, reservation_id, Outcome.COMMITTED)
        corrected = await self._entries.find_event(org_id, event.event_id)
        assert corrected is not None and corrected.correction is not None, "entries are never deleted"
        return corrected.correction

    def _settle(self, org_id: OrgId, reservation_id: ReservationId | None, outcome: Outcome) -> None:
        if reservation_id is not None:
            self._settler.settle(org_id, reservation_id, outcome)

    async def _reserve(self, org_id: OrgId, event: ListedEvent, delta: Decimal) -> ReservationId:
        reservation_id = ReservationId(new_uuid())
        usage = Usage(event.tenant_id, event.event_type, event.occurred_at, delta)
        try:
            (verdict,) = await self._quota.reserve(org_id, reservation_id, [[usage]])
        except Exception:
            # It may have been taken all the same: nothing will come of it.
            self._settler.settle(org_id, reservation_id, Outcome.ABORTED)
            raise
        if verdict.violations:
            self._settler.settle(org_id, reservation_id, Outcome.ABORTED)
            raise QuotaExceeded(verdict.violations, batch=False)
        return reservation_id


def _already_corrected(event_id: UUID) -> AlreadyExists:
    text = format_id("evt", event_id)
    return AlreadyExists("correction", text, f"{text} has a correction already; an event has at most one")
