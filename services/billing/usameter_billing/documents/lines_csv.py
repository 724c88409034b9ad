"""The lines of an invoice as CSV, for spreadsheets and programs."""

from __future__ import annotations

import csv
import io
from decimal import Decimal

from usameter.billing.v1 import invoice_pb2
from usameter_core.decimals import exact_sum
from usameter_core.grpc.timestamps import datetime_in
from usameter_core.money import format_amount
from usameter_core.period import format_timestamp

COLUMNS = (
    "invoice_id",
    "invoice_number",
    "tenant_id",
    "status",
    "line_id",
    "kind",
    "event_type",
    "plan_name",
    "period_start",
    "period_end",
    "quantity",
    "rated_amount",
    "previously_billed",
    "amount",
    "currency",
    "tax_rate",
)


def lines_csv(invoice: invoice_pb2.Invoice) -> bytes:
    """A row a line below a row of `COLUMNS`, UTF-8 (RFC 4180); what a line has not is empty."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for line in invoice.lines:
        billed = exact_sum(Decimal(each.amount) for each in line.previously_billed)
        rows.writerow(
            (
                invoice.id,
                invoice.number if invoice.HasField("number") else "",
                _no_formula(invoice.tenant_id),
                invoice_pb2.InvoiceStatus.Name(invoice.status),
                line.id,
                invoice_pb2.LineKind.Name(line.kind),
                _no_formula(line.event_type),
                _no_formula(line.base_fee.plan_name),
                _moment(line, "period_start"),
                _moment(line, "period_end"),
                line.quantity,
                line.rated_amount,
                format_amount(billed, invoice.currency),
                line.amount,
                invoice.currency,
                line.tax_rate,
            )
        )
    return text.getvalue().encode()


def _no_formula(text: str) -> str:
    # A spreadsheet runs what begins like a formula, and these texts may be anybody's.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _moment(line: invoice_pb2.InvoiceLine, field: str) -> str:
    moment = datetime_in(line, field)
    assert moment is not None
    return format_timestamp(moment)
