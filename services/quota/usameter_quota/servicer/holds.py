"""The public `ReservationService`."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

from usameter.quota.v1 import reservation_pb2, reservation_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_quota.domain.admission import Finding
from usameter_quota.domain.holds import TTL_DEFAULT, Hold, HoldTerms
from usameter_quota.service.holds import HoldService


class ReservationServicer(reservation_pb2_grpc.ReservationServiceServicer):
    """Holds of the calling organization."""

    def __init__(self, service: HoldService) -> None:
        self._service = service

    async def ReserveQuota(
        self, request: reservation_pb2.ReserveQuotaRequest, context: Any
    ) -> reservation_pb2.Reservation:
        """Holds quota."""
        public_id = request.reservation_id if request.HasField("reservation_id") else None
        return hold_to_proto(
            await self._service.reserve(current_principal().org_id, public_id, terms_from_proto(request))
        )

    async def GetReservation(
        self, request: reservation_pb2.GetReservationRequest, context: Any
    ) -> reservation_pb2.Reservation:
        """A hold."""
        return hold_to_proto(await self._service.get(current_principal().org_id, request.reservation_id))

    async def CancelReservation(
        self, request: reservation_pb2.CancelReservationRequest, context: Any
    ) -> reservation_pb2.Reservation:
        """Gives a hold back."""
        return hold_to_proto(await self._service.cancel(current_principal().org_id, request.reservation_id))


def terms_from_proto(request: reservation_pb2.ReserveQuotaRequest) -> HoldTerms:
    """The terms of a request that satisfies the rules of its proto.

    Raises:
        InvalidArgument: The quantity is 0.
    """
    quantity = Decimal(request.quantity)
    if not quantity:
        raise InvalidArgument([FieldViolation("quantity", "must be greater than 0")])
    ttl = timedelta(seconds=request.ttl_seconds) if request.HasField("ttl_seconds") else TTL_DEFAULT
    return HoldTerms(request.tenant_id, request.event_type, quantity, ttl)


def hold_to_proto(hold: Hold) -> reservation_pb2.Reservation:
    """A hold as its customer sees it."""
    message = reservation_pb2.Reservation(
        reservation_id=hold.public_id,
        state=reservation_pb2.ReservationState.Value(hold.state.value),
        warnings=[_warning_to_proto(each) for each in hold.warnings],
    )
    if hold.terms is not None:
        message.tenant_id = hold.terms.tenant_id
        message.event_type = hold.terms.event_type
        message.quantity = canonical(hold.terms.quantity)
        message.created_at.CopyFrom(timestamp_from_datetime(hold.created_at))
        message.expires_at.CopyFrom(timestamp_from_datetime(hold.created_at + hold.terms.ttl))
    return message


def _warning_to_proto(finding: Finding) -> reservation_pb2.ReservationWarning:
    return reservation_pb2.ReservationWarning(
        code=finding.kind.value,
        tenant_id=finding.tenant_id,
        event_type=finding.event_type,
        limit=canonical(finding.limit),
        current=canonical(finding.current + finding.requested),
        reset_at=None if finding.reset_at is None else timestamp_from_datetime(finding.reset_at),
    )
