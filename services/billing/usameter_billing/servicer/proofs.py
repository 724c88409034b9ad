"""InvoiceProofService on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from usameter.billing.v1 import proof_pb2, proof_pb2_grpc
from usameter.ingest.v1 import proof_pb2 as ledger_proof_pb2
from usameter_billing.service.proofs import InvoiceProofs
from usameter_billing.servicer.messages import invoice_to_proto
from usameter_core.grpc.context import current_principal
from usameter_core.ids import format_id, parse_id
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]

_FORMAT = "usameter.invoice-proof.v1"
_PAGE_SNAPSHOTS = 1_000


class InvoiceProofServicer(proof_pb2_grpc.InvoiceProofServiceServicer):
    """See proof.proto."""

    def __init__(self, proofs: InvoiceProofs) -> None:
        self._proofs = proofs

    async def ListInvoiceEvents(
        self, request: proof_pb2.ListInvoiceEventsRequest, context: Context
    ) -> proof_pb2.ListInvoiceEventsResponse:
        """See proof.proto."""
        page = await self._proofs.list_entries(
            current_principal().org_id,
            parse_id("inv", request.invoice_id, field="invoice_id"),
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return proof_pb2.ListInvoiceEventsResponse(events=page.entries, next_page_token=page.next_page_token)

    async def GetInvoiceProof(
        self, request: proof_pb2.GetInvoiceProofRequest, context: Context
    ) -> proof_pb2.InvoiceProof:
        """See proof.proto."""
        page = await self._proofs.prove(
            current_principal().org_id,
            parse_id("inv", request.invoice_id, field="invoice_id"),
            limit=request.limit if request.HasField("limit") else _PAGE_SNAPSHOTS,
            page_token=request.page_token,
        )
        return proof_pb2.InvoiceProof(
            format=_FORMAT,
            invoice=None if page.invoice is None else invoice_to_proto(page.invoice),
            head=page.head,
            snapshots=[_covered(snapshot, invoice_id) for snapshot, invoice_id in page.snapshots],
            epochs=page.epochs,
            next_page_token=page.next_page_token,
        )


def _covered(proof: ledger_proof_pb2.SnapshotProof, invoice_id: UUID | None) -> ledger_proof_pb2.SnapshotProof:
    # Not what ingest was told of it, which may lag.
    if invoice_id is not None:
        proof.invoice_id = format_id("inv", invoice_id)
    return proof
