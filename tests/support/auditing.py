"""The platform's own audits, page by page to the end."""

from __future__ import annotations

from typing import Any

import grpc.aio

from usameter.billing.v1 import audit_pb2 as billing_audit_pb2
from usameter.billing.v1 import audit_pb2_grpc as billing_audit_pb2_grpc
from usameter.common.v1 import audit_pb2
from usameter.ingest.v1 import audit_pb2 as ingest_audit_pb2
from usameter.ingest.v1 import audit_pb2_grpc as ingest_audit_pb2_grpc
from usameter_core.audit import Violation
from usameter_core.ids import OrgId
from usameter_quota.domain.auditing import AuditPlace
from usameter_quota.service.auditing import LimitAuditingService

Metadata = tuple[tuple[str, str], ...]


async def audit_ingest(ingest: grpc.aio.Channel, metadata: Metadata) -> list[audit_pb2.Violation]:
    """What contradicts in an organization's ledger and in its quota counters."""
    stub: Any = ingest_audit_pb2_grpc.AuditServiceStub(ingest)
    ledger = await _audit(stub.AuditLedger, ingest_audit_pb2.AuditLedgerRequest, metadata)
    return ledger + await _audit(stub.AuditQuotas, ingest_audit_pb2.AuditQuotasRequest, metadata)


async def audit_billing(billing: grpc.aio.Channel, metadata: Metadata) -> list[audit_pb2.Violation]:
    """What contradicts in an organization's invoices."""
    stub: Any = billing_audit_pb2_grpc.AuditServiceStub(billing)
    return await _audit(stub.AuditInvoices, billing_audit_pb2.AuditInvoicesRequest, metadata)


def place_of(violation: audit_pb2.Violation) -> dict[str, Any]:
    """Where it is, by the names of what names it."""
    return {field.name: value for field, value in violation.place.ListFields()}


async def audit_limits(auditing: LimitAuditingService, org_id: OrgId) -> tuple[int, list[Violation]]:
    """How many counters of an organization were held against a limit, and what exceeded one."""
    checked, found = 0, list[Violation]()
    place: AuditPlace | None = AuditPlace()
    while place is not None:
        audited = await auditing.audit(org_id, place)
        checked += audited.checked
        found += audited.violations
        place = audited.next_place
    return checked, found


async def _audit(call: Any, new_request: Any, metadata: Metadata) -> list[audit_pb2.Violation]:
    found: list[audit_pb2.Violation] = []
    token: str | None = ""
    while token is not None:
        page = await call(new_request(page_token=token), metadata=metadata, timeout=30)
        found += page.violations
        token = page.next_page_token if page.HasField("next_page_token") else None
    return found
