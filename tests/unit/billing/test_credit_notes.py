"""What credit notes take off: exact, and never more than the invoice, whatever is mixed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_billing.domain.credit_notes import CreditNote, CreditTerms, compute_credit
from usameter_billing.domain.invoice import (
    DueInvoice,
    DueLine,
    Invoice,
    InvoiceLine,
    InvoiceStatus,
    LineKind,
    Parties,
    UseCharge,
)
from usameter_core.errors import FailedPrecondition
from usameter_core.period import month_of
from usameter_proof.pricing import PerUnit, Price, PriceModel, PriceTerms, PriceVersion

NOW = datetime(2026, 2, 1, tzinfo=UTC)
PERIOD = month_of(datetime(2026, 1, 5, tzinfo=UTC))
PRICE = PriceVersion(
    price_id=uuid4(),
    event_type="call",
    tenant_id=None,
    effective_from=PERIOD.start,
    terms=PriceTerms(PriceModel.PER_UNIT, "USD", unit_amount="1"),
    price=Price("USD", PerUnit(Decimal(1)), None, None),
    created_at=PERIOD.start,
)


def invoice(*lines: tuple[str, str]) -> Invoice:
    """An open invoice with lines of these amounts and tax rates, taxed as invoices are."""
    due = tuple(
        DueLine(
            kind=LineKind.USAGE,
            period=PERIOD,
            charge=UseCharge("call", PRICE, Decimal(1)),
            tax_rate=Decimal(rate),
            rated_amount=Decimal(amount),
            amount=Decimal(amount),
            previously_billed=(),
            snapshot_ids=(),
        )
        for amount, rate in lines
    )
    whole = DueInvoice("acme", PERIOD, "USD", due, ())
    return Invoice(
        invoice_id=uuid4(),
        number=1,
        tenant_id="acme",
        status=InvoiceStatus.OPEN,
        currency="USD",
        period=PERIOD,
        through_epoch=1,
        subtotal=whole.subtotal,
        tax=whole.tax,
        total=whole.total,
        amount_due=whole.total,
        amount_paid=Decimal(0),
        overdue=False,
        issued_at=NOW,
        due_at=NOW,
        parties=Parties("Demo Inc.", ""),
        paid_at=None,
        payment_reference=None,
        voided_at=None,
        void_reason=None,
        uncollectible_at=None,
        uncollectible_reason=None,
        unpriced_event_types=(),
        lines=tuple(InvoiceLine(uuid4(), line, ()) for line in due),
    )


def credit(of: Invoice, earlier: list[CreditNote], amount: str | None = None, **lines: str) -> CreditNote:
    """Credit an amount, or lines by their place (`_0="1.50"`); the note joins `earlier`."""
    asked: tuple[tuple[UUID, Decimal], ...] = tuple(
        (of.lines[int(place[1:])].line_id, Decimal(text)) for place, text in lines.items()
    )
    terms = CreditTerms(of.invoice_id, None if amount is None else Decimal(amount), asked, "why")
    due = compute_credit(of, terms, earlier)
    note = CreditNote(
        credit_note_id=uuid4(),
        number=len(earlier) + 1,
        invoice_id=of.invoice_id,
        tenant_id=of.tenant_id,
        currency=of.currency,
        lines=due.lines,
        subtotal=due.subtotal,
        tax=due.tax,
        total=due.total,
        amount_due_reduced=due.total,
        credit_granted=Decimal(0),
        reason="why",
        issued_at=NOW,
    )
    earlier.append(note)
    return note


def parts(note: CreditNote) -> tuple[str, str, str]:
    return str(note.subtotal), str(note.tax), str(note.total)


def test_by_amount_net_and_tax_are_taken_in_proportion() -> None:
    of = invoice(("100.00", "20"), ("100.00", "0"))
    assert parts(credit(of, [], "110.00")) == ("100.00", "10.00", "110.00")
    assert parts(credit(of, [], "220.00")) == ("200.00", "20.00", "220.00")


def test_by_lines_tax_is_added_at_the_rate_of_each() -> None:
    of = invoice(("100.00", "20"), ("100.00", "7.7"))
    assert parts(credit(of, [], _0="50.00", _1="10.00")) == ("60.00", "10.77", "70.77")


def test_crediting_every_line_in_pieces_credits_exactly_the_tax() -> None:
    of, notes = invoice(("0.05", "20"), ("0.07", "20"), ("0.11", "7.7")), list[CreditNote]()
    for place, cents in ((0, 5), (1, 7), (2, 11)):
        for _ in range(cents):
            credit(of, notes, **{f"_{place}": "0.01"})
    assert sum(note.tax for note in notes) == of.tax
    assert sum(note.total for note in notes) == of.total


def test_a_line_cannot_take_more_tax_than_amounts_have_left() -> None:
    of, notes = invoice(("100.00", "20"), ("100.00", "0")), list[CreditNote]()
    credit(of, notes, "110.00")
    with pytest.raises(FailedPrecondition, match="left to credit"):
        credit(of, notes, _0="51.00")
    credit(of, notes, _0="50.00")
    assert parts(credit(of, notes, "50.00")) == ("50.00", "0.00", "50.00")


def test_an_invoice_whose_net_is_negative_is_credited_by_amount_to_the_cent() -> None:
    of, notes = invoice(("100.00", "20"), ("-110.00", "0")), list[CreditNote]()
    assert of.total == 10
    credit(of, notes, "3.33")
    credit(of, notes, "6.67")
    assert (sum(note.subtotal for note in notes), sum(note.tax for note in notes)) == (-10, 20)


def test_amounts_of_more_than_28_digits_lose_no_cent() -> None:
    of = invoice(("9" * 29 + ".99", "0"), ("0.02", "0"), ("0.01", "19"))
    assert (str(of.subtotal), str(of.tax), str(of.total)) == ("1" + "0" * 29 + ".02", "0.00", "1" + "0" * 29 + ".02")
    assert parts(credit(of, [], _0="9" * 29 + ".99", _1="0.02")) == (
        "1" + "0" * 29 + ".01",
        "0.00",
        "1" + "0" * 29 + ".01",
    )


RATES = st.sampled_from(["0", "7.7", "19", "20"])
CENTS = st.integers(-500, 2_000).map(lambda cents: str(Decimal(cents) / 100))


@given(st.lists(st.tuples(CENTS, RATES), min_size=1, max_size=4), st.data())
def test_no_mixture_exceeds_the_invoice_and_the_rest_always_comes_out_even(
    lines: list[tuple[str, str]], data: st.DataObject
) -> None:
    of, notes = invoice(*lines), list[CreditNote]()
    for _ in range(data.draw(st.integers(0, 6))):
        amount = str(Decimal(data.draw(st.integers(1, 800))) / 100)
        place = data.draw(st.none() | st.integers(0, len(lines) - 1))
        try:
            credit(of, notes, amount) if place is None else credit(of, notes, **{f"_{place}": amount})
        except FailedPrecondition as error:
            assert error.condition == "CREDIT_EXCEEDS_INVOICE"
    for name in ("subtotal", "tax", "total"):
        credited, whole = sum((getattr(note, name) for note in notes), Decimal(0)), getattr(of, name)
        assert min(whole, Decimal(0)) <= credited <= max(whole, Decimal(0))
    left = of.total - sum((note.total for note in notes), Decimal(0))
    if left > 0:
        credit(of, notes, str(left))
        assert sum(note.tax for note in notes) == of.tax
        assert sum(note.total for note in notes) == of.total


def test_drafts_and_void_invoices_cannot_be_credited() -> None:
    for status in (InvoiceStatus.DRAFT, InvoiceStatus.VOID):
        with pytest.raises(FailedPrecondition) as caught:
            credit(replace(invoice(("1", "0")), status=status), [], "1")
        assert caught.value.condition == f"INVOICE_{status.upper()}"
