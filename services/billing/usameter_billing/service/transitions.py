"""What becomes of finalized invoices: void, paid, uncollectible.

Each locks the tenant's account first, so that nothing is finalized, credited or paid at the same moment.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.credit import CreditEntry, CreditKind
from usameter_billing.domain.invoice import Invoice, InvoiceStatus
from usameter_billing.domain.transitions import check_transition, check_void
from usameter_billing.service.invoices import load_whole, lock_whole
from usameter_billing.store import credit, credit_notes, ledger, outbox, transitions
from usameter_core.clock import Clock
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.period import format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_core.tasks import Doorbell

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()


class Transitions:
    """Changes the state of finalized invoices. Doing the same again answers with the invoice.

    Args:
        marks: Rung when ingest has something to be told.
    """

    def __init__(self, *, pool: Pool, clock: Clock, marks: Doorbell) -> None:
        self._pool = pool
        self._clock = clock
        self._marks = marks

    async def void(self, org_id: OrgId, invoice_id: UUID, *, reason: str) -> Invoice:
        """Take an invoice back: what it billed is pending again, what it drew is returned.

        Drafts of the tenant are out of date then; finalizing one says so.

        Raises:
            NotFound: There is no such invoice.
            FailedPrecondition: As `check_void`.
        """

        async def work(connection: Connection) -> Invoice:
            now = self._clock.now()
            invoice = await lock_whole(connection, org_id, invoice_id, now=now)
            if invoice.status is InvoiceStatus.VOID:
                return invoice
            change = await credit.load_change(connection, org_id, invoice_id)
            notes = await credit_notes.load_credit_notes_of(connection, org_id, invoice_id)
            balances = await credit.load_credit(connection, org_id, [invoice.tenant_id])
            check_void(
                invoice,
                credited=exact_sum(note.total for note in notes),
                credit_change=change,
                credit_balance=balances.get((invoice.tenant_id, invoice.currency), Decimal(0)),
            )
            await transitions.save_void(connection, org_id, invoice_id, reason=reason, voided_at=now)
            await ledger.uncover_snapshots(connection, org_id, invoice_id)
            await outbox.replace_mark(connection, org_id, invoice_id)
            if change:
                kind = CreditKind.REVOKED if change > 0 else CreditKind.RETURNED
                undone = CreditEntry(
                    new_uuid(), invoice.tenant_id, invoice.currency, kind, CONTEXT.minus(change), invoice_id, None, now
                )
                await credit.add_entries(connection, org_id, [undone])
            return await load_whole(connection, org_id, invoice_id, now=now)

        invoice = await run_transaction(self._pool, work)
        self._marks.ring()
        log.info("invoice_voided", org_id=str(org_id), invoice_id=format_id("inv", invoice_id))
        return invoice

    async def mark_paid(
        self, org_id: OrgId, invoice_id: UUID, *, reference: str | None, paid_at: datetime | None
    ) -> Invoice:
        """Record that what was due has been received; `paid_at` is now unless stated.

        Raises:
            InvalidArgument: `paid_at` lies in the future, or before the invoice was issued.
            NotFound: There is no such invoice.
            FailedPrecondition: INVOICE_DRAFT, INVOICE_VOID; INVOICE_PAID where it is paid under another
                reference, which must be another payment.
        """
        now = self._clock.now()
        if paid_at is not None and paid_at > now:
            raise InvalidArgument([FieldViolation("paid_at", "lies in the future")])

        async def work(connection: Connection) -> Invoice:
            invoice = await lock_whole(connection, org_id, invoice_id, now=now)
            if invoice.status is InvoiceStatus.PAID and invoice.payment_reference == reference:
                return invoice
            check_transition(invoice, InvoiceStatus.PAID)
            assert invoice.issued_at is not None
            if paid_at is not None and paid_at < invoice.issued_at:
                issued = format_timestamp(invoice.issued_at)
                raise InvalidArgument([FieldViolation("paid_at", f"lies before {issued}, when the invoice was issued")])
            # The clock of the replica that issued it may be ahead of ours.
            moment = paid_at or max(now, invoice.issued_at)
            await transitions.save_paid(connection, org_id, invoice_id, reference=reference, paid_at=moment)
            return await load_whole(connection, org_id, invoice_id, now=now)

        return await run_transaction(self._pool, work)

    async def mark_uncollectible(self, org_id: OrgId, invoice_id: UUID, *, reason: str) -> Invoice:
        """Say that an open invoice will not be paid. It stays billed.

        Raises:
            NotFound: There is no such invoice.
            FailedPrecondition: INVOICE_DRAFT, INVOICE_PAID, INVOICE_VOID.
        """
        now = self._clock.now()

        async def work(connection: Connection) -> Invoice:
            invoice = await lock_whole(connection, org_id, invoice_id, now=now)
            if invoice.status is InvoiceStatus.UNCOLLECTIBLE:
                return invoice
            check_transition(invoice, InvoiceStatus.UNCOLLECTIBLE)
            await transitions.save_uncollectible(connection, org_id, invoice_id, reason=reason, uncollectible_at=now)
            return await load_whole(connection, org_id, invoice_id, now=now)

        return await run_transaction(self._pool, work)
