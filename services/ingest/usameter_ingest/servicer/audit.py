"""AuditService: see usameter/ingest/v1/audit.proto."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc.aio

from usameter.common.v1 import audit_pb2 as common_audit_pb2
from usameter.ingest.v1 import audit_pb2, audit_pb2_grpc
from usameter_core.audit import Violation, audit_page_to_proto
from usameter_core.decimals import canonical
from usameter_core.grpc.context import current_principal
from usameter_core.pages import decode_page_token
from usameter_core.period import format_timestamp
from usameter_ingest.domain.auditing import AuditPlace
from usameter_ingest.domain.reconciliation import CounterKey, CounterUnit, Difference
from usameter_ingest.service.auditing import AuditingService
from usameter_ingest.service.reconciling import ReconcilingService, SettledReservation

# The first page of limits.
_LIMITS = ""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Audits the ledger and the counters of the caller's organization."""

    def __init__(self, *, auditing: AuditingService, reconciling: ReconcilingService) -> None:
        self._auditing = auditing
        self._reconciling = reconciling

    async def AuditLedger(self, request: audit_pb2.AuditLedgerRequest, context: Context) -> common_audit_pb2.AuditPage:
        found, place = decode_page_token(request.page_token, tuple[int, AuditPlace]) or (0, AuditPlace())
        audited = await self._auditing.audit(current_principal().org_id, place)
        return audit_page_to_proto(
            "ledger",
            checked=audited.checked,
            violations=audited.violations,
            found_before=found,
            next_place=audited.next_place,
        )

    async def AuditQuotas(self, request: audit_pb2.AuditQuotasRequest, context: Context) -> common_audit_pb2.AuditPage:
        # First counters, from a key on, then limits, from where a token of quota's says. Whoever finds something
        # counts and logs it.
        org_id = current_principal().org_id
        found, place = decode_page_token(request.page_token, tuple[int, CounterKey | str | None]) or (0, None)
        if isinstance(place, str):
            limits = await self._reconciling.audit_limits(org_id, place)
            return audit_page_to_proto(
                "quotas",
                checked=limits.checked,
                violations=limits.violations,
                found_before=found,
                next_place=limits.next_page_token,
            )
        page = await self._reconciling.reconcile(org_id, after=place, fixed_by=None)
        return audit_page_to_proto(
            "quotas",
            checked=page.compared,
            violations=[
                *(violation_of_difference(each) for each in page.differences),
                *(violation_of_stuck(each) for each in page.stuck),
            ],
            found_before=found,
            next_place=_LIMITS if page.next_after is None else page.next_after,
        )


def violation_of_difference(difference: Difference) -> Violation:
    """A counter that is wrong."""
    key = difference.key
    place: dict[str, str | int] = {"tenant_id": key.tenant_id, "event_type": key.event_type}
    if key.unit is CounterUnit.HOUR:
        place["hour"] = format_timestamp(key.start)
    else:
        place["day"] = key.start.date().isoformat()
    return Violation(
        "I4",
        f"the counter of {'an hour' if key.unit is CounterUnit.HOUR else 'a day'} is not entries and open reservations",
        canonical(difference.expected),
        canonical(difference.counter),
        place,
    )


def violation_of_stuck(settled: SettledReservation) -> Violation:
    """A reservation that is neither consumed nor given back."""
    return Violation(
        "I4",
        "a reservation has been open for longer than settling takes",
        "COMMITTED" if settled.stored else "ABORTED",
        "OPEN",
        {"reservation_id": str(settled.reservation.reservation_id)},
    )
