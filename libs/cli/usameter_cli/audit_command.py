"""`usameter audit`: compares everything that is stored twice, or follows from something else."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from usameter_cli.api import ApiClient, open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.output import JsonOption, new_table, people, print_json, terminal

_PATIENCE_SECONDS = 60.0


class Part(StrEnum):
    """What can be audited by itself, by the service that it is about."""

    INGEST = "ingest"
    QUOTA = "quota"
    BILLING = "billing"


# Of a part: its route, and the invariants that it checks.
_ROUTES = {
    Part.INGEST: ("/api/v1/ledger:audit", "I1 I2 I3 I9"),
    Part.QUOTA: ("/api/v1/quotas:audit", "I4"),
    Part.BILLING: ("/api/v1/invoices:audit", "I5 I6 I7"),
}


class _Violation(msgspec.Struct, frozen=True):
    invariant: str
    problem: str
    place: dict[str, str | int]
    expected: str
    found: str


class _Page(msgspec.Struct, frozen=True):
    checked: int
    violations: list[_Violation]
    next_page_token: str | None = None


def audit(
    *,
    only: Annotated[Part | None, typer.Option("--only", help="One part of it.")] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Check that all that is stored of the organization agrees, while it is used. Exit code 1 if something does not.

    Events, sums, snapshots and the chain (ingest), quota counters and limits (quota), invoices (billing). It changes
    nothing; the key needs the scope audit:read.
    """
    connection = resolve_connection(url, api_key_env)
    parts = list(Part) if only is None else [only]
    checked: dict[Part, int] = {}
    violations: list[_Violation] = []
    console = terminal()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}"),
        TimeElapsedColumn(),
    )
    with (
        open_api(connection, patience_seconds=_PATIENCE_SECONDS) as api,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for part in parts:
            # How much there is nobody knows before it is read.
            task = progress.add_task(f"{part} ({_ROUTES[part][1]})", total=None)
            checked[part] = 0
            for page in _pages(api, _ROUTES[part][0]):
                checked[part] += page.checked
                violations += page.violations
                progress.update(task, completed=checked[part])
            progress.update(task, total=checked[part])
    if as_json:
        print_json({"checked": checked, "violations": violations})
    else:
        _print(checked, violations)
    if violations:
        raise typer.Exit(1)


def _pages(api: ApiClient, route: str) -> Iterator[_Page]:
    token: str | None = ""
    while token is not None:
        page = read_as(_Page, api.post(route, {"page_token": token}))
        yield page
        token = page.next_page_token


def _print(checked: dict[Part, int], violations: list[_Violation]) -> None:
    console = people()
    if violations:
        # One below the other: most are hashes, of which a screen has no two side by side.
        table = new_table("invariant", "problem", "where", "expected, and found", whole=("invariant",))
        for each in violations:
            where = "\n".join(f"{name} {value}" for name, value in each.place.items())
            table.add_row(each.invariant, each.problem, where, f"{each.expected}\n{each.found}")
        console.print(table)
    compared = "; ".join(f"{part} {count:,}" for part, count in checked.items())
    console.print(f"compared: {compared}; violations: {len(violations):,}")
