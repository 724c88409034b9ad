"""What can become of a finalized invoice.

    open ──► paid, void, uncollectible        uncollectible ──► paid, void

Nothing leads out of void, and out of paid only the way to void of an invoice for which no money was
received: a credit, one of 0.00, or one that the tenant's credit has covered is paid from the start.
"""

from __future__ import annotations

from decimal import Decimal

from usameter_billing.domain.invoice import Invoice, InvoiceStatus
from usameter_core.errors import FailedPrecondition
from usameter_core.ids import format_id

_FROM = {
    InvoiceStatus.PAID: (InvoiceStatus.OPEN, InvoiceStatus.UNCOLLECTIBLE),
    InvoiceStatus.UNCOLLECTIBLE: (InvoiceStatus.OPEN,),
    InvoiceStatus.VOID: (InvoiceStatus.OPEN, InvoiceStatus.UNCOLLECTIBLE),
}


def check_transition(invoice: Invoice, to: InvoiceStatus) -> None:
    """Let the invoice become paid or uncollectible.

    Raises:
        FailedPrecondition: Not in its present state, which is named: INVOICE_DRAFT, INVOICE_PAID, …
    """
    if invoice.status not in _FROM[to]:
        raise FailedPrecondition(
            f"INVOICE_{invoice.status.upper()}",
            f"{format_id('inv', invoice.invoice_id)} is {invoice.status}; "
            f"only an invoice that is {' or '.join(_FROM[to])} can become {to}",
        )


def check_void(invoice: Invoice, *, credited: Decimal, credit_change: Decimal, credit_balance: Decimal) -> None:
    """Let the invoice become void.

    Args:
        invoice: As it stands.
        credited: The sum of the credit notes on it.
        credit_change: What it granted to the tenant's credit (> 0), or drew from it (< 0).
        credit_balance: Of the tenant, in the invoice's currency.

    Raises:
        FailedPrecondition: INVOICE_CREDITED: billing it again would charge what was forgiven;
            CREDIT_DRAWN: the tenant's credit no longer holds what the invoice granted; or its
            state is named: INVOICE_DRAFT, INVOICE_PAID.
    """
    public_id = format_id("inv", invoice.invoice_id)
    if credited:
        raise FailedPrecondition(
            "INVOICE_CREDITED", f"{public_id} has credit notes, and cannot be void; credit the rest of it instead"
        )
    if credit_change > credit_balance:
        raise FailedPrecondition("CREDIT_DRAWN", f"The credit that {public_id} granted was drawn on since")
    if invoice.status is not InvoiceStatus.PAID or invoice.amount_paid:
        check_transition(invoice, InvoiceStatus.VOID)
