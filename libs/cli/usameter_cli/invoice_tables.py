"""Invoices for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from usameter_cli.invoice_values import BaseFee, Invoice, Line, Tier
from usameter_cli.output import grouped, new_table, people

# Bounds of fees are midnights.
_DAY_SECONDS = 86_400


def print_invoices(invoices: Sequence[Invoice]) -> None:
    """One row each."""
    table = new_table(
        "id", "number", "tenant", "status", "period", "total", "", right=("number", "total"), whole=("id",)
    )
    for invoice in invoices:
        table.add_row(
            invoice.id,
            _number(invoice),
            invoice.tenant_id,
            invoice.status,
            f"{_day(invoice.period_start)} to {_day(invoice.period_end)}",
            grouped(invoice.total),
            invoice.currency,
        )
    people().print(table)


def print_totals(counts: Mapping[str, int], totals: Mapping[str, str]) -> None:
    """How many invoices are in which state, and what they add up to."""
    by_status = new_table("status", "invoices", right=("invoices",))
    for status, count in counts.items():
        by_status.add_row(status, f"{count:,}")
    by_currency = new_table("currency", "total", right=("total",))
    for currency, total in totals.items():
        by_currency.add_row(currency, grouped(total))
    console = people()
    console.print(by_status)
    console.print()
    console.print(by_currency)


def print_invoice(invoice: Invoice) -> None:
    """Everything but the snapshots: head, lines, tiers, totals."""
    console = people()
    console.print(_head(invoice))
    console.print()
    console.print(_lines(invoice))
    console.print()
    console.print(_sums(invoice))
    if invoice.unpriced_event_types:
        console.print()
        console.print(f"Without a price, and not billed: {', '.join(invoice.unpriced_event_types)}")


def _head(invoice: Invoice) -> Table:
    table = Table.grid(padding=(0, 2))
    rows = {
        "invoice": invoice.id,
        "number": _number(invoice),
        "tenant": invoice.tenant_id,
        "status": invoice.status,
        "period": f"{invoice.period_start} to {invoice.period_end}",
        "through epoch": str(invoice.through_epoch),
        "issued": invoice.issued_at,
        "due": invoice.due_at,
        "paid": invoice.paid_at,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, value)
    return table


def _lines(invoice: Invoice) -> Table:
    numbers = ("quantity", "unit price", "flat", "amount")
    table = new_table("line", *numbers, right=numbers)
    for line in invoice.lines:
        table.add_row(_title(line), grouped(line.quantity), "", "", grouped(line.amount), style="bold")
        if line.base_fee is not None:
            fee = line.base_fee
            table.add_row(f"  {_part_title(fee)}", "", "", grouped(fee.amount), grouped(line.rated_amount))
        for tier in line.breakdown:
            table.add_row(
                f"  {_tier_title(tier)}",
                grouped(tier.quantity),
                grouped(tier.unit_amount),
                grouped(tier.flat_amount),
                grouped(tier.amount),
            )
        if line.previously_billed:
            table.add_row("  rated", "", "", "", grouped(line.rated_amount))
        for billed in line.previously_billed:
            table.add_row(f"  billed by {billed.invoice_id}", "", "", "", f"less {grouped(billed.amount)}")
    return table


def _sums(invoice: Invoice) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, amount in (
        ("subtotal", invoice.subtotal),
        ("tax", invoice.tax),
        ("total", invoice.total),
        ("amount due", invoice.amount_due),
    ):
        table.add_row(name, f"{grouped(amount)} {invoice.currency}")
    return table


def _title(line: Line) -> str:
    if line.base_fee is not None:
        subject = line.base_fee.plan_name
    else:
        subject = line.event_type + (f", {line.price.price.model}" if line.price is not None else "")
    if line.kind == "USAGE":
        return subject
    return f"{subject}, {line.kind} {_day(line.period_start)} to {_day(line.period_end)}"


def _part_title(fee: BaseFee) -> str:
    days, of_days = fee.seconds // _DAY_SECONDS, fee.interval_seconds // _DAY_SECONDS
    return f"{days} of {of_days} days"


def _tier_title(tier: Tier) -> str:
    if tier.bound is not None:
        return tier.bound
    return f"up to {grouped(tier.up_to)}" if tier.up_to is not None else "rest"


def _number(invoice: Invoice) -> str:
    return "" if invoice.number is None else str(invoice.number)


def _day(timestamp: str) -> str:
    return timestamp.partition("T")[0]
