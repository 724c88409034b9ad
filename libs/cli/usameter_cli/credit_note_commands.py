"""`usameter credit-notes`: makes them, lists them, shows one."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import quote

import msgspec
import typer

from usameter_cli.api import open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import UsageError
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json

app = typer.Typer(no_args_is_help=True, help="Credit notes.")


class _CreditNote(msgspec.Struct, frozen=True):
    id: str
    number: str
    invoice_id: str
    tenant_id: str
    currency: str
    subtotal: str
    tax: str
    total: str
    amount_due_reduced: str
    credit_granted: str
    reason: str
    issued_at: str


@app.command()
def create(
    invoice_id: Annotated[str, typer.Argument(metavar="INVOICE", help='"inv_" and 32 hex digits.')],
    *,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever reads the credit note.")],
    amount: Annotated[str | None, typer.Option(help="Gross; either this or --line.")] = None,
    line: Annotated[
        list[str] | None,
        typer.Option("--line", metavar="LINE=AMOUNT", help="Net, of an invoice line; may be given several times."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Makes running it again safe: the same key credits once. Default: a new one."),
    ] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Credit a finalized invoice, in part or in full."""
    body = {
        "invoice_id": invoice_id,
        "reason": reason,
        "lines": [_line_from_text(text) for text in line or []],
        # A lost answer is retried, so there is always a key.
        "idempotency_key": key or f"cli-{uuid.uuid4().hex}",
        **({} if amount is None else {"amount": amount}),
    }
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.post("/api/v1/credit-notes", body)
    if as_json:
        print_json(answer)
    else:
        _print([read_as(_CreditNote, answer)])


@app.command("list")
def list_credit_notes(
    *,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    invoice: Annotated[str | None, typer.Option(help="On this invoice only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 100,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """List credit notes, newest first."""
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.get("/api/v1/credit-notes", {"tenant_id": tenant, "invoice_id": invoice, "limit": limit})
    if as_json:
        print_json({"credit_notes": answer.get("credit_notes", [])})
    else:
        _print(read_as(list[_CreditNote], answer.get("credit_notes", [])))


@app.command()
def show(
    credit_note_id: Annotated[str, typer.Argument(metavar="ID", help='"crn_" and 32 hex digits.')],
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Show a credit note."""
    if not credit_note_id.strip():
        raise UsageError("The credit note's ID is empty.")
    with open_api(resolve_connection(url, api_key_env)) as api:
        answer = api.get(f"/api/v1/credit-notes/{quote(credit_note_id, safe='')}")
    if as_json:
        print_json(answer)
    else:
        _print([read_as(_CreditNote, answer)])


def _line_from_text(text: str) -> dict[str, str]:
    line_id, equals, amount = text.partition("=")
    if not equals:
        raise UsageError(f'--line must be a line and an amount like "lin_…=4.50", not {text!r}.')
    return {"line_id": line_id, "amount": amount}


def _print(notes: Sequence[_CreditNote]) -> None:
    numbers = ("net", "tax", "total", "off what is due", "to the credit")
    table = new_table("number", "invoice", "tenant", *numbers, "", "reason", right=numbers, whole=("invoice",))
    for note in notes:
        table.add_row(
            note.number,
            note.invoice_id,
            note.tenant_id,
            grouped(note.subtotal),
            grouped(note.tax),
            grouped(note.total),
            grouped(note.amount_due_reduced),
            grouped(note.credit_granted),
            note.currency,
            note.reason,
        )
    people().print(table)
