"""What the document of an invoice says, in the order and the words in which it is printed.

Made from the invoice as the API serves it, so that paper and JSON cannot differ; the renderers only place it.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal

from google.protobuf.message import Message

from usameter.billing.v1 import invoice_pb2, plan_pb2, price_pb2
from usameter_billing.domain.invoice import Parties
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.errors import Internal
from usameter_core.grpc.timestamps import datetime_in
from usameter_core.money import format_amount
from usameter_proof.rating import tax_amount

_DAY_SECONDS = 86_400
_PROOF_SENTENCE = (
    "Every event that this invoice charges is in the sealed ledger up to this epoch, and this root follows from all "
    "of them."
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A value with its name."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Part:
    """A row below a line that says how its amount came about; what does not apply is empty."""

    description: str
    quantity: str = ""
    unit_amount: str = ""
    flat_amount: str = ""
    amount: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the invoice; `quantity` is empty where it is for no use."""

    title: str
    period: str
    quantity: str
    tax_rate: str
    amount: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """An invoice on paper. Texts are plain, and some are a stranger's: a renderer must not read markup in them.

    Attributes:
        stamp: Over every page, of what is no invoice yet or no longer.
        dated: When it was issued; the only date that may go into the file itself.
        seller: Its name.
        bill_to: Lines of an address.
        sums: The last one is what is to be paid.
        proof: Empty, as its sentence, where nothing was sealed.
    """

    title: str
    stamp: str | None
    dated: date | None
    seller: str
    bill_to: tuple[str, ...]
    facts: tuple[Fact, ...]
    currency: str
    lines: tuple[Line, ...]
    sums: tuple[Fact, ...]
    remarks: tuple[str, ...]
    proof_sentence: str
    proof: tuple[Fact, ...]


def document_of(invoice: invoice_pb2.Invoice, *, parties: Parties, root: str | None) -> Document:
    """The document of an invoice as it stands: a function of its arguments and of nothing else, such as today.

    Args:
        invoice: With its lines.
        parties: Who sells, and whom it is for.
        root: Of the ledger's chain at the invoice's through_epoch, 64 hex digits; None where that is 0.

    Raises:
        Internal: Its lines and its tax do not add up to what it says.
    """
    issued_at = datetime_in(invoice, "issued_at")
    with decimal.localcontext(CONTEXT):
        return Document(
            title=_title(invoice),
            stamp={invoice_pb2.draft: "DRAFT", invoice_pb2.void: "VOID"}.get(invoice.status),
            dated=None if issued_at is None else issued_at.date(),
            seller=parties.seller_name,
            bill_to=(*parties.bill_to_address.splitlines(), invoice.tenant_id),
            facts=tuple(_facts(invoice)),
            currency=invoice.currency,
            lines=tuple(_line(line, invoice.currency) for line in invoice.lines),
            sums=tuple(_sums(invoice)),
            remarks=tuple(_remarks(invoice)),
            proof_sentence="" if root is None else _PROOF_SENTENCE,
            proof=() if root is None else (Fact("Ledger epoch", str(invoice.through_epoch)), Fact("Chain root", root)),
        )


def _title(invoice: invoice_pb2.Invoice) -> str:
    kind = "Credit" if Decimal(invoice.total) < 0 else "Invoice"
    return f"{kind} {invoice.number}" if invoice.HasField("number") else f"{kind}, draft"


def _facts(invoice: invoice_pb2.Invoice) -> Iterator[Fact]:
    yield Fact("Status", invoice_pb2.InvoiceStatus.Name(invoice.status))
    yield Fact("Billing period", _days(invoice))
    for name, field in (("Issued", "issued_at"), ("Due", "due_at"), ("Paid", "paid_at"), ("Void since", "voided_at")):
        moment = datetime_in(invoice, field)
        if moment is not None:
            yield Fact(name, moment.date().isoformat())
    yield Fact("Invoice id", invoice.id)


def _line(line: invoice_pb2.InvoiceLine, currency: str) -> Line:
    return Line(
        title=_line_title(line),
        period=_days(line),
        quantity=_grouped(line.quantity),
        tax_rate=f"{line.tax_rate} %",
        amount=_grouped(line.amount),
        parts=(*_charges(line), *_settlement(line, currency)),
    )


def _line_title(line: invoice_pb2.InvoiceLine) -> str:
    if line.HasField("base_fee"):
        interval = plan_pb2.PlanInterval.Name(line.base_fee.interval).lower()
        title = f"{line.base_fee.plan_name}, {interval} base fee"
    else:
        title = f"{line.event_type}, {price_pb2.PriceModel.Name(line.price.price.model).replace('_', ' ')}"
    return f"{title}: true-up" if line.kind == invoice_pb2.TRUE_UP else title


def _charges(line: invoice_pb2.InvoiceLine) -> Iterator[Part]:
    if line.HasField("base_fee"):
        fee = line.base_fee
        days, whole = fee.seconds // _DAY_SECONDS, fee.interval_seconds // _DAY_SECONDS
        yield Part(f"{days} of {whole} days", unit_amount=_grouped(fee.amount), amount=_grouped(line.rated_amount))
    for part in line.breakdown:
        yield Part(
            _charge_title(part, line.price.price),
            _grouped(part.quantity),
            _grouped(part.unit_amount),
            _grouped(part.flat_amount),
            _grouped(part.amount),
        )


def _charge_title(part: price_pb2.PriceComponent, price: price_pb2.Price) -> str:
    if part.HasField("bound"):
        return f"{part.bound} charge"
    if part.HasField("up_to"):
        return f"up to {_grouped(part.up_to)}"
    match price.model:
        case price_pb2.flat:
            return "flat amount"
        case price_pb2.package:
            return f"packages of {_grouped(price.package.size)}"
        case _:
            # The last tier, which begins where the one before it ends.
            return f"above {_grouped(price.tiers[-2].up_to)}" if len(price.tiers) > 1 else "each unit"


def _settlement(line: invoice_pb2.InvoiceLine, currency: str) -> Iterator[Part]:
    if line.previously_billed:
        yield Part("charge for the whole period", amount=_grouped(line.rated_amount))
    for billed in line.previously_billed:
        yield Part(f"billed by {billed.invoice_id}", amount=_negated(Decimal(billed.amount), currency))


def _sums(invoice: invoice_pb2.Invoice) -> Iterator[Fact]:
    currency, total = invoice.currency, Decimal(invoice.total)
    nets: dict[str, Decimal] = {}
    for line in invoice.lines:
        nets[line.tax_rate] = nets.get(line.tax_rate, Decimal(0)) + Decimal(line.amount)
    taxes = {rate: tax_amount(net, Decimal(rate), currency) for rate, net in nets.items()}
    # A document that a customer adds up to something else is worse than none.
    if (exact_sum(nets.values()), exact_sum(taxes.values())) != (Decimal(invoice.subtotal), Decimal(invoice.tax)):
        raise Internal(f"the lines of {invoice.id} do not add up to its subtotal and tax")
    yield Fact("Subtotal", _grouped(invoice.subtotal))
    for rate in sorted(taxes, key=Decimal):
        net = _grouped(format_amount(nets[rate], currency))
        yield Fact(f"Tax {rate} % on {net}", _grouped(format_amount(taxes[rate], currency)))
    yield Fact("Total", _grouped(invoice.total))
    if invoice.status != invoice_pb2.void:
        paid = Decimal(invoice.amount_paid)
        # What was neither paid nor is still due came from the tenant's credit, or off by a credit note.
        credited = max(total, Decimal(0)) - paid - Decimal(invoice.amount_due)
        for name, amount in (("Credited", credited), ("Paid", paid)):
            if amount:
                yield Fact(name, _negated(amount, currency))
        if total < 0:
            yield Fact("Added to your credit", _negated(total, currency))
    yield Fact("Amount due", _grouped(invoice.amount_due))


def _remarks(invoice: invoice_pb2.Invoice) -> Iterator[str]:
    yield "Days are UTC; a period includes its last day."
    if any(line.kind == invoice_pb2.TRUE_UP for line in invoice.lines):
        yield (
            "A true-up is the charge for a whole period, as its use is known now, less what earlier invoices have "
            "billed of it."
        )
    if invoice.status == invoice_pb2.draft and invoice.unpriced_event_types:
        yield f"Not billed, for they have no price: {', '.join(invoice.unpriced_event_types)}."


def _days(message: Message) -> str:
    """The days from `period_start`, to the last one before `period_end`: both are midnights."""
    start, end = datetime_in(message, "period_start"), datetime_in(message, "period_end")
    assert start is not None and end is not None
    return f"{start.date()} to {(end - timedelta(days=1)).date()}"


def _grouped(number: str) -> str:
    """A decimal with its thousands apart, every digit kept: "1234567.50" → "1,234,567.50"."""
    return format(Decimal(number), ",f") if number else ""


def _negated(amount: Decimal, currency: str) -> str:
    return _grouped(format_amount(-amount, currency))
