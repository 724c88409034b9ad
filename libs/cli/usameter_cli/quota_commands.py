"""`usameter quotas`: counters beside the ledger."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from usameter_cli.api import ApiClient, open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json, terminal

app = typer.Typer(no_args_is_help=True, help="Quotas.")

_PATIENCE_SECONDS = 30.0


class _Difference(msgspec.Struct, frozen=True):
    tenant_id: str
    event_type: str
    unit: str
    start: str
    counter: str
    entries: str
    reserved: str
    expected: str
    fixed: bool


class _Held(msgspec.Struct, frozen=True):
    tenant_id: str
    event_type: str
    hour: str
    quantity: str


class _StuckReservation(msgspec.Struct, frozen=True):
    reservation_id: str
    created_at: str
    held: list[_Held]
    stored: bool
    fixed: bool


class _Page(msgspec.Struct, frozen=True):
    compared: int
    differences: list[_Difference]
    stuck_reservations: list[_StuckReservation]
    next_page_token: str | None = None


# Without this Typer takes an only command for the whole program, and there is no `quotas reconcile`.
@app.callback()
def quotas() -> None:
    """Quotas."""


@app.command()
def reconcile(
    *,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what differs.")] = False,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Compare quota counters with events and open reservations. Exit code 1 if something is wrong and stays so."""
    connection = resolve_connection(url, api_key_env)
    with open_api(connection, patience_seconds=_PATIENCE_SECONDS) as api:
        pages = _pages(api, fix=fix)
    compared = sum(page.compared for page in pages)
    differences = [each for page in pages for each in page.differences]
    stuck = [each for page in pages for each in page.stuck_reservations]
    if as_json:
        print_json({"compared": compared, "differences": differences, "stuck_reservations": stuck})
    else:
        _print(compared, differences, stuck)
    if not all([each.fixed for each in differences] + [each.fixed for each in stuck]):
        raise typer.Exit(1)


def _pages(api: ApiClient, *, fix: bool) -> list[_Page]:
    console = terminal()
    columns = (TextColumn("counters"), BarColumn(), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    pages: list[_Page] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        # How many there are nobody knows before they are read.
        task = progress.add_task("", total=None)
        while not pages or pages[-1].next_page_token:
            token = (pages[-1].next_page_token if pages else None) or ""
            pages.append(read_as(_Page, api.post("/api/v1/quotas:reconcile", {"fix": fix, "page_token": token})))
            progress.advance(task, pages[-1].compared)
    return pages


def _print(compared: int, differences: list[_Difference], stuck: list[_StuckReservation]) -> None:
    console = people()
    numbers = ("counter", "entries", "reserved", "expected")
    if differences:
        table = new_table("tenant", "event type", "unit", "start", *numbers, "fixed", right=numbers, whole=("start",))
        for each in differences:
            table.add_row(
                each.tenant_id,
                each.event_type,
                each.unit.lower(),
                each.start,
                *(grouped(number) for number in (each.counter, each.entries, each.reserved, each.expected)),
                _yes(each.fixed),
            )
        console.print(table)
    if stuck:
        table = new_table(
            "reservation", "since", "tenant", "event type", "held", "stored", "fixed", right=("held",), whole=("since",)
        )
        for reservation in stuck:
            for held in reservation.held:
                table.add_row(
                    reservation.reservation_id,
                    reservation.created_at,
                    held.tenant_id,
                    held.event_type,
                    grouped(held.quantity),
                    _yes(reservation.stored),
                    _yes(reservation.fixed),
                )
        console.print(table)
    console.print(f"counters compared: {compared:,}; wrong: {len(differences):,}; reservations stuck: {len(stuck):,}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
