"""AuditService: see usameter/billing/v1/audit.proto."""

from __future__ import annotations

from typing import Any

import grpc.aio

from usameter.billing.v1 import audit_pb2, audit_pb2_grpc
from usameter.common.v1 import audit_pb2 as common_audit_pb2
from usameter_billing.domain.auditing import AuditPlace
from usameter_billing.service.auditing import InvoiceAudits
from usameter_core.audit import audit_page_to_proto
from usameter_core.grpc.context import current_principal
from usameter_core.pages import decode_page_token


class AuditServicer(audit_pb2_grpc.AuditServiceServicer):
    """Audits the invoices of the caller's organization."""

    def __init__(self, audits: InvoiceAudits) -> None:
        self._audits = audits

    async def AuditInvoices(
        self, request: audit_pb2.AuditInvoicesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> common_audit_pb2.AuditPage:
        found, place = decode_page_token(request.page_token, tuple[int, AuditPlace]) or (0, AuditPlace())
        audited = await self._audits.audit(current_principal().org_id, place)
        return audit_page_to_proto(
            "invoices",
            checked=audited.checked,
            violations=audited.violations,
            found_before=found,
            next_place=audited.next_place,
        )
