"""One tenant's invoices: draft, finalize, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING
from uuid import UUID

from usameter_billing.clients import OrganizationClient
from usameter_billing.domain.invoice import Invoice, InvoiceStatus
from usameter_billing.domain.tiling import Tiling
from usameter_billing.service import generation
from usameter_billing.service.ledger import LedgerPull
from usameter_billing.store import accounts, invoices, lines
from usameter_core.clock import Clock
from usameter_core.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound
from usameter_core.ids import OrgId, format_id
from usameter_core.pages import decode_page_token, encode_page_token
from usameter_core.period import Period, format_timestamp
from usameter_core.postgres.transaction import run_transaction
from usameter_core.tasks import Doorbell

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Connection, Pool


@dataclass(frozen=True, slots=True)
class Page:
    """Some invoices, and the token of those after them; None on the last page."""

    invoices: Sequence[Invoice]
    next_page_token: str | None


def check_period(asked: Period, *, tiling: Tiling, now: datetime) -> Period:
    """The billing period of `tiling` with these bounds, which has begun.

    Raises:
        InvalidArgument: They are no billing period, and the violation states the right ones; or it
            has not begun: its invoice would sweep up all use of the periods before it.
    """
    try:
        right = tiling.period_of(asked.start)
    except OverflowError:
        raise InvalidArgument([FieldViolation("period_start", "is beyond the calendar")]) from None
    if asked == right:
        if right.start > now:
            raise InvalidArgument([FieldViolation("period_start", "the billing period has not begun")])
        return right
    bounds = f"[{format_timestamp(right.start)}, {format_timestamp(right.end)})"
    description = f"the billing period that holds period_start is {bounds}"
    fields = {"period_start": asked.start != right.start, "period_end": asked.end != right.end}
    raise InvalidArgument([FieldViolation(field, description) for field, wrong in fields.items() if wrong])


async def load_header(connection: Connection, org_id: OrgId, invoice_id: UUID, *, now: datetime) -> Invoice:
    """A draft or an invoice without its lines.

    Raises:
        NotFound: There is none with this id.
    """
    invoice = await invoices.load_invoice(connection, org_id, invoice_id, now=now)
    if invoice is None:
        raise NotFound("invoice", format_id("inv", invoice_id))
    return invoice


async def load_whole(connection: Connection, org_id: OrgId, invoice_id: UUID, *, now: datetime) -> Invoice:
    """A draft or an invoice with its lines; fails as `load_header` does."""
    invoice = await load_header(connection, org_id, invoice_id, now=now)
    return replace(invoice, lines=await lines.load_lines(connection, org_id, invoice_id))


async def lock_whole(connection: Connection, org_id: OrgId, invoice_id: UUID, *, now: datetime) -> Invoice:
    """As `load_whole`, with the tenant's account locked: until the end of the transaction nobody changes it."""
    header = await load_header(connection, org_id, invoice_id, now=now)
    await accounts.lock_accounts(connection, org_id, [header.tenant_id])
    return await load_whole(connection, org_id, invoice_id, now=now)


class Invoices:
    """The invoices of organizations.

    Args:
        organizations: Says who sells.
        due: From issue to the due date.
        marks: Rung when ingest has something to be told.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        clock: Clock,
        ledger: LedgerPull,
        organizations: OrganizationClient,
        due: timedelta,
        marks: Doorbell,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._ledger = ledger
        self._organizations = organizations
        self._due = due
        self._marks = marks

    async def create(self, org_id: OrgId, *, tenant_id: str, bounds: Period) -> Invoice:
        """The draft of a tenant's period, refreshed; where nothing new is due, its last invoice.

        Where the period has several currencies every one gets its draft, and the first by
        currency code is returned.

        Raises:
            InvalidArgument: The bounds are no billing period, or one that has not begun.
            FailedPrecondition: NOTHING_DUE: no priced use that is sealed, and no invoice.
            Unavailable: Ingest or the database cannot be reached; a retry is safe.
        """
        await self._ledger.pull(org_id)

        def checked(tiling: Tiling) -> Period:
            return check_period(bounds, tiling=tiling, now=self._clock.now())

        async def work(connection: Connection) -> Invoice | FailedPrecondition:
            due = await generation.assess(connection, org_id, tenant_ids=[tenant_id], period_of=checked)
            drafts = await generation.save_drafts(connection, due)
            now = self._clock.now()
            if drafts:
                return await load_whole(connection, org_id, drafts[min(drafts)], now=now)
            period = due.periods[tenant_id]
            latest = await invoices.find_latest_invoice(connection, org_id, tenant_id=tenant_id, period=period)
            # Returned, not raised: drafts that have nothing left were dropped, and stay so.
            if latest is None:
                return _nothing_due(due, tenant_id)
            return await load_whole(connection, org_id, latest, now=now)

        return _answer(await run_transaction(self._pool, work))

    async def finalize(self, org_id: OrgId, invoice_id: UUID) -> Invoice:
        """Freeze a draft and give it the next number; a finalized invoice is answered as it is.

        Raises:
            NotFound: There is no such invoice.
            FailedPrecondition: PERIOD_NOT_ENDED: the draft is a forecast until then; DRAFT_CHANGED:
                its lines were out of date, and are refreshed now; NOTHING_DUE: all of it was billed
                meanwhile, and the draft is gone.
            Unavailable: Identity, ingest or the database cannot be reached; a retry is safe.
        """
        known = await self.get(org_id, invoice_id)
        if known.status is not InvoiceStatus.DRAFT:
            return known
        if known.period.end > self._clock.now():
            raise _not_ended(known)
        seller_name = await self._organizations.read_name(org_id)
        await self._ledger.pull(org_id)

        async def work(connection: Connection) -> Invoice | FailedPrecondition:
            header = await load_header(connection, org_id, invoice_id, now=self._clock.now())
            due = await generation.assess(
                connection, org_id, tenant_ids=[header.tenant_id], period_of=lambda _: header.period
            )
            draft = due.drafts.get((header.tenant_id, header.currency))
            if draft is None or draft.invoice_id != invoice_id:
                # Another call has finalized it, or dropped it, while this one waited for the lock.
                return await load_whole(connection, org_id, invoice_id, now=self._clock.now())
            invoice = next((each for each in due.invoices if each.currency == header.currency), None)
            if invoice is None or not draft.holds(invoice):
                await generation.save_drafts(connection, due)
                return _nothing_due(due, header.tenant_id) if invoice is None else _draft_changed(invoice_id)
            now = self._clock.now()
            await generation.finalize(
                connection, due, [invoice], issued_at=now, default_due=self._due, seller_name=seller_name
            )
            return await load_whole(connection, org_id, invoice_id, now=now)

        invoice = _answer(await run_transaction(self._pool, work))
        self._marks.ring()
        return invoice

    async def get(self, org_id: OrgId, invoice_id: UUID) -> Invoice:
        """A draft or an invoice with its lines.

        Raises:
            NotFound: There is none with this id.
        """
        now = self._clock.now()
        return await run_transaction(self._pool, lambda connection: load_whole(connection, org_id, invoice_id, now=now))

    async def list(
        self,
        org_id: OrgId,
        *,
        tenant_id: str,
        status: InvoiceStatus | None,
        overdue: bool,
        period_start: datetime | None,
        period_ends_after: datetime | None,
        period_ends_by: datetime | None,
        limit: int,
        page_token: str,
    ) -> Page:
        """Drafts and invoices without lines, newest first; empty filters pass all."""
        before = decode_page_token(page_token, tuple[UUID])
        now = self._clock.now()
        found = await run_transaction(
            self._pool,
            lambda connection: invoices.list_invoices(
                connection,
                org_id,
                now=now,
                tenant_id=tenant_id,
                status=status,
                overdue=overdue,
                period_start=period_start,
                period_ends_after=period_ends_after,
                period_ends_by=period_ends_by,
                before=before[0] if before else None,
                limit=limit + 1,
            ),
        )
        if len(found) <= limit:
            return Page(found, None)
        return Page(found[:limit], encode_page_token((str(found[limit - 1].invoice_id),)))


def _answer(outcome: Invoice | FailedPrecondition) -> Invoice:
    if isinstance(outcome, FailedPrecondition):
        raise outcome
    return outcome


def _nothing_due(due: generation.Generation, tenant_id: str) -> FailedPrecondition:
    unpriced = [use for assessment in due.assessments for use in assessment.unpriced]
    if not unpriced:
        return FailedPrecondition("NOTHING_DUE", f"{tenant_id} has no sealed use in the period that was not billed")
    uses = ", ".join(f"{use.event_type} at {format_timestamp(use.period.start)}" for use in unpriced)
    return FailedPrecondition("NOTHING_DUE", f"{tenant_id} has use, but no price is in force for: {uses}")


def _not_ended(draft: Invoice) -> FailedPrecondition:
    return FailedPrecondition(
        "PERIOD_NOT_ENDED",
        f"The period of {format_id('inv', draft.invoice_id)} runs until {format_timestamp(draft.period.end)}; "
        "finalize it then",
    )


def _draft_changed(invoice_id: UUID) -> FailedPrecondition:
    return FailedPrecondition(
        "DRAFT_CHANGED",
        f"The lines of {format_id('inv', invoice_id)} were out of date and have been refreshed; "
        "look at it and finalize again",
    )
