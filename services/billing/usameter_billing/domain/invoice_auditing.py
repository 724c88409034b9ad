"""What finalized invoices say beside themselves, their prices, plans and credit notes (I7)."""

from __future__ import annotations

import decimal
from collections.abc import Iterator, Mapping
from decimal import Decimal
from uuid import UUID

from usameter_billing.domain.auditing import InvoiceMoney, NoteNumbers, StoredInvoice, StoredLine
from usameter_billing.domain.invoice import LineKind
from usameter_billing.domain.plan import Plan
from usameter_core.audit import Violation
from usameter_core.decimals import CONTEXT, canonical
from usameter_core.ids import format_id
from usameter_proof.pricing import PriceVersion
from usameter_proof.rating import due_amount, prorated_fee, tax_amount

_ZERO = Decimal(0)
# Subscriptions, their phases and the intervals of fees begin and end at midnight, UTC.
_DAY_SECONDS = 86_400


def number_violations(expected: int, found: int) -> Iterator[Violation]:
    """I7: no number is left out. Unique they are by a key of the table."""
    if expected != found:
        missing = f"{expected}" if found == expected + 1 else f"{expected} to {found - 1}"
        yield Violation("I7", "a number is missing", f"invoice {missing}", "none")


def total_violations(invoice: StoredInvoice) -> Iterator[Violation]:
    """I7: the total is lines and tax."""
    by_rate: dict[Decimal, Decimal] = {}
    for line in invoice.lines:
        by_rate[line.tax_rate] = CONTEXT.add(by_rate.get(line.tax_rate, _ZERO), line.amount)
    with decimal.localcontext(CONTEXT):
        subtotal = sum(by_rate.values(), _ZERO)
        tax = sum((tax_amount(amount, rate, invoice.currency) for rate, amount in by_rate.items()), _ZERO)
    place = {"invoice_id": format_id("inv", invoice.invoice_id)}
    for problem, expected, found in (
        ("an invoice's subtotal is not the sum of its lines", subtotal, invoice.subtotal),
        ("an invoice's tax is not that of its lines", tax, invoice.tax),
        ("an invoice's total is not subtotal and tax", CONTEXT.add(invoice.subtotal, invoice.tax), invoice.total),
    ):
        if expected != found:
            yield Violation("I7", problem, canonical(expected), canonical(found), place)


def line_violations(
    invoice: StoredInvoice,
    line: StoredLine,
    prices: Mapping[UUID, PriceVersion | None],
    plans: Mapping[UUID, Plan],
) -> Iterator[Violation]:
    """I7: a line is of its invoice; its amounts follow from its price and quantity, or from its plan and seconds."""
    place = line_place(invoice.invoice_id, line.line_id)
    for problem, expected, found in (
        *_subject_faults(invoice, line),
        *_charge_faults(invoice, line, prices, plans),
    ):
        yield Violation("I7", problem, expected, found, place)
    if line.previously_billed is None:
        problem = "what a line counts as billed cannot be read"
        yield Violation("I7", problem, "lines with their invoices and amounts", "something else", place)
        return
    amount = CONTEXT.subtract(line.rated_amount, line.previously_billed)
    if amount != line.amount:
        problem = "a line's amount is not what is due less what was billed"
        yield Violation("I7", problem, canonical(amount), canonical(line.amount), place)


def money_violations(money: InvoiceMoney) -> Iterator[Violation]:
    """I7: what is due, was paid, drawn and credited is the total; no more is credited than there was."""
    place = {"invoice_id": format_id("inv", money.invoice_id)}
    with decimal.localcontext(CONTEXT):
        for problem, expected, found in _money_faults(money):
            yield Violation("I7", problem, expected, found, place)


def _money_faults(money: InvoiceMoney) -> Iterator[_Fault]:
    if money.is_void:
        if money.credit_change:
            yield "a void invoice has changed its tenant's credit", "0", canonical(money.credit_change)
        if money.credited:
            yield "a void invoice has credit notes", "0", canonical(money.credited)
    elif money.total < 0:
        if money.credit_change != -money.total:
            problem = "a negative invoice did not grant what it comes to"
            yield problem, canonical(-money.total), canonical(money.credit_change)
    else:
        accounted = money.amount_due + money.amount_paid + money.reduced - money.credit_change
        if accounted != money.total:
            problem = "what is due, paid, drawn and credited of an invoice is not its total"
            yield problem, canonical(money.total), canonical(accounted)
    for credited, whole in (
        (money.credited_subtotal, money.subtotal),
        (money.credited_tax, money.tax),
        (money.credited, money.total),
    ):
        if not min(whole, _ZERO) <= credited <= max(whole, _ZERO):
            yield "more is credited than the invoice has", f"up to {canonical(whole)}", canonical(credited)
            break
    if money.notes_not_granted:
        problem = "what credit notes granted is not in their tenant's credit"
        yield problem, "all of them", f"{money.notes_not_granted} not"
    if money.notes_not_of_lines:
        yield "credit notes are not the sums of their lines", "all of them", f"{money.notes_not_of_lines} not"


def note_number_violations(numbers: NoteNumbers) -> Iterator[Violation]:
    """I7: no number of a credit note is left out. Unique they are by a key of the table."""
    if (numbers.notes, numbers.first, numbers.last) != (numbers.counted, 1, numbers.counted):
        expected = f"{numbers.counted}, 1 to {numbers.counted}"
        found = f"{numbers.notes}, {numbers.first} to {numbers.last}"
        yield Violation("I7", "numbers of credit notes have a gap", expected, found)


def line_place(invoice_id: UUID, line_id: UUID) -> dict[str, str | int]:
    """Where a line is."""
    return {"invoice_id": format_id("inv", invoice_id), "line_id": format_id("lin", line_id)}


# The problem, what is expected, and what was found.
_Fault = tuple[str, str, str]


def _subject_faults(invoice: StoredInvoice, line: StoredLine) -> Iterator[_Fault]:
    if line.tenant_id != invoice.tenant_id:
        yield "a line is of another tenant than its invoice", invoice.tenant_id, line.tenant_id
    kind = LineKind.TRUE_UP
    if not line.counted_lines:
        if line.event_type is None:
            kind = LineKind.BASE_FEE
        elif line.period == invoice.period:
            kind = LineKind.USAGE
    # Where it is not known what the line counts, the kind that follows from that is not known either.
    if line.counted_lines is not None and line.kind != kind:
        yield "a line's kind is not that of its subject", kind.value, line.kind
    seconds = line.fee_seconds
    if seconds is not None and not (seconds % _DAY_SECONDS == 0 and 0 <= seconds <= line.period.seconds):
        expected = f"whole days, up to {line.period.seconds} seconds"
        yield "a base fee's seconds are not days of its interval", expected, f"{seconds} seconds"


def _charge_faults(
    invoice: StoredInvoice,
    line: StoredLine,
    prices: Mapping[UUID, PriceVersion | None],
    plans: Mapping[UUID, Plan],
) -> Iterator[_Fault]:
    if line.price_id is not None and line.quantity is not None:
        if line.price_id not in prices:
            yield _MISSING
        elif (version := prices[line.price_id]) is None:
            yield "a line's price is none", "a price", "terms that describe none"
        else:
            if version.event_type != line.event_type or version.tenant_id not in (None, line.tenant_id):
                yield "a line's price is of another use", "of its event type, for its tenant or all", "of another"
            rated = due_amount(version.price, line.quantity, subscribed=version.plan_id is not None)
            yield from _amount_faults(invoice, line, rated, version.price.currency)
    else:
        plan = None if line.plan_id is None else plans.get(line.plan_id)
        if plan is None or line.fee_seconds is None:
            yield _MISSING
        else:
            rated = prorated_fee(
                plan.base_fee, plan.currency, seconds=line.fee_seconds, interval_seconds=line.period.seconds
            )
            yield from _amount_faults(invoice, line, rated, plan.currency)


_MISSING: _Fault = ("a line's price or plan is missing", "one", "none")


def _amount_faults(invoice: StoredInvoice, line: StoredLine, rated: Decimal, currency: str) -> Iterator[_Fault]:
    if currency != invoice.currency:
        yield "a line's price or plan is in another currency than its invoice", invoice.currency, currency
    if rated != line.rated_amount:
        problem = "a line's rated amount is not that of its price and quantity"
        yield problem, canonical(rated), canonical(line.rated_amount)
