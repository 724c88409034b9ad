"""The services that ingest calls: quota and identity."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import grpc.aio
import msgspec

from usameter.identity.v1 import tenant_pb2, tenant_pb2_grpc
from usameter.quota.v1 import (
    admission_pb2,
    admission_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    reconciliation_pb2,
    reconciliation_pb2_grpc,
)
from usameter_core.audit import Violation, violation_from_proto
from usameter_core.decimals import canonical
from usameter_core.errors import LimitViolation, Unavailable
from usameter_core.grpc.channels import service_metadata
from usameter_core.grpc.context import remaining_seconds
from usameter_core.grpc.status import peer_errors
from usameter_core.grpc.timestamps import datetime_from_timestamp, datetime_in, timestamp_from_datetime
from usameter_core.ids import OrgId, ReservationId
from usameter_core.period import hour_start
from usameter_ingest.domain.reconciliation import (
    CounterKey,
    CounterUnit,
    Difference,
    HeldQuantity,
    StuckReservation,
)
from usameter_ingest.store.outcomes import GivenBack, Outcome
from usameter_ingest.store.reconciliation import Stored

_CALL_SECONDS_MAX = 10.0
# As long as the gateway waits.
_AUDIT_SECONDS_MAX = 30.0
_KNOWN_TENANTS_MAX = 100_000
# The contract's bound.
_TENANTS_A_CALL_MAX = 5_000


class Usage(msgspec.Struct, frozen=True):
    """A quantity of one tenant and event type at one time. A struct for the reason that `UsageEvent` is one."""

    tenant_id: str
    event_type: str
    occurred_at: datetime
    quantity: Decimal
    # The public reservation that it consumes.
    reservation_id: str | None = None


@dataclass(frozen=True, slots=True)
class LimitWarning:
    """A limit that an admitted request came near or went over."""

    code: str
    tenant_id: str
    event_type: str
    limit: Decimal
    # The request included.
    current: Decimal
    reset_at: datetime | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request's quota was taken; either all of it was or nothing."""

    violations: Sequence[LimitViolation]
    warnings: Sequence[LimitWarning]


# Nearly all.
_ADMITTED = Verdict((), ())


class QuotaClient:
    """Reserves and settles. See usameter/quota/v1/admission.proto for what each promises."""

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        self._internal_token = internal_token

    async def reserve(
        self, org_id: OrgId, reservation_id: ReservationId, requests: Sequence[Sequence[Usage]]
    ) -> list[Verdict]:
        """Take quota for requests of one organization, each whole or not at all; one verdict each.

        Raises:
            InvalidArgument: One of them names a public reservation of another tenant or event type; nothing was taken.
            Unavailable: Whether it was taken is unknown; settle the reservation to be sure.
        """
        message = admission_pb2.ReserveRequest(
            org_id=str(org_id),
            reservation_id=str(reservation_id),
            requests=_usage_requests(requests),
        )
        with peer_errors("quota"):
            answer = await self._stub.Reserve(
                message,
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(_CALL_SECONDS_MAX),
            )
        return [verdict_from_proto(verdict) for verdict in answer.verdicts]

    async def settle(self, settlements: Sequence[tuple[OrgId, ReservationId, Outcome]]) -> None:
        """Close reservations by what became of them. A retry is safe."""
        message = admission_pb2.SettleRequest(
            settlements=[
                admission_pb2.Settlement(
                    org_id=str(org_id),
                    reservation_id=str(reservation_id),
                    outcome=(
                        admission_pb2.OUTCOME_COMMITTED
                        if outcome is Outcome.COMMITTED
                        else admission_pb2.OUTCOME_ABORTED
                    ),
                )
                for org_id, reservation_id, outcome in settlements
            ]
        )
        with peer_errors("quota"):
            await self._stub.Settle(message, metadata=service_metadata(self._internal_token), timeout=_CALL_SECONDS_MAX)

    async def give_back(self, given_back: Sequence[GivenBack]) -> None:
        """Take what corrections gave back off the counters. A retry is safe."""
        message = admission_pb2.AdjustRequest(
            adjustments=[
                admission_pb2.Adjustment(
                    org_id=str(each.org_id),
                    adjustment_id=str(each.event_id),
                    tenant_id=each.tenant_id,
                    event_type=each.event_type,
                    timestamp=timestamp_from_datetime(each.occurred_at),
                    quantity=canonical(each.quantity),
                )
                for each in given_back
            ]
        )
        with peer_errors("quota"):
            await self._stub.Adjust(message, metadata=service_metadata(self._internal_token), timeout=_CALL_SECONDS_MAX)

    async def list_open(self, *, min_age_seconds: int, limit: int) -> list[tuple[OrgId, ReservationId]]:
        """The oldest reservations that nobody has settled for a while."""
        with peer_errors("quota"):
            answer = await self._stub.ListOpenReservations(
                admission_pb2.ListOpenReservationsRequest(min_age_seconds=min_age_seconds, limit=limit),
                metadata=service_metadata(self._internal_token),
                timeout=_CALL_SECONDS_MAX,
            )
        return [(OrgId(UUID(each.org_id)), ReservationId(UUID(each.reservation_id))) for each in answer.reservations]


@dataclass(frozen=True, slots=True)
class AuditedLimits:
    """What a page of the audit of limits came to; the token is None once everything is compared."""

    checked: int
    violations: Sequence[Violation]
    next_page_token: str | None


class CounterClient:
    """Reads counters and has them compared.

    See usameter/quota/v1/reconciliation.proto, and audit.proto there, for what each promises.
    """

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = reconciliation_pb2_grpc.ReconciliationServiceStub(channel)
        self._audit = audit_pb2_grpc.AuditServiceStub(channel)
        self._internal_token = internal_token

    async def list_counters(self, org_id: OrgId, *, after: CounterKey, limit: int) -> list[tuple[CounterKey, Decimal]]:
        """Up to `limit` counters of the unit of `after` above it, by key."""
        with peer_errors("quota"):
            answer = await self._stub.ListCounters(
                reconciliation_pb2.ListCountersRequest(org_id=str(org_id), after=_key_to_proto(after), limit=limit),
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(_CALL_SECONDS_MAX),
            )
        return [(_key_from_proto(counter.key), Decimal(counter.quantity)) for counter in answer.counters]

    async def compare(
        self,
        org_id: OrgId,
        keys: Sequence[CounterKey],
        read_stored: Callable[[Sequence[ReservationId]], Awaitable[Stored]],
        *,
        repaired_by: str | None,
    ) -> list[Difference]:
        """Those of the counters that are wrong; repaired where `repaired_by` names somebody.

        Args:
            read_stored: Called while the counters stand still, with the reservations that are open on
                them. Whoever records for their tenants waits for it.

        Raises:
            Unavailable: Whether something was repaired is unknown; a retry is safe.
        """
        with peer_errors("quota"):
            call = self._stub.CompareCounters(
                metadata=service_metadata(self._internal_token), timeout=remaining_seconds(_CALL_SECONDS_MAX)
            )
            try:
                begin = reconciliation_pb2.CompareBegin(
                    org_id=str(org_id), keys=[_key_to_proto(key) for key in keys], repaired_by=repaired_by
                )
                await call.write(reconciliation_pb2.CompareCountersRequest(begin=begin))
                opened = (await _read(call)).open
                stored = await read_stored([ReservationId(UUID(each)) for each in opened.reservation_ids])
                # Where quota has ended the call meanwhile, reading says why.
                with suppress(asyncio.InvalidStateError):
                    await call.write(reconciliation_pb2.CompareCountersRequest(stored=_stored_to_proto(stored)))
                result = (await _read(call)).result
            finally:
                # Of a call that has ended this does nothing; else the counters stand still no longer.
                call.cancel()
        return [_difference_from_proto(each, fixed=repaired_by is not None) for each in result.differences]

    async def list_stuck(self, org_id: OrgId, *, min_age_seconds: int, limit: int) -> list[StuckReservation]:
        """The organization's oldest reservations that nobody has settled for a while."""
        with peer_errors("quota"):
            answer = await self._stub.ListStuckReservations(
                reconciliation_pb2.ListStuckReservationsRequest(
                    org_id=str(org_id), min_age_seconds=min_age_seconds, limit=limit
                ),
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(_CALL_SECONDS_MAX),
            )
        return [_stuck_reservation_from_proto(each) for each in answer.reservations]

    async def audit_limits(self, org_id: OrgId, page_token: str) -> AuditedLimits:
        """Whether HARD limits were kept, page by page; quota counts and logs what it finds. Empty token: the first."""
        with peer_errors("quota"):
            page = await self._audit.AuditLimits(
                audit_pb2.AuditLimitsRequest(org_id=str(org_id), page_token=page_token),
                metadata=service_metadata(self._internal_token),
                timeout=remaining_seconds(_AUDIT_SECONDS_MAX),
            )
        return AuditedLimits(
            page.checked,
            [violation_from_proto(each) for each in page.violations],
            page.next_page_token if page.HasField("next_page_token") else None,
        )


class TenantRegistry:
    """Makes tenants known to identity with their first event, and remembers which are."""

    def __init__(self, channel: grpc.aio.Channel, *, internal_token: str) -> None:
        self._stub = tenant_pb2_grpc.TenantServiceStub(channel)
        self._internal_token = internal_token
        self._known: OrderedDict[tuple[OrgId, str], None] = OrderedDict()

    async def ensure(self, org_id: OrgId, tenant_ids: Iterable[str]) -> None:
        """Make sure that tenants exist.

        Raises:
            Unavailable: Identity cannot be reached, and not all of them are known to exist.
        """
        unknown = sorted({tenant_id for tenant_id in tenant_ids if (org_id, tenant_id) not in self._known})
        if not unknown:
            return
        for start in range(0, len(unknown), _TENANTS_A_CALL_MAX):
            with peer_errors("identity"):
                await self._stub.EnsureTenants(
                    tenant_pb2.EnsureTenantsRequest(
                        org_id=str(org_id), tenant_ids=unknown[start : start + _TENANTS_A_CALL_MAX]
                    ),
                    metadata=service_metadata(self._internal_token),
                    timeout=remaining_seconds(_CALL_SECONDS_MAX),
                )
        for tenant_id in unknown:
            self._known[org_id, tenant_id] = None
        while len(self._known) > _KNOWN_TENANTS_MAX:
            self._known.popitem(last=False)


def verdict_from_proto(message: admission_pb2.Verdict) -> Verdict:
    """The verdict in an answer of quota."""
    if message.admitted and not message.warnings:
        return _ADMITTED
    return Verdict(
        violations=[_violation_from_proto(each) for each in message.violations],
        warnings=[_warning_from_proto(each) for each in message.warnings],
    )


def _usage_requests(requests: Sequence[Sequence[Usage]]) -> Any:
    """The requests of a group, as the message takes them: made of dictionaries it is made in half the time."""
    # Most items share an hour.
    hours = {item.occurred_at for items in requests for item in items}
    timestamps = {hour: timestamp_from_datetime(hour) for hour in hours}
    return [
        {
            "items": [
                {
                    "tenant_id": item.tenant_id,
                    "event_type": item.event_type,
                    "timestamp": timestamps[item.occurred_at],
                    "quantity": canonical(item.quantity),
                    "public_reservation_id": item.reservation_id,
                }
                for item in items
            ]
        }
        for items in requests
    ]


def _violation_from_proto(status: admission_pb2.LimitStatus) -> LimitViolation:
    return LimitViolation(
        tenant_id=status.tenant_id,
        event_type=status.event_type,
        limit=Decimal(status.limit),
        current=Decimal(status.current),
        requested=Decimal(status.requested),
        reset_at=_reset_at(status),
    )


def _warning_from_proto(warning: admission_pb2.LimitWarning) -> LimitWarning:
    status = warning.status
    return LimitWarning(
        code=warning.code,
        tenant_id=status.tenant_id,
        event_type=status.event_type,
        limit=Decimal(status.limit),
        current=Decimal(status.current) + Decimal(status.requested),
        reset_at=_reset_at(status),
    )


def _reset_at(status: admission_pb2.LimitStatus) -> datetime | None:
    return datetime_in(status, "reset_at")


_CompareCall = grpc.aio.StreamStreamCall[
    reconciliation_pb2.CompareCountersRequest, reconciliation_pb2.CompareCountersResponse
]


async def _read(call: _CompareCall) -> reconciliation_pb2.CompareCountersResponse:
    answer = await call.read()
    if isinstance(answer, reconciliation_pb2.CompareCountersResponse):
        return answer
    raise Unavailable("The quota service ended a comparison early; try again", retry_safe=True)


def _stored_to_proto(stored: Stored) -> reconciliation_pb2.CompareStored:
    return reconciliation_pb2.CompareStored(
        entries=[
            reconciliation_pb2.Counter(key=_key_to_proto(key), quantity=canonical(quantity))
            for key, quantity in stored.entries.items()
        ],
        committed_reservation_ids=[str(each) for each in stored.committed],
        given_back=[
            reconciliation_pb2.GivenBack(
                adjustment_id=str(each.event_id),
                tenant_id=each.tenant_id,
                event_type=each.event_type,
                hour=timestamp_from_datetime(hour_start(each.occurred_at)),
                quantity=canonical(each.quantity),
            )
            for each in stored.given_back
        ],
    )


def _key_to_proto(key: CounterKey) -> reconciliation_pb2.CounterKey:
    return reconciliation_pb2.CounterKey(
        tenant_id=key.tenant_id,
        event_type=key.event_type,
        unit=reconciliation_pb2.CounterUnit.Value(key.unit.value),
        start=timestamp_from_datetime(key.start),
    )


def _key_from_proto(key: reconciliation_pb2.CounterKey) -> CounterKey:
    unit = CounterUnit(reconciliation_pb2.CounterUnit.Name(key.unit))
    return CounterKey(key.tenant_id, key.event_type, unit, datetime_from_timestamp(key.start, field="start"))


def _difference_from_proto(message: reconciliation_pb2.CounterDifference, *, fixed: bool) -> Difference:
    return Difference(
        key=_key_from_proto(message.key),
        counter=Decimal(message.counter),
        entries=Decimal(message.entries),
        reserved=Decimal(message.reserved),
        expected=Decimal(message.expected),
        fixed=fixed,
    )


def _stuck_reservation_from_proto(message: reconciliation_pb2.StuckReservation) -> StuckReservation:
    return StuckReservation(
        reservation_id=ReservationId(UUID(message.reservation_id)),
        created_at=datetime_from_timestamp(message.created_at, field="created_at"),
        held=[
            HeldQuantity(
                item.tenant_id,
                item.event_type,
                datetime_from_timestamp(item.hour, field="hour"),
                Decimal(item.quantity),
            )
            for item in message.items
        ],
    )
