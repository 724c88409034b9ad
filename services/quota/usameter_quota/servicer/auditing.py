"""The internal `AuditService`."""

from __future__ import annotations

from typing import Any

from usameter.common.v1 import audit_pb2 as common_audit_pb2
from usameter.quota.v1 import audit_pb2, audit_pb2_grpc
from usameter_core.audit import violation_to_proto
from usameter_core.ids import OrgId
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_quota.domain.auditing import AuditPlace
from usameter_quota.service.auditing import LimitAuditingService
from usameter_quota.servicer.admission import uuid_from_proto


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Limits, for the service that audits counters."""

    def __init__(self, service: LimitAuditingService) -> None:
        self._service = service

    async def AuditLimits(self, request: audit_pb2.AuditLimitsRequest, context: Any) -> common_audit_pb2.AuditPage:
        """Whether HARD limits were kept."""
        (place,) = decode_page_token(request.page_token, tuple[AuditPlace]) or (AuditPlace(),)
        audited = await self._service.audit(OrgId(uuid_from_proto(request.org_id, field="org_id")), place)
        return common_audit_pb2.AuditPage(
            checked=audited.checked,
            violations=[violation_to_proto(each) for each in audited.violations],
            next_page_token=None if audited.next_place is None else encode_page_token([audited.next_place]),
        )
