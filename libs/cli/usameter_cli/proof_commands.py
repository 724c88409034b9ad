"""`usameter invoices proof` and `events`: what an invoice is made of, for `usameter verify` and for spreadsheets."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from usameter_cli.api import Answer, ApiClient, open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.entry_rows import COLUMNS, row_of
from usameter_cli.errors import UsageError
from usameter_cli.output import print_json, terminal

_PATIENCE_SECONDS = 30.0
_PAGE_EVENTS = 1_000

InvoiceIdArgument = Annotated[str, typer.Argument(metavar="ID", help='"inv_" and 32 hex digits.')]


def proof(
    invoice_id: InvoiceIdArgument,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
) -> None:
    """Print the proof of a finalized invoice, one JSON document: INVOICE.json of `usameter verify`."""
    with open_api(resolve_connection(url, api_key_env), patience_seconds=_PATIENCE_SECONDS) as api:
        first, *others = _pages(api, invoice_id, "proof", {})
    for page in others:
        first["snapshots"] += page["snapshots"]
        first["epochs"] += page["epochs"]
    first.pop("next_page_token", None)
    print_json(first)


def events(
    invoice_id: InvoiceIdArgument,
    as_csv: Annotated[bool, typer.Option("--csv", help="Rows of CSV instead; for people, not for verify.")] = False,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
) -> None:
    """Print the events and corrections behind an invoice, one JSON object a line: EVENTS.jsonl of `usameter verify`."""
    rows = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        rows.writerow(COLUMNS)
    console = terminal()
    columns = (TextColumn("{task.completed:,} entries"), TimeElapsedColumn())
    with (
        open_api(resolve_connection(url, api_key_env), patience_seconds=_PATIENCE_SECONDS) as api,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        # How many there are nobody knows before they are read.
        task = progress.add_task("", total=None)
        for page in _pages(api, invoice_id, "events", {"limit": _PAGE_EVENTS}):
            entries = read_as(list[dict[str, Any]], page["events"])
            if as_csv:
                rows.writerows(map(row_of, entries))
            else:
                sys.stdout.write("".join(msgspec.json.encode(entry).decode() + "\n" for entry in entries))
            progress.advance(task, len(entries))


def _pages(api: ApiClient, invoice_id: str, what: str, parameters: dict[str, str | int | None]) -> Iterator[Answer]:
    """The pages of a list of an invoice, as the server wrote them."""
    if not invoice_id.strip():
        raise UsageError("The invoice's ID is empty.")
    path = f"/api/v1/invoices/{quote(invoice_id, safe='')}/{what}"
    token: str | None = None
    while True:
        page = api.get(path, {**parameters, "page_token": token})
        token = page.get("next_page_token")
        yield page
        if not token:
            return
