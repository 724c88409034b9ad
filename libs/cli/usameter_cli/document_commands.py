"""`usameter invoices pdf`, `html` and `csv`: an invoice as a file, for people and spreadsheets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from usameter_cli.api import open_api
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import UsageError

# A document may take the server 25 seconds, and two are made at once.
_PATIENCE_SECONDS = 60.0

InvoiceIdArgument = Annotated[str, typer.Argument(metavar="ID", help='"inv_" and 32 hex digits.')]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where it goes; what is there is replaced.")
]


def pdf(
    invoice_id: InvoiceIdArgument,
    *,
    output: OutputOption,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
) -> None:
    """Write an invoice as a PDF."""
    _save(invoice_id, "pdf", output, url, api_key_env)


def html(
    invoice_id: InvoiceIdArgument,
    *,
    output: OutputOption,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
) -> None:
    """Write an invoice as a page of HTML."""
    _save(invoice_id, "html", output, url, api_key_env)


def csv(
    invoice_id: InvoiceIdArgument,
    *,
    output: OutputOption,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
) -> None:
    """Write the lines of an invoice as CSV."""
    _save(invoice_id, "csv", output, url, api_key_env)


def _save(invoice_id: str, form: str, output: Path, url: str | None, api_key_env: str) -> None:
    if not invoice_id.strip():
        raise UsageError("The invoice's ID is empty.")
    with open_api(resolve_connection(url, api_key_env), patience_seconds=_PATIENCE_SECONDS) as api:
        content = api.download(f"/api/v1/invoices/{quote(invoice_id, safe='')}/{form}")
    try:
        output.write_bytes(content)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}.") from error
