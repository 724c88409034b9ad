"""Credit notes on finalized invoices, and the credit that tenants have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.domain.credit import CreditBalance, CreditEntry, CreditKind
from usameter_billing.domain.credit_notes import CreditNote, CreditTerms, compute_credit, credit_note_id_of
from usameter_billing.service.invoices import lock_whole
from usameter_billing.store import credit, transitions
from usameter_billing.store import credit_notes as store
from usameter_core.clock import Clock
from usameter_core.decimals import CONTEXT
from usameter_core.errors import IdempotencyConflict, NotFound
from usameter_core.ids import OrgId, format_id, new_uuid
from usameter_core.logging import get_logger
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.postgres.transaction import run_transaction

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool

log = get_logger()


@dataclass(frozen=True, slots=True)
class CreditNotePage:
    """Some credit notes, and the token of those after them; None on the last page."""

    credit_notes: Sequence[CreditNote]
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class BalancePage:
    """Some balances, and the token of those after them; None on the last page."""

    balances: Sequence[CreditBalance]
    next_page_token: str | None


@dataclass(frozen=True, slots=True)
class EntryPage:
    """Some entries of a credit ledger, and the token of those after them; None on the last page."""

    entries: Sequence[CreditEntry]
    next_page_token: str | None


class CreditNotes:
    """The credit notes of organizations. Under the tenant's lock, so that they never exceed an invoice together."""

    def __init__(self, *, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def create(self, org_id: OrgId, terms: CreditTerms, *, idempotency_key: str | None) -> CreditNote:
        """Take the terms off their invoice: off what is due of it first, the rest is credit of the tenant.

        Raises:
            NotFound: There is no such invoice.
            IdempotencyConflict: The key belongs to a credit note with other terms.
            InvalidArgument, FailedPrecondition: As `compute_credit`.
        """
        credit_note_id = new_uuid() if idempotency_key is None else credit_note_id_of(org_id, idempotency_key)

        async def work(connection: Connection) -> CreditNote:
            now = self._clock.now()
            invoice = await lock_whole(connection, org_id, terms.invoice_id, now=now)
            known = await store.load_credit_note(connection, org_id, credit_note_id)
            if known is not None and known.terms == terms:
                return known
            if known is not None:
                raise _conflict(idempotency_key, credit_note_id)
            earlier = await store.load_credit_notes_of(connection, org_id, terms.invoice_id)
            due = compute_credit(invoice, terms, earlier)
            reduced = min(due.total, invoice.amount_due)
            granted = CONTEXT.subtract(due.total, reduced)
            if reduced:
                await transitions.reduce_amount_due(connection, org_id, invoice.invoice_id, by=reduced, now=now)
            if granted:
                entry = CreditEntry(
                    entry_id=new_uuid(),
                    tenant_id=invoice.tenant_id,
                    currency=invoice.currency,
                    kind=CreditKind.GRANTED,
                    amount=granted,
                    invoice_id=invoice.invoice_id,
                    credit_note_id=credit_note_id,
                    created_at=now,
                )
                await credit.add_entries(connection, org_id, [entry])
            note = CreditNote(
                credit_note_id=credit_note_id,
                # Last, since others of the organization wait for it until the commit.
                number=await store.take_number(connection, org_id),
                invoice_id=invoice.invoice_id,
                tenant_id=invoice.tenant_id,
                currency=invoice.currency,
                lines=due.lines,
                subtotal=due.subtotal,
                tax=due.tax,
                total=due.total,
                amount_due_reduced=reduced,
                credit_granted=granted,
                reason=terms.reason,
                issued_at=now,
            )
            if not await store.insert_credit_note(connection, org_id, note):
                # Taken since we looked, so under another tenant's lock: for another invoice.
                raise _conflict(idempotency_key, credit_note_id)
            return note

        note = await run_transaction(self._pool, work)
        log.info("invoice_credited", org_id=str(org_id), credit_note_id=format_id("crn", note.credit_note_id))
        return note

    async def get(self, org_id: OrgId, credit_note_id: UUID) -> CreditNote:
        """The credit note.

        Raises:
            NotFound: There is none with this id.
        """
        note = await run_transaction(
            self._pool, lambda connection: store.load_credit_note(connection, org_id, credit_note_id)
        )
        if note is None:
            raise NotFound("credit note", format_id("crn", credit_note_id))
        return note

    async def list(
        self, org_id: OrgId, *, tenant_id: str, invoice_id: UUID | None, limit: int, page_token: str
    ) -> CreditNotePage:
        """Credit notes, newest first; empty filters pass all."""
        before = decode_page_token(page_token, tuple[int])
        found = await run_transaction(
            self._pool,
            lambda connection: store.list_credit_notes(
                connection,
                org_id,
                tenant_id=tenant_id,
                invoice_id=invoice_id,
                before=before[0] if before else None,
                limit=limit + 1,
            ),
        )
        if len(found) <= limit:
            return CreditNotePage(found, None)
        return CreditNotePage(found[:limit], encode_page_token((found[limit - 1].number,)))

    async def balances(self, org_id: OrgId, *, tenant_id: str, limit: int, page_token: str) -> BalancePage:
        """What tenants have to their credit, by (tenant, currency); an empty `tenant_id` passes all."""
        after = decode_page_token(page_token, tuple[str, str])
        found = await run_transaction(
            self._pool,
            lambda connection: credit.list_balances(
                connection, org_id, tenant_id=tenant_id, after=after, limit=limit + 1
            ),
        )
        if len(found) <= limit:
            return BalancePage(found, None)
        last = found[limit - 1]
        return BalancePage(found[:limit], encode_page_token((last.tenant_id, last.currency)))

    async def entries(self, org_id: OrgId, *, tenant_id: str, limit: int, page_token: str) -> EntryPage:
        """The entries of a tenant's credit ledgers, newest first."""
        before = decode_page_token(page_token, tuple[UUID])
        found = await run_transaction(
            self._pool,
            lambda connection: credit.list_entries(
                connection, org_id, tenant_id=tenant_id, before=before[0] if before else None, limit=limit + 1
            ),
        )
        if len(found) <= limit:
            return EntryPage(found, None)
        return EntryPage(found[:limit], encode_page_token((str(found[limit - 1].entry_id),)))


def _conflict(idempotency_key: str | None, credit_note_id: UUID) -> IdempotencyConflict:
    return IdempotencyConflict(
        field="", idempotency_key=idempotency_key or "", event_id=format_id("crn", credit_note_id)
    )
