"""ReconciliationService: see usameter/ingest/v1/reconciliation.proto."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import grpc.aio

from usameter.ingest.v1 import reconciliation_pb2, reconciliation_pb2_grpc
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import format_timestamp
from usameter_ingest.domain.reconciliation import CounterKey, CounterUnit, Difference
from usameter_ingest.service.reconciling import ReconcilingService, SettledReservation


class ReconciliationServicer(reconciliation_pb2_grpc.ReconciliationServiceServicer):
    """Compares the counters of the caller's organization."""

    def __init__(self, reconciling: ReconcilingService) -> None:
        self._reconciling = reconciling

    async def ReconcileQuotas(
        self, request: reconciliation_pb2.ReconcileQuotasRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> reconciliation_pb2.ReconcileQuotasResponse:
        caller = current_principal()
        place = decode_page_token(request.page_token, tuple[str, str, CounterUnit, datetime])
        page = await self._reconciling.reconcile(
            caller.org_id,
            after=None if place is None else CounterKey(*place),
            fixed_by=caller.api_key_id if request.fix else None,
        )
        return reconciliation_pb2.ReconcileQuotasResponse(
            compared=page.compared,
            differences=[difference_to_proto(each) for each in page.differences],
            stuck_reservations=[settled_reservation_to_proto(each) for each in page.stuck],
            next_page_token=None if page.next_after is None else _token_of(page.next_after),
        )


def difference_to_proto(difference: Difference) -> reconciliation_pb2.QuotaDifference:
    """A counter that is wrong, as the organization sees it."""
    key = difference.key
    return reconciliation_pb2.QuotaDifference(
        tenant_id=key.tenant_id,
        event_type=key.event_type,
        unit=reconciliation_pb2.CounterUnit.Value(key.unit.value),
        start=timestamp_from_datetime(key.start),
        counter=canonical(difference.counter),
        entries=canonical(difference.entries),
        reserved=canonical(difference.reserved),
        expected=canonical(difference.expected),
        fixed=difference.fixed,
    )


def settled_reservation_to_proto(settled: SettledReservation) -> reconciliation_pb2.StuckReservation:
    """A reservation that was stuck."""
    return reconciliation_pb2.StuckReservation(
        reservation_id=str(settled.reservation.reservation_id),
        created_at=timestamp_from_datetime(settled.reservation.created_at),
        held=[
            reconciliation_pb2.HeldQuantity(
                tenant_id=each.tenant_id,
                event_type=each.event_type,
                hour=timestamp_from_datetime(each.hour),
                quantity=canonical(each.quantity),
            )
            for each in settled.reservation.held
        ],
        stored=settled.stored,
        fixed=settled.fixed,
    )


def _token_of(key: CounterKey) -> str:
    return encode_page_token((key.tenant_id, key.event_type, key.unit.value, format_timestamp(key.start)))
