"""`usameter usage`: how much was used."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
import typer

from usameter_cli.api import open_api, read_as
from usameter_cli.connection import API_KEY_VARIABLE, ApiKeyEnvOption, UrlOption, resolve_connection
from usameter_cli.errors import UsageError
from usameter_cli.moments import moment_from_text, month_from_text
from usameter_cli.output import JsonOption, grouped, new_table, people, print_json
from usameter_core.period import format_timestamp


class Grouping(StrEnum):
    """What usage is added up by; also the API's names for it."""

    EVENT_TYPE = "event_type"
    TENANT = "tenant"
    DAY = "day"
    HOUR = "hour"


_FIELDS = {
    Grouping.EVENT_TYPE: "event_type",
    Grouping.TENANT: "tenant_id",
    Grouping.DAY: "date",
    Grouping.HOUR: "hour",
}


class _Group(msgspec.Struct, frozen=True):
    total_quantity: str
    event_count: int
    event_type: str = ""
    tenant_id: str = ""
    date: str = ""
    hour: str = ""


class _Period(msgspec.Struct, frozen=True):
    start: str
    end: str


class _Usage(msgspec.Struct, frozen=True):
    usage: list[_Group]
    period: _Period


def usage(
    *,
    group_by: Annotated[Grouping, typer.Option("--group-by", help="A row for each.")] = Grouping.EVENT_TYPE,
    month: Annotated[str | None, typer.Option(metavar="YYYY-MM", help="A UTC month; default: this one.")] = None,
    start: Annotated[str | None, typer.Option(help="From this day or RFC 3339 time on, instead of --month.")] = None,
    end: Annotated[str | None, typer.Option(help="Up to, and without, this day or time.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Of this tenant only.")] = None,
    event_type: Annotated[str | None, typer.Option(help="Of this event type only.")] = None,
    url: UrlOption = None,
    api_key_env: ApiKeyEnvOption = API_KEY_VARIABLE,
    as_json: JsonOption = False,
) -> None:
    """Usage by event type, tenant, day or hour; exact up to the last recorded event."""
    start_date, end_date = _bounds(month, start, end)
    connection = resolve_connection(url, api_key_env)
    with open_api(connection) as api:
        answer = api.get(
            "/api/v1/usage",
            {
                "group_by": group_by,
                "start_date": start_date,
                "end_date": end_date,
                "tenant_id": tenant,
                "event_type": event_type,
            },
        )
    if as_json:
        print_json(answer)
        return
    read = read_as(_Usage, answer)
    table = new_table(group_by.replace("_", " "), "quantity", "events", right=("quantity", "events"))
    for group in read.usage:
        name = str(getattr(group, _FIELDS[group_by]))
        table.add_row(name, grouped(group.total_quantity), f"{group.event_count:,}")
    console = people()
    console.print(f"{read.period.start} to {read.period.end}")
    console.print(table)


def _bounds(month: str | None, start: str | None, end: str | None) -> tuple[str | None, str | None]:
    if month is not None:
        if start is not None or end is not None:
            raise UsageError("Give --month, or --start and --end.")
        period = month_from_text(month, option="--month")
        return format_timestamp(period.start), format_timestamp(period.end)
    return (
        None if start is None else format_timestamp(moment_from_text(start, option="--start")),
        None if end is None else format_timestamp(moment_from_text(end, option="--end")),
    )
