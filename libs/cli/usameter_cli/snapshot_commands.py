"""`usameter snapshots`: seals the ledger's open pages, and lists those that are sealed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from usameter_cli.api import ApiClient, open_api, read_as
from usameter_cli.connection import (
    API_KEY_VARIABLE,
    CRON_SECRET_VARIABLE,
    ApiKeyEnvOption,
    UrlOption,
    resolve_connection,
)
from usameter_cli.invoice_values import Job
from usameter_cli.moments import day_from_text
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json, terminal

app = typer.Typer(no_args_is_help=True, help="Sealed pages of the ledger.")

# An answer comes after 25 seconds at the latest, with a job where that was too short.
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5
_PAGE_EPOCHS_MAX = 1_000


class _SealedEpoch(msgspec.Struct, frozen=True):
    org_id: str
    epoch: int
    entry_count: int
    snapshot_count: int
    root: str
    sealed_at: str


class _Sealed(msgspec.Struct, frozen=True):
    sealed: list[_SealedEpoch]
    job: Job | None = None


class _Epoch(msgspec.Struct, frozen=True):
    epoch: int
    entry_count: int
    snapshot_count: int
    root: str
    sealed_at: str


@app.command()
def seal(
    *,
    date: Annotated[
        str | None, typer.Option("--date", metavar="YYYY-MM-DD", help="Only what has entries from before its end, UTC.")
    ] = None,
    url: UrlOption = None,
    cron_secret_env: Annotated[
        str,
        typer.Option("--cron-secret-env", metavar="VARIABLE", help="The environment variable with the cron secret."),
    ] = CRON_SECRET_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Seal the open epochs of all organizations, as the scheduler does. Run again, it seals what is left."""
    query = "" if date is None else f"?date={day_from_text(date, option='--date').isoformat()}"
    connection = resolve_connection(url, cron_secret_env)
    console = terminal()
    columns = (TextColumn("entries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        open_api(connection, patience_seconds=_PATIENCE_SECONDS) as api,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=None)
        answer = read_as(_Sealed, api.post(f"/api/cron/snapshots{query}", {}))
        job = answer.job
        while job is not None and job.state == "running":
            progress.update(task, completed=job.done, total=job.total)
            time.sleep(_POLL_SECONDS)
            job = read_as(Job, api.get(f"/api/cron/jobs/{quote(job.id, safe='')}"))
    if as_json:
        print_json({"sealed": answer.sealed, "job": job})
        return
    if answer.sealed:
        table = new_table("organization", *_EPOCH_COLUMNS, right=_NUMBERS, whole=("root",))
        for each in answer.sealed:
            table.add_row(each.org_id, *_row(each))
        people().print(table)
    if job is not None:
        people().print(f"sealed in {job.id}: {job.total:,} entries")
    elif not answer.sealed:
        people().print("nothing to seal")


@app.command("list")
def list_epochs(
    *,
    after: Annotated[int, typer.Option(min=0, metavar="EPOCH", help="Those after this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """List the organization's sealed epochs, oldest first: how much is in them, and the chain's root up to each."""
    connection = resolve_connection(url, api_key_env)
    with open_api(connection) as api:
        found = list(itertools.islice(_epochs(api, after, page_max=min(limit, _PAGE_EPOCHS_MAX)), limit))
    if as_json:
        print_json({"epochs": found})
        return
    table = new_table(*_EPOCH_COLUMNS, right=_NUMBERS, whole=("root",))
    for each in found:
        table.add_row(*_row(read_as(_Epoch, each)))
    people().print(table)


_EPOCH_COLUMNS = ("epoch", "entries", "snapshots", "root", "sealed")
_NUMBERS = ("epoch", "entries", "snapshots")


def _row(epoch: _SealedEpoch | _Epoch) -> tuple[str, ...]:
    counts = (epoch.epoch, epoch.entry_count, epoch.snapshot_count)
    return (*(grouped(str(count)) for count in counts), epoch.root, epoch.sealed_at)


def _epochs(api: ApiClient, after: int, *, page_max: int) -> Iterator[dict[str, Any]]:
    """Sealed epochs, page by page, as the server wrote them."""
    token: str | None = None
    while True:
        answer = api.get("/api/v1/ledger/epochs", {"after_epoch": after, "limit": page_max, "page_token": token})
        yield from read_as(list[dict[str, Any]], answer.get("epochs", []))
        token = answer.get("next_page_token")
        if not token:
            return
