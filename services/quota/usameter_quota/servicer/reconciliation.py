"""The internal `ReconciliationService`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from usameter.quota.v1 import reconciliation_pb2, reconciliation_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument, Unavailable
from usameter_core.grpc.texts import nul_violations
from usameter_core.grpc.timestamps import datetime_from_timestamp, datetime_in, timestamp_from_datetime
from usameter_core.ids import OrgId, ReservationId
from usameter_quota.domain.admission import Adjustment
from usameter_quota.domain.reconciliation import CounterKey, CounterUnit, Difference, Stored, StuckReservation
from usameter_quota.service.reconciliation import ReconciliationService
from usameter_quota.servicer.admission import uuid_from_proto

# Whoever records for the tenants of the counters waits meanwhile.
_STORED_SECONDS_MAX = 2.0
_FIRST = datetime.min.replace(tzinfo=UTC)


class ReconciliationServicer(reconciliation_pb2_grpc.ReconciliationServiceServicer):
    """Counters beside what is stored, for the service that stores it."""

    def __init__(self, service: ReconciliationService) -> None:
        self._service = service

    async def ListCounters(
        self, request: reconciliation_pb2.ListCountersRequest, context: Any
    ) -> reconciliation_pb2.ListCountersResponse:
        """Counters by key."""
        counters = await self._service.list_counters(
            OrgId(uuid_from_proto(request.org_id, field="org_id")),
            after=key_from_proto(request.after),
            limit=request.limit,
        )
        return reconciliation_pb2.ListCountersResponse(
            counters=[
                reconciliation_pb2.Counter(key=key_to_proto(key), quantity=canonical(quantity))
                for key, quantity in counters
            ]
        )

    async def CompareCounters(
        self, request_iterator: AsyncIterator[reconciliation_pb2.CompareCountersRequest], context: Any
    ) -> AsyncIterator[reconciliation_pb2.CompareCountersResponse]:
        """Which counters are wrong, said and repaired under their locks."""
        begin = (await _next(request_iterator, "begin")).begin
        org_id = OrgId(uuid_from_proto(begin.org_id, field="begin.org_id"))
        async with self._service.comparing(org_id, [key_from_proto(key) for key in begin.keys]) as comparison:
            yield reconciliation_pb2.CompareCountersResponse(
                open=reconciliation_pb2.CompareOpen(
                    reservation_ids=[str(each) for each in comparison.open_reservations]
                )
            )
            try:
                async with asyncio.timeout(_STORED_SECONDS_MAX):
                    answer = await _next(request_iterator, "stored")
            except TimeoutError:
                raise Unavailable("It took too long to say what is stored; try again", retry_safe=True) from None
            differences = await comparison.find_differences(
                stored_from_proto(answer.stored),
                repaired_by=begin.repaired_by if begin.HasField("repaired_by") else None,
            )
        # After the commit: what is said to be repaired is.
        yield reconciliation_pb2.CompareCountersResponse(
            result=reconciliation_pb2.CompareResult(differences=[difference_to_proto(each) for each in differences])
        )

    async def ListStuckReservations(
        self, request: reconciliation_pb2.ListStuckReservationsRequest, context: Any
    ) -> reconciliation_pb2.ListStuckReservationsResponse:
        """Reservations that nobody settles, and what they hold."""
        reservations = await self._service.list_stuck(
            OrgId(uuid_from_proto(request.org_id, field="org_id")),
            min_age=timedelta(seconds=request.min_age_seconds),
            limit=request.limit,
        )
        return reconciliation_pb2.ListStuckReservationsResponse(
            reservations=[stuck_reservation_to_proto(each) for each in reservations]
        )


async def _next(
    requests: AsyncIterator[reconciliation_pb2.CompareCountersRequest], step: str
) -> reconciliation_pb2.CompareCountersRequest:
    """The next message of a comparison; InvalidArgument where it is not this step, or a text of it contains NUL."""
    request = await anext(requests, None)
    if request is None or request.WhichOneof("step") != step:
        raise InvalidArgument([FieldViolation("step", f"must be {step!r} now")])
    # Validation comes to the messages of a call that has only one.
    violations = nul_violations(request)
    if violations:
        raise InvalidArgument(violations)
    return request


def key_from_proto(key: reconciliation_pb2.CounterKey) -> CounterKey:
    """A counter's key; without a start the first of its unit. InvalidArgument where it is none."""
    try:
        unit = CounterUnit(reconciliation_pb2.CounterUnit.Name(key.unit))
    except ValueError:
        raise InvalidArgument([FieldViolation("unit", "must be HOUR or DAY")]) from None
    return CounterKey(key.tenant_id, key.event_type, unit, datetime_in(key, "start") or _FIRST)


def key_to_proto(key: CounterKey) -> reconciliation_pb2.CounterKey:
    """A counter's key."""
    return reconciliation_pb2.CounterKey(
        tenant_id=key.tenant_id,
        event_type=key.event_type,
        unit=reconciliation_pb2.CounterUnit.Value(key.unit.value),
        start=timestamp_from_datetime(key.start),
    )


def stored_from_proto(message: reconciliation_pb2.CompareStored) -> Stored:
    """What the ledger says of counters; InvalidArgument where an id is none."""
    return Stored(
        entries={key_from_proto(counter.key): Decimal(counter.quantity) for counter in message.entries},
        committed={
            ReservationId(uuid_from_proto(each, field="committed_reservation_ids"))
            for each in message.committed_reservation_ids
        },
        given_back=[
            Adjustment(
                adjustment_id=uuid_from_proto(each.adjustment_id, field="given_back.adjustment_id"),
                tenant_id=each.tenant_id,
                event_type=each.event_type,
                hour=datetime_from_timestamp(each.hour, field="given_back.hour"),
                quantity=Decimal(each.quantity),
            )
            for each in message.given_back
        ],
    )


def difference_to_proto(difference: Difference) -> reconciliation_pb2.CounterDifference:
    """A counter that is wrong."""
    return reconciliation_pb2.CounterDifference(
        key=key_to_proto(difference.key),
        counter=canonical(difference.counter),
        entries=canonical(difference.entries),
        reserved=canonical(difference.reserved),
        expected=canonical(difference.expected),
    )


def stuck_reservation_to_proto(reservation: StuckReservation) -> reconciliation_pb2.StuckReservation:
    """A reservation that nobody settles."""
    return reconciliation_pb2.StuckReservation(
        reservation_id=str(reservation.reservation_id),
        created_at=timestamp_from_datetime(reservation.created_at),
        items=[
            reconciliation_pb2.HeldItem(
                tenant_id=item.tenant_id,
                event_type=item.event_type,
                hour=timestamp_from_datetime(item.hour),
                quantity=canonical(item.quantity),
            )
            for item in reservation.items
        ],
    )
