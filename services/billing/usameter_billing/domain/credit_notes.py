"""What a credit note takes off an invoice: never more than is left of it, net, tax and total each.

By amount it is gross, and takes net and tax in the proportion in which they are left; so the rest, credited
by amount, always comes out even. By lines it is net, and the tax is that on all credited lines of a rate
together, as on the invoice; so crediting every line credits exactly the invoice's tax.
"""

from __future__ import annotations

import decimal
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from math import floor
from uuid import UUID

from usameter_billing.domain.invoice import Invoice, InvoiceStatus
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.errors import FailedPrecondition, FieldViolation, InvalidArgument
from usameter_core.ids import OrgId, format_id, uuid_of
from usameter_core.money import format_amount, minor_unit_decimals, round_amount
from usameter_proof.rating import tax_amount

_ID_DOMAIN = b"usameter.credit_note.v1"


@dataclass(frozen=True, slots=True)
class CreditTerms:
    """What is asked for: a gross `amount`, or else `lines` of the invoice with net amounts."""

    invoice_id: UUID
    amount: Decimal | None
    lines: tuple[tuple[UUID, Decimal], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class CreditedLine:
    """A part of an invoice line; net. `tax_rate` is the line's, in percent."""

    line_id: UUID
    amount: Decimal
    tax_rate: Decimal


@dataclass(frozen=True, slots=True)
class CreditNote:
    """A stored credit note. `lines` is empty where it was made by amount."""

    credit_note_id: UUID
    number: int
    invoice_id: UUID
    tenant_id: str
    currency: str
    lines: tuple[CreditedLine, ...]
    subtotal: Decimal
    tax: Decimal
    total: Decimal
    amount_due_reduced: Decimal
    credit_granted: Decimal
    reason: str
    issued_at: datetime

    @property
    def terms(self) -> CreditTerms:
        """What was asked for."""
        lines = tuple((line.line_id, line.amount) for line in self.lines)
        return CreditTerms(self.invoice_id, None if lines else self.total, lines, self.reason)


@dataclass(frozen=True, slots=True)
class Credit:
    """What is to be taken off."""

    lines: tuple[CreditedLine, ...]
    subtotal: Decimal
    tax: Decimal

    @property
    def total(self) -> Decimal:
        """Net and tax."""
        return CONTEXT.add(self.subtotal, self.tax)


def credit_note_id_of(org_id: OrgId, idempotency_key: str) -> UUID:
    """The id of the credit note with this key: as an event's, 16 bytes of a SHA-256."""
    return uuid_of(hashlib.sha256(_ID_DOMAIN + org_id.bytes + idempotency_key.encode()).digest()[:16])


def compute_credit(invoice: Invoice, terms: CreditTerms, earlier: Sequence[CreditNote]) -> Credit:
    """What the terms take off the invoice.

    Args:
        invoice: With its lines.
        terms: Of this invoice.
        earlier: All credit notes on it so far.

    Raises:
        InvalidArgument: An amount is 0 or finer than the minor unit, or a line is not the invoice's, or named twice.
        FailedPrecondition: INVOICE_DRAFT, INVOICE_VOID; CREDIT_EXCEEDS_INVOICE where so much is not left.
    """
    if invoice.status in (InvoiceStatus.DRAFT, InvoiceStatus.VOID):
        raise FailedPrecondition(
            f"INVOICE_{invoice.status.upper()}",
            f"{format_id('inv', invoice.invoice_id)} is {invoice.status}; only finalized invoices that are not void "
            "can be credited",
        )
    with decimal.localcontext(CONTEXT):
        left = invoice.total - exact_sum(note.total for note in earlier)
        if terms.amount is not None:
            credit = _by_amount(invoice, terms.amount, earlier, left=left)
        else:
            credit = _by_lines(invoice, terms.lines, earlier)
        pairs = (
            (exact_sum(note.subtotal for note in earlier) + credit.subtotal, invoice.subtotal),
            (exact_sum(note.tax for note in earlier) + credit.tax, invoice.tax),
            (exact_sum(note.total for note in earlier) + credit.total, invoice.total),
        )
        if not all(min(whole, Decimal(0)) <= credited <= max(whole, Decimal(0)) for credited, whole in pairs):
            raise _exceeds(invoice, left)
        return credit


def _by_amount(invoice: Invoice, amount: Decimal, earlier: Sequence[CreditNote], *, left: Decimal) -> Credit:
    _check_amount(amount, invoice.currency, field="amount")
    if amount > left:
        raise _exceeds(invoice, left)
    tax_left = invoice.tax - exact_sum(note.tax for note in earlier)
    # A fraction: the share may have no end as a decimal, and rounding must look at the exact value.
    decimals = minor_unit_decimals(invoice.currency)
    share = Fraction(tax_left) * Fraction(amount) / Fraction(left) * 10**decimals
    tax = Decimal(floor(abs(share) + Fraction(1, 2))).scaleb(-decimals).copy_sign(tax_left)
    return Credit((), amount - tax, tax)


def _by_lines(invoice: Invoice, asked: Sequence[tuple[UUID, Decimal]], earlier: Sequence[CreditNote]) -> Credit:
    lines = {line.line_id: line.due for line in invoice.lines}
    credited_before = [line for note in earlier for line in note.lines]
    credited: list[CreditedLine] = []
    for index, (line_id, amount) in enumerate(asked):
        field = f"lines[{index}]"
        _check_amount(amount, invoice.currency, field=f"{field}.amount")
        due = lines.get(line_id)
        if due is None:
            raise InvalidArgument([FieldViolation(f"{field}.line_id", "is no line of the invoice")])
        if any(line.line_id == line_id for line in credited):
            raise InvalidArgument([FieldViolation(f"{field}.line_id", "is named twice")])
        left = due.amount - exact_sum(line.amount for line in credited_before if line.line_id == line_id)
        if amount > left:
            raise _exceeds(invoice, left, line_id)
        credited.append(CreditedLine(line_id, amount, due.tax_rate))
    tax = _tax([*credited_before, *credited], invoice.currency) - _tax(credited_before, invoice.currency)
    return Credit(tuple(credited), exact_sum(line.amount for line in credited), tax)


def _tax(lines: Iterable[CreditedLine], currency: str) -> Decimal:
    amounts: dict[Decimal, Decimal] = defaultdict(Decimal)
    for line in lines:
        amounts[line.tax_rate] += line.amount
    return exact_sum(tax_amount(amount, rate, currency) for rate, amount in amounts.items())


def _check_amount(amount: Decimal, currency: str, *, field: str) -> None:
    if not amount:
        raise InvalidArgument([FieldViolation(field, "must be more than 0")])
    if amount != round_amount(amount, currency):
        decimals = minor_unit_decimals(currency)
        raise InvalidArgument([FieldViolation(field, f"{currency} has {decimals} decimals")])


def _exceeds(invoice: Invoice, left: Decimal, line_id: UUID | None = None) -> FailedPrecondition:
    what = format_id("inv", invoice.invoice_id) if line_id is None else f"The line {format_id('lin', line_id)}"
    rest = f"{format_amount(max(left, Decimal(0)), invoice.currency)} {invoice.currency}"
    return FailedPrecondition("CREDIT_EXCEEDS_INVOICE", f"{what} has {rest} left to credit, net and tax together")
