"""The internal `AdmissionService`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from usameter.quota.v1 import admission_pb2, admission_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.texts import nul_violations
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import OrgId, ReservationId
from usameter_core.period import hour_start
from usameter_quota.domain.admission import Adjustment, Finding, OpenReservation, Outcome, UsageItem, Verdict
from usameter_quota.domain.holds import hold_id_of
from usameter_quota.service.admission import AdmissionService

# A caller may send the sum of many events as one item, so a quantity may be larger than an event's.
_QUANTITY = re.compile(r"-?[0-9]{1,24}(\.[0-9]{1,6})?")
_SECONDS_AN_HOUR = 3600
_OUTCOMES = {
    admission_pb2.OUTCOME_COMMITTED: Outcome.COMMITTED,
    admission_pb2.OUTCOME_ABORTED: Outcome.ABORTED,
}
# Nearly all verdicts; made anew for each they took 2 ms of a group of 1,000.
_PLAIN = Verdict()
_PLAIN_MESSAGE = admission_pb2.Verdict(admitted=True)


class AdmissionServicer(admission_pb2_grpc.AdmissionServiceServicer):
    """Reserve, settle, adjust, for the service that stores entries."""

    # Checked by `require_well_formed`: on its way to the one rule that the contract states for Reserve the general
    # validator looks at every item: 1.2 ms for 1,000, of which this takes a twentieth.
    VALIDATING_METHODS = ("/usameter.quota.v1.AdmissionService/Reserve",)

    def __init__(self, service: AdmissionService) -> None:
        self._service = service

    async def Reserve(self, request: admission_pb2.ReserveRequest, context: Any) -> admission_pb2.ReserveResponse:
        """Takes quota for a group of requests."""
        require_well_formed(request)
        org_id = OrgId(uuid_from_proto(request.org_id, field="org_id"))
        verdicts = await self._service.reserve(
            org_id,
            ReservationId(uuid_from_proto(request.reservation_id, field="reservation_id")),
            requests_from_proto(org_id, request.requests),
        )
        return admission_pb2.ReserveResponse(verdicts=[verdict_to_proto(verdict) for verdict in verdicts])

    async def Settle(self, request: admission_pb2.SettleRequest, context: Any) -> admission_pb2.SettleResponse:
        """Closes reservations."""
        await self._service.settle(settlements_from_proto(request.settlements))
        return admission_pb2.SettleResponse()

    async def Adjust(self, request: admission_pb2.AdjustRequest, context: Any) -> admission_pb2.AdjustResponse:
        """Counts corrections."""
        await self._service.adjust(adjustments_from_proto(request.adjustments))
        return admission_pb2.AdjustResponse()

    async def ListOpenReservations(
        self, request: admission_pb2.ListOpenReservationsRequest, context: Any
    ) -> admission_pb2.ListOpenReservationsResponse:
        """What a crash between reserve and settle left behind."""
        reservations = await self._service.list_open_reservations(
            min_age=timedelta(seconds=request.min_age_seconds), limit=request.limit
        )
        return admission_pb2.ListOpenReservationsResponse(
            reservations=[open_reservation_to_proto(each) for each in reservations]
        )


def require_well_formed(request: admission_pb2.ReserveRequest) -> None:
    """Do nothing if the request keeps the rules of its proto, and no text of it contains NUL.

    Raises:
        InvalidArgument: It does not; every fault is named.
    """
    violations = nul_violations(request)
    if not request.requests:
        violations.append(FieldViolation("requests", "must contain at least 1 item(s)"))
    if violations:
        raise InvalidArgument(violations)


def requests_from_proto(org_id: OrgId, requests: Sequence[admission_pb2.UsageRequest]) -> list[list[UsageItem]]:
    """The requests of a group.

    Raises:
        InvalidArgument: An item has no timestamp, or no quantity above 0; the first such one is named.
    """
    hours = _Hours()
    parsed: list[list[UsageItem]] = []
    for request in requests:
        items: list[UsageItem] = []
        parsed.append(items)
        for item in request.items:
            try:
                quantity = _quantity(item.quantity)
                if quantity <= 0:
                    raise _Malformed("quantity", "must be greater than 0")
                claims = hold_id_of(org_id, item.public_reservation_id) if item.public_reservation_id else None
                items.append(UsageItem(item.tenant_id, item.event_type, hours.hour_of(item), quantity, claims))
            except _Malformed as error:
                raise error.at(f"requests[{len(parsed) - 1}].items[{len(items)}]") from None
    return parsed


def verdict_to_proto(verdict: Verdict) -> admission_pb2.Verdict:
    """What became of a request, for its caller."""
    if verdict == _PLAIN:
        return _PLAIN_MESSAGE
    return admission_pb2.Verdict(
        admitted=verdict.admitted,
        violations=[finding_to_proto(each) for each in verdict.violations],
        warnings=[
            admission_pb2.LimitWarning(code=each.kind.value, status=finding_to_proto(each)) for each in verdict.warnings
        ],
    )


def finding_to_proto(finding: Finding) -> admission_pb2.LimitStatus:
    """A limit as a request met it."""
    return admission_pb2.LimitStatus(
        tenant_id=finding.tenant_id,
        event_type=finding.event_type,
        limit=canonical(finding.limit),
        current=canonical(finding.current),
        requested=canonical(finding.requested),
        reset_at=None if finding.reset_at is None else timestamp_from_datetime(finding.reset_at),
    )


def settlements_from_proto(
    settlements: Sequence[admission_pb2.Settlement],
) -> dict[OrgId, dict[ReservationId, Outcome]]:
    """Outcomes by organization and reservation.

    Raises:
        InvalidArgument: An id is no UUID, or a reservation is said to have had both outcomes.
    """
    outcomes: dict[OrgId, dict[ReservationId, Outcome]] = {}
    for index, settlement in enumerate(settlements):
        path = f"settlements[{index}]"
        org_id = OrgId(uuid_from_proto(settlement.org_id, field=f"{path}.org_id"))
        reservation_id = ReservationId(uuid_from_proto(settlement.reservation_id, field=f"{path}.reservation_id"))
        outcome = _OUTCOMES[settlement.outcome]
        if outcomes.setdefault(org_id, {}).setdefault(reservation_id, outcome) is not outcome:
            raise InvalidArgument([FieldViolation(path, "contradicts an earlier settlement of this call")])
    return outcomes


def adjustments_from_proto(adjustments: Sequence[admission_pb2.Adjustment]) -> dict[OrgId, list[Adjustment]]:
    """Corrections by organization; InvalidArgument names the first that is none."""
    hours = _Hours()
    parsed: dict[OrgId, list[Adjustment]] = {}
    for index, adjustment in enumerate(adjustments):
        path = f"adjustments[{index}]"
        org_id = OrgId(uuid_from_proto(adjustment.org_id, field=f"{path}.org_id"))
        try:
            parsed.setdefault(org_id, []).append(
                Adjustment(
                    adjustment_id=uuid_from_proto(adjustment.adjustment_id, field=f"{path}.adjustment_id"),
                    tenant_id=adjustment.tenant_id,
                    event_type=adjustment.event_type,
                    hour=hours.hour_of(adjustment),
                    quantity=_quantity(adjustment.quantity),
                )
            )
        except _Malformed as error:
            raise error.at(path) from None
    return parsed


def open_reservation_to_proto(reservation: OpenReservation) -> admission_pb2.OpenReservation:
    """A reservation that nobody has settled."""
    return admission_pb2.OpenReservation(
        org_id=str(reservation.org_id),
        reservation_id=str(reservation.reservation_id),
        created_at=timestamp_from_datetime(reservation.created_at),
    )


def uuid_from_proto(text: str, *, field: str) -> UUID:
    """The UUID; InvalidArgument names `field`."""
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument([FieldViolation(field, "must be a UUID")]) from None


class _Malformed(Exception):
    """A fault of one item; `at` says where it is. Paths are not formatted for the thousands without fault."""

    def __init__(self, field: str, description: str) -> None:
        self.field = field
        self.description = description
        super().__init__(description)

    def at(self, path: str) -> InvalidArgument:
        return InvalidArgument([FieldViolation(f"{path}.{self.field}", self.description)])


class _Hours:
    """Hours of timestamps; each hour is worked out once a call, since most items share one."""

    def __init__(self) -> None:
        self._known: dict[int, datetime] = {}

    def hour_of(self, item: admission_pb2.UsageItem | admission_pb2.Adjustment) -> datetime:
        if not item.HasField("timestamp"):
            raise _Malformed("timestamp", "is required")
        number = item.timestamp.seconds // _SECONDS_AN_HOUR
        hour = self._known.get(number)
        if hour is None:
            try:
                hour = hour_start(item.timestamp.ToDatetime(UTC))
            except (ValueError, OverflowError):
                raise _Malformed("timestamp", "is out of range") from None
            self._known[number] = hour
        return hour


# The same few quantities come again and again; an exception is not kept.
@lru_cache(maxsize=1024)
def _quantity(text: str) -> Decimal:
    if _QUANTITY.fullmatch(text) is None:
        raise _Malformed("quantity", "must be a decimal with at most 6 decimals")
    return Decimal(text)
