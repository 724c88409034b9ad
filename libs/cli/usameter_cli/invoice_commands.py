"""`usameter invoices`: makes them, lists them, shows one."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from usameter_cli.api import Answer, ApiClient, open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import CliError, UsageError
from usameter_cli.invoice_tables import print_invoice, print_invoices, print_totals
from usameter_cli.invoice_values import Invoice, Job
from usameter_cli.moments import month_from_text, period_from_text
from usameter_cli.output import JsonOption, print_json, terminal
from usameter_core.decimals import CONTEXT
from usameter_core.money import format_amount
from usameter_core.period import Period, format_timestamp

app = typer.Typer(no_args_is_help=True, help="Invoices.")

_PATIENCE_SECONDS = 30.0
_POLL_SECONDS_FIRST = 0.05
_POLL_SECONDS_MAX = 1.0
_PAGE_INVOICES_MAX = 1_000


class InvoiceStatus(StrEnum):
    """The API's names."""

    DRAFT = "draft"
    OPEN = "open"
    PAID = "paid"
    VOID = "void"
    UNCOLLECTIBLE = "uncollectible"


@app.command()
def generate(
    *,
    period: Annotated[
        str,
        typer.Option(
            "--period",
            metavar="YYYY-MM",
            help="A UTC calendar month; with --tenant also the billing period from a day up to another, without that "
            "one: 2026-01-15..2026-02-15.",
        ),
    ],
    finalize: Annotated[bool, typer.Option("--finalize", help="Freeze and number them; else drafts.")] = False,
    tenant: Annotated[str | None, typer.Option(help="For this tenant only; default: every one with use.")] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Make the invoices of a month, from sealed usage: of each tenant the last billing period that ends in it.

    With --tenant it is one tenant's, for one of its billing periods. Run again, it bills nothing twice.
    """
    if tenant is None and ".." in period:
        raise UsageError("--period with two days is one tenant's billing period: say whose with --tenant.")
    asked = period_from_text(period, option="--period")
    connection = resolve_connection(url, api_key_env)
    with open_api(connection, patience_seconds=_PATIENCE_SECONDS) as api:
        if tenant is not None:
            answer = _generate_one(api, asked, tenant, finalize=finalize)
            _print_one(answer, as_json=as_json)
            return
        job = _generate_all(api, asked, finalize=finalize)
        invoices = [read_as(Invoice, each) for each in _invoices(api, _ends_in(asked))]
    counts, totals = _counts(invoices), _totals(invoices)
    if as_json:
        print_json({"job_id": job.id, "problems": job.problems, "invoices": counts, "totals": totals})
    else:
        print_totals(counts, totals)
    for problem in job.problems:
        terminal().print(problem)
    if not invoices:
        terminal().print("No invoices: use is billed once its epoch is sealed and its event type has a price.")


@app.command("list")
def list_invoices(
    *,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    status: Annotated[InvoiceStatus | None, typer.Option(help="In this state only.")] = None,
    period: Annotated[
        str | None, typer.Option("--period", metavar="YYYY-MM", help="Of periods that start with this month.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """List invoices, newest first."""
    start = None if period is None else format_timestamp(month_from_text(period, option="--period").start)
    connection = resolve_connection(url, api_key_env)
    filters = {"tenant_id": tenant, "status": status, "period_start": start}
    with open_api(connection) as api:
        found = list(itertools.islice(_invoices(api, filters, page_max=min(limit, _PAGE_INVOICES_MAX)), limit))
    if as_json:
        print_json({"invoices": found})
    else:
        print_invoices([read_as(Invoice, each) for each in found])


@app.command()
def show(
    invoice_id: Annotated[str, typer.Argument(metavar="ID", help='"inv_" and 32 hex digits.')],
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Show an invoice with its lines and what each tier contributed."""
    if not invoice_id.strip():
        raise UsageError("The invoice's ID is empty.")
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.get(f"/api/v1/invoices/{quote(invoice_id, safe='')}")
    _print_one(answer, as_json=as_json)


def _generate_one(api: ApiClient, period: Period, tenant: str, *, finalize: bool) -> Answer:
    answer = api.post("/api/v1/invoices", {"tenant_id": tenant, **_bounds_of(period)})
    if finalize:
        answer = api.post(f"/api/v1/invoices/{read_as(Invoice, answer).id}:finalize", {})
    return answer


def _generate_all(api: ApiClient, month: Period, *, finalize: bool) -> Job:
    answer = api.post("/api/v1/invoices:bulkGenerate", {**_bounds_of(month), "finalize": finalize})
    job = read_as(Job, answer)
    console = terminal()
    columns = (TextColumn("invoices"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pause_seconds = _POLL_SECONDS_FIRST
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        while job.state == "running":
            progress.update(task, completed=job.done, total=job.total or None)
            time.sleep(pause_seconds)
            pause_seconds = min(_POLL_SECONDS_MAX, pause_seconds * 1.5)
            job = read_as(Job, api.get(f"/api/v1/jobs/{quote(job.id, safe='')}"))
    if job.state != "succeeded":
        reasons = "; ".join(job.problems) or "no reason was given"
        raise CliError(f"The job {job.id} {job.state}: {reasons}. Running it again bills nothing twice.")
    return job


def _print_one(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        print_invoice(read_as(Invoice, answer))


def _bounds_of(period: Period) -> dict[str, str]:
    return {"period_start": format_timestamp(period.start), "period_end": format_timestamp(period.end)}


def _ends_in(month: Period) -> dict[str, str | None]:
    """The filters that pass what a bulk run of the month invoices: of each tenant the last period that ends in it."""
    return {"period_ends_after": format_timestamp(month.start), "period_ends_by": format_timestamp(month.end)}


def _invoices(
    api: ApiClient, filters: dict[str, str | None], *, page_max: int = _PAGE_INVOICES_MAX
) -> Iterator[dict[str, Any]]:
    """Every invoice that the filters let through, page by page, as the server wrote it."""
    token: str | None = None
    while True:
        answer = api.get("/api/v1/invoices", {**filters, "limit": page_max, "page_token": token})
        yield from read_as(list[dict[str, Any]], answer.get("invoices", []))
        token = answer.get("next_page_token")
        if not token:
            return


def _counts(invoices: list[Invoice]) -> dict[str, int]:
    return dict(sorted(Counter(invoice.status for invoice in invoices).items()))


def _totals(invoices: list[Invoice]) -> dict[str, str]:
    """The sum of totals of each currency."""
    sums: dict[str, Decimal] = {}
    for invoice in invoices:
        sums[invoice.currency] = CONTEXT.add(sums.get(invoice.currency, Decimal(0)), Decimal(invoice.total))
    return {currency: format_amount(total, currency) for currency, total in sorted(sums.items())}
