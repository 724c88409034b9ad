"""`usameter invoices`, once they are finalized: void, paid, uncollectible, and the report."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import msgspec
import typer

from usameter_cli.api import open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import UsageError
from usameter_cli.invoice_tables import print_invoice
from usameter_cli.invoice_values import Invoice
from usameter_cli.moments import moment_from_text, month_from_text
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json
from usameter_core.period import format_timestamp

InvoiceArgument = Annotated[str, typer.Argument(metavar="ID", help='"inv_" and 32 hex digits.')]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for whoever reads it later.")]

_SUMS = ("billed", "paid", "pending", "overdue", "uncollectible", "credited", "credit_drawn", "void", "draft")


class _Sum(msgspec.Struct, frozen=True):
    amount: str
    count: int


class _CurrencyReport(msgspec.Struct, frozen=True):
    currency: str
    billed: _Sum
    paid: _Sum
    pending: _Sum
    overdue: _Sum
    uncollectible: _Sum
    credited: _Sum
    credit_drawn: _Sum
    void: _Sum
    draft: _Sum


def void(
    invoice_id: InvoiceArgument,
    *,
    reason: ReasonOption,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Take an invoice back, so that what it billed is billed again. To forgive, make a credit note."""
    _change(invoice_id, "void", {"reason": reason}, url, api_key_env, as_json=as_json)


def mark_paid(
    invoice_id: InvoiceArgument,
    *,
    reference: Annotated[str | None, typer.Option(help="E.g. of the bank transfer.")] = None,
    paid_at: Annotated[
        str | None, typer.Option("--paid-at", metavar="WHEN", help="A day or an RFC 3339 time; default: now.")
    ] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Record that what was due has been paid."""
    moment = None if paid_at is None else format_timestamp(moment_from_text(paid_at, option="--paid-at"))
    body = {"reference": reference, "paid_at": moment}
    _change(invoice_id, "markPaid", body, url, api_key_env, as_json=as_json)


def mark_uncollectible(
    invoice_id: InvoiceArgument,
    *,
    reason: ReasonOption,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Write an open invoice off. It stays billed, and can still be paid."""
    _change(invoice_id, "markUncollectible", {"reason": reason}, url, api_key_env, as_json=as_json)


def report(
    *,
    period: Annotated[str, typer.Option("--period", metavar="YYYY-MM", help="Of periods that start in this month.")],
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Sum up the invoices of a month: what was billed, paid, is pending, was credited; per currency."""
    month = month_from_text(period, option="--period")
    bounds = {"period_start": format_timestamp(month.start), "period_end": format_timestamp(month.end)}
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.get("/api/v1/billing/report", bounds)
    if as_json:
        print_json(answer)
        return
    found = read_as(list[_CurrencyReport], answer.get("currencies", []))
    table = new_table(
        "",
        *(name for each in found for name in (each.currency, f"{each.currency} count")),
        right=tuple(name for each in found for name in (each.currency, f"{each.currency} count")),
    )
    for name in _SUMS:
        sums: list[_Sum] = [getattr(each, name) for each in found]
        table.add_row(
            name.replace("_", " "), *(text for each in sums for text in (grouped(each.amount), f"{each.count:,}"))
        )
    people().print(table)


def _change(
    invoice_id: str, verb: str, body: dict[str, str | None], url: str | None, api_key_env: str, *, as_json: bool
) -> None:
    given = {name: value for name, value in body.items() if value is not None}
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.post(f"{_path_of(invoice_id)}:{verb}", given)
    if as_json:
        print_json(answer)
    else:
        print_invoice(read_as(Invoice, answer))


def _path_of(invoice_id: str) -> str:
    if not invoice_id.strip():
        raise UsageError("The invoice's ID is empty.")
    return f"/api/v1/invoices/{quote(invoice_id, safe='')}"
