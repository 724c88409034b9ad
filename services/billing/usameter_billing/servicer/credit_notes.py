"""CreditNoteService and CreditService on the wire."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from usameter.billing.v1 import credit_note_pb2, credit_note_pb2_grpc, credit_pb2, credit_pb2_grpc
from usameter_billing.domain.credit import CreditEntry
from usameter_billing.domain.credit_notes import CreditNote, CreditTerms
from usameter_billing.service.credit_notes import CreditNotes
from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.grpc.context import current_principal
from usameter_core.grpc.timestamps import timestamp_from_datetime
from usameter_core.ids import format_id, parse_id
from usameter_core.money import format_amount
from usameter_core.pages import DEFAULT_LIMIT

if TYPE_CHECKING:
    from typing import Any

    import grpc.aio

    Context = grpc.aio.ServicerContext[Any, Any]


class CreditNoteServicer(credit_note_pb2_grpc.CreditNoteServiceServicer):
    """See credit_note.proto."""

    def __init__(self, credit_notes: CreditNotes) -> None:
        self._credit_notes = credit_notes

    async def CreateCreditNote(
        self, request: credit_note_pb2.CreateCreditNoteRequest, context: Context
    ) -> credit_note_pb2.CreditNote:
        """See credit_note.proto."""
        key = request.idempotency_key if request.HasField("idempotency_key") else None
        note = await self._credit_notes.create(
            current_principal().org_id, terms_from_proto(request), idempotency_key=key
        )
        return credit_note_to_proto(note)

    async def GetCreditNote(
        self, request: credit_note_pb2.GetCreditNoteRequest, context: Context
    ) -> credit_note_pb2.CreditNote:
        """See credit_note.proto."""
        credit_note_id = parse_id("crn", request.credit_note_id, field="credit_note_id")
        return credit_note_to_proto(await self._credit_notes.get(current_principal().org_id, credit_note_id))

    async def ListCreditNotes(
        self, request: credit_note_pb2.ListCreditNotesRequest, context: Context
    ) -> credit_note_pb2.ListCreditNotesResponse:
        """See credit_note.proto."""
        page = await self._credit_notes.list(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            invoice_id=parse_id("inv", request.invoice_id, field="invoice_id") if request.invoice_id else None,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return credit_note_pb2.ListCreditNotesResponse(
            credit_notes=[credit_note_to_proto(note) for note in page.credit_notes],
            next_page_token=page.next_page_token,
        )


class CreditServicer(credit_pb2_grpc.CreditServiceServicer):
    """See credit.proto."""

    def __init__(self, credit_notes: CreditNotes) -> None:
        self._credit_notes = credit_notes

    async def ListCreditBalances(
        self, request: credit_pb2.ListCreditBalancesRequest, context: Context
    ) -> credit_pb2.ListCreditBalancesResponse:
        """See credit.proto."""
        page = await self._credit_notes.balances(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return credit_pb2.ListCreditBalancesResponse(
            credit_balances=[
                credit_pb2.CreditBalance(
                    tenant_id=each.tenant_id,
                    currency=each.currency,
                    balance=format_amount(each.balance, each.currency),
                )
                for each in page.balances
            ],
            next_page_token=page.next_page_token,
        )

    async def ListCreditEntries(
        self, request: credit_pb2.ListCreditEntriesRequest, context: Context
    ) -> credit_pb2.ListCreditEntriesResponse:
        """See credit.proto."""
        page = await self._credit_notes.entries(
            current_principal().org_id,
            tenant_id=request.tenant_id,
            limit=request.limit if request.HasField("limit") else DEFAULT_LIMIT,
            page_token=request.page_token,
        )
        return credit_pb2.ListCreditEntriesResponse(
            credit_entries=[entry_to_proto(entry) for entry in page.entries], next_page_token=page.next_page_token
        )


def terms_from_proto(request: credit_note_pb2.CreateCreditNoteRequest) -> CreditTerms:
    """What is asked for.

    Raises:
        InvalidArgument: There is not exactly one of amount and lines, or an id is none.
    """
    if request.HasField("amount") == bool(request.lines):
        raise InvalidArgument([FieldViolation("amount", "give either amount or lines")])
    return CreditTerms(
        invoice_id=parse_id("inv", request.invoice_id, field="invoice_id"),
        amount=Decimal(request.amount) if request.HasField("amount") else None,
        lines=tuple(
            (parse_id("lin", line.line_id, field=f"lines[{index}].line_id"), Decimal(line.amount))
            for index, line in enumerate(request.lines)
        ),
        reason=request.reason,
    )


def credit_note_to_proto(note: CreditNote) -> credit_note_pb2.CreditNote:
    """A credit note."""
    currency = note.currency
    return credit_note_pb2.CreditNote(
        id=format_id("crn", note.credit_note_id),
        number=f"CN-{note.number}",
        invoice_id=format_id("inv", note.invoice_id),
        tenant_id=note.tenant_id,
        currency=currency,
        lines=[
            credit_note_pb2.CreditNoteLine(
                line_id=format_id("lin", line.line_id),
                amount=format_amount(line.amount, currency),
                tax_rate=canonical(line.tax_rate),
            )
            for line in note.lines
        ],
        subtotal=format_amount(note.subtotal, currency),
        tax=format_amount(note.tax, currency),
        total=format_amount(note.total, currency),
        amount_due_reduced=format_amount(note.amount_due_reduced, currency),
        credit_granted=format_amount(note.credit_granted, currency),
        reason=note.reason,
        issued_at=timestamp_from_datetime(note.issued_at),
    )


def entry_to_proto(entry: CreditEntry) -> credit_pb2.CreditEntry:
    """An entry of a credit ledger."""
    return credit_pb2.CreditEntry(
        id=format_id("cre", entry.entry_id),
        kind=credit_pb2.CreditEntryKind.Value(entry.kind.value),
        currency=entry.currency,
        amount=format_amount(entry.amount, entry.currency),
        invoice_id=format_id("inv", entry.invoice_id),
        credit_note_id=None if entry.credit_note_id is None else format_id("crn", entry.credit_note_id),
        created_at=timestamp_from_datetime(entry.created_at),
    )
