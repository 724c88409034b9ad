"""InvoiceService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usameter.billing.v1 import invoice_pb2, invoice_pb2_grpc
from usameter.common.v1 import job_pb2
from usameter_billing.service.invoices import Invoices
from usameter_billing.service.jobs import BulkJobs
from usameter_billing.service.transitions import Transitions
from usameter_billing.servicer.messages import (
    invoice_to_proto,
    job_to_proto,
    period_from_proto,
    status_from_proto,
)
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import datetime_in
from usameter_core.ids import parse_id
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class InvoiceServicer(invoice_pb2_grpc.InvoiceServiceServicer):
    """See invoice.proto."""

    def __init__(self, *, invoices: Invoices, transitions: Transitions, jobs: BulkJobs) -> None:
        self._invoices = invoices
        self._transitions = transitions
        self._jobs = jobs

    async def CreateInvoice(self, request: invoice_pb2.CreateInvoiceRequest, context: Context) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice = await self._invoices.create(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            bounds=period_from_proto(request.period_start, request.period_end),
        )
        return invoice_to_proto(invoice)

    async def GetInvoice(self, request: invoice_pb2.GetInvoiceRequest, context: Context) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice_id = parse_id("inv", request.invoice_id, field="invoice_id")
        return invoice_to_proto(await self._invoices.get(current_principal().org_id, invoice_id))

    async def ListInvoices(
        self, request: invoice_pb2.ListInvoicesRequest, context: Context
    ) -> invoice_pb2.ListInvoicesResponse:
        """See invoice.proto."""
        page = await self._invoices.list(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            status=status_from_proto(request.status),
            overdue=request.overdue,
            period_start=datetime_in(request, "period_start"),
            period_ends_after=datetime_in(request, "period_ends_after"),
            period_ends_by=datetime_in(request, "period_ends_by"),
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return invoice_pb2.ListInvoicesResponse(
            invoices=[invoice_to_proto(invoice) for invoice in page.invoices],
            next_page_token=page.next_page_token,
        )

    async def FinalizeInvoice(
        self, request: invoice_pb2.FinalizeInvoiceRequest, context: Context
    ) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice_id = parse_id("inv", request.invoice_id, field="invoice_id")
        return invoice_to_proto(await self._invoices.finalize(current_principal().org_id, invoice_id))

    async def VoidInvoice(self, request: invoice_pb2.VoidInvoiceRequest, context: Context) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice_id = parse_id("inv", request.invoice_id, field="invoice_id")
        invoice = await self._transitions.void(current_principal().org_id, invoice_id, reason=request.reason)
        return invoice_to_proto(invoice)

    async def MarkInvoicePaid(
        self, request: invoice_pb2.MarkInvoicePaidRequest, context: Context
    ) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice = await self._transitions.mark_paid(
            current_principal().org_id,
            parse_id("inv", request.invoice_id, field="invoice_id"),
            reference=request.reference if request.HasField("reference") else None,
            paid_at=datetime_in(request, "paid_at"),
        )
        return invoice_to_proto(invoice)

    async def MarkInvoiceUncollectible(
        self, request: invoice_pb2.MarkInvoiceUncollectibleRequest, context: Context
    ) -> invoice_pb2.Invoice:
        """See invoice.proto."""
        invoice_id = parse_id("inv", request.invoice_id, field="invoice_id")
        invoice = await self._transitions.mark_uncollectible(
            current_principal().org_id, invoice_id, reason=request.reason
        )
        return invoice_to_proto(invoice)

    async def BulkGenerateInvoices(
        self, request: invoice_pb2.BulkGenerateInvoicesRequest, context: Context
    ) -> job_pb2.Job:
        """See invoice.proto. The work has only begun, which REST says with 202."""
        job = await self._jobs.start(
            current_principal().org_id,
            bounds=period_from_proto(request.period_start, request.period_end),
            finalize=request.finalize,
        )
        context.set_trailing_metadata((("usameter-http-status", "202"),))
        return job_to_proto(job)

    async def GetJob(self, request: invoice_pb2.GetJobRequest, context: Context) -> job_pb2.Job:
        """See invoice.proto."""
        job_id = parse_id("job", request.job_id, field="job_id")
        return job_to_proto(await self._jobs.get(current_principal().org_id, job_id))
