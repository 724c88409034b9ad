"""InvoiceDocumentService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.api.httpbody_pb2 import HttpBody

from usameter.billing.v1 import document_pb2, document_pb2_grpc, invoice_pb2
from usameter_billing.documents.html import HtmlRenderer
from usameter_billing.documents.lines_csv import lines_csv
from usameter_billing.documents.model import Document, document_of
from usameter_billing.documents.pdf import PdfPrinter
from usameter_billing.service.documents import InvoiceDocuments
from usameter_billing.service.invoices import Invoices
from usameter_billing.servicer.messages import invoice_to_proto
from usameter_core.errors import FailedPrecondition
from usameter_core.grpc.context import current_principal
from usameter_core.ids import parse_id

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]

# Rows of the table, those below the lines included. A PDF of so many takes ten seconds and 350 MB while it is made,
# and has 6 MB, where a message may have 16.
_ROWS_MAX = 4_000
# Of lines alone; 600 bytes each are well below what a message may have.
_CSV_ROWS_MAX = 20_000


class InvoiceDocumentServicer(document_pb2_grpc.InvoiceDocumentServiceServicer):
    """See document.proto."""

    def __init__(self, *, invoices: Invoices, documents: InvoiceDocuments) -> None:
        self._invoices = invoices
        self._documents = documents
        self._printer = PdfPrinter()
        self._renderer = HtmlRenderer()

    async def GetInvoicePdf(self, request: document_pb2.GetInvoicePdfRequest, context: Context) -> HttpBody:
        """See document.proto."""
        invoice, document = await self._document(request.invoice_id)
        _name_file(context, invoice, "inline", "pdf")
        return HttpBody(content_type="application/pdf", data=await self._printer.print(document))

    async def GetInvoiceHtml(self, request: document_pb2.GetInvoiceHtmlRequest, context: Context) -> HttpBody:
        """See document.proto."""
        invoice, document = await self._document(request.invoice_id)
        _name_file(context, invoice, "inline", "html")
        return HttpBody(content_type="text/html; charset=utf-8", data=self._renderer.render(document))

    async def GetInvoiceCsv(self, request: document_pb2.GetInvoiceCsvRequest, context: Context) -> HttpBody:
        """See document.proto."""
        org_id, invoice_id = current_principal().org_id, parse_id("inv", request.invoice_id, field="invoice_id")
        invoice = invoice_to_proto(await self._invoices.get(org_id, invoice_id))
        _refuse_rows(request.invoice_id, len(invoice.lines), _CSV_ROWS_MAX)
        _name_file(context, invoice, "attachment", "csv")
        return HttpBody(content_type="text/csv; charset=utf-8", data=lines_csv(invoice))

    async def _document(self, invoice_id: str) -> tuple[invoice_pb2.Invoice, Document]:
        printed = await self._documents.gather(
            current_principal().org_id, parse_id("inv", invoice_id, field="invoice_id")
        )
        invoice = invoice_to_proto(printed.invoice)
        document = document_of(invoice, parties=printed.parties, root=printed.root)
        _refuse_rows(invoice_id, sum(1 + len(line.parts) for line in document.lines), _ROWS_MAX)
        return invoice, document


def _refuse_rows(invoice_id: str, rows: int, rows_max: int) -> None:
    if rows > rows_max:
        raise FailedPrecondition(
            "DOCUMENT_TOO_LARGE", f"{invoice_id} would have {rows} rows, and at most {rows_max} fit into a document"
        )


def _name_file(context: Context, invoice: invoice_pb2.Invoice, disposition: str, suffix: str) -> None:
    name = f"invoice-{invoice.number}" if invoice.HasField("number") else f"draft-{invoice.id}"
    context.set_trailing_metadata((("content-disposition", f'{disposition}; filename="{name}.{suffix}"'),))
