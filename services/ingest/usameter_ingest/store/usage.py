"""Sums over any span of time: whole days and hours from the rollups, what is left at its ends from the entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING

from usameter_core.ids import OrgId
from usameter_core.period import Period, day_start, hour_start
from usameter_core.postgres.pool import unavailable_without_postgres

if TYPE_CHECKING:
    from usameter_core.postgres.pool import Pool


class Grouping(StrEnum):
    """What use is summed by; the values are columns of `part`."""

    EVENT_TYPE = "event_type"
    TENANT = "tenant_id"
    DAY = "day"
    HOUR = "hour"


@dataclass(frozen=True, slots=True)
class UsageSum:
    """The use of one group."""

    # By grouping: a text, a date, or the beginning of an hour.
    key: object
    quantity: Decimal
    event_count: int


@dataclass(frozen=True, slots=True)
class SplitSpan:
    """A span of time as pieces that tile it: whole UTC days, whole hours, and parts of hours."""

    days: list[Period]
    hours: list[Period]
    moments: list[Period]


_DAYS = """
    SELECT tenant_id, event_type, day, NULL::timestamptz AS hour, event_count, quantity
    FROM ingest.usage_day
    WHERE org_id = $1 AND day >= ({start} AT TIME ZONE 'UTC')::date AND day < ({end} AT TIME ZONE 'UTC')::date"""
_HOURS = """
    SELECT tenant_id, event_type, (hour AT TIME ZONE 'UTC')::date AS day, hour, event_count, quantity
    FROM ingest.usage_hour
    WHERE org_id = $1 AND hour >= {start} AND hour < {end}"""
_EVENTS = """
    SELECT tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date AS day,
           date_trunc('hour', occurred_at, 'UTC') AS hour, 1 AS event_count, quantity
    FROM ingest.usage_event
    WHERE org_id = $1 AND occurred_at >= {start} AND occurred_at < {end}"""
_CORRECTIONS = """
    SELECT tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date AS day,
           date_trunc('hour', occurred_at, 'UTC') AS hour, 0 AS event_count, quantity_delta AS quantity
    FROM ingest.correction
    WHERE org_id = $1 AND occurred_at >= {start} AND occurred_at < {end}"""


class UsageStore:
    """Reads sums of use."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def sum_usage(
        self, org_id: OrgId, span: Period, *, tenant_id: str | None, event_type: str | None, grouping: Grouping
    ) -> list[UsageSum]:
        """Use by group, ascending, exact up to the last commit; groups without entries are absent.

        One statement, hence one snapshot of the database: no entry is seen in one part and missed in another.
        """
        query, arguments = _query(org_id, span, tenant_id=tenant_id, event_type=event_type, grouping=grouping)
        with unavailable_without_postgres():
            async with self._pool.acquire() as connection, connection.transaction():
                # A plan made for any span and tenant is not the one for a month of all: 900 ms instead of 40.
                await connection.execute("SET LOCAL plan_cache_mode = force_custom_plan")
                rows = await connection.fetch(query, *arguments)
        return [UsageSum(row["key"], row["quantity"], row["event_count"]) for row in rows]


def _query(
    org_id: OrgId, span: Period, *, tenant_id: str | None, event_type: str | None, grouping: Grouping
) -> tuple[str, list[object]]:
    """The statement that sums the pieces of a span, and its arguments."""
    arguments: list[object] = [org_id]

    def argument(value: object, kind: str) -> str:
        arguments.append(value)
        return f"${len(arguments)}::{kind}"

    conditions = ""
    for column, value in (("tenant_id", tenant_id), ("event_type", event_type)):
        if value is not None:
            conditions += f" AND {column} = {argument(value, 'text')}"
    split = split_span(span, by_day=grouping is not Grouping.HOUR)
    parts = []
    for selects, pieces in (((_DAYS,), split.days), ((_HOURS,), split.hours), ((_EVENTS, _CORRECTIONS), split.moments)):
        for piece in pieces:
            start, end = argument(piece.start, "timestamptz"), argument(piece.end, "timestamptz")
            parts += [select.format(start=start, end=end) + conditions for select in selects]
    query = f"""
        SELECT part.{grouping} AS key, sum(part.quantity) AS quantity, sum(part.event_count)::bigint AS event_count
        FROM ({" UNION ALL ".join(parts)}) AS part
        GROUP BY 1 ORDER BY 1
        """
    return query, arguments


def split_span(span: Period, *, by_day: bool) -> SplitSpan:
    """Few pieces, as long as they can be: one of days, two of hours and two of moments at most.

    Args:
        span: Not empty.
        by_day: False: hours and parts of hours only.
    """
    days, broken_days = _whole_units(span, day_start, timedelta(days=1)) if by_day else ([], [span])
    hours: list[Period] = []
    moments: list[Period] = []
    for each in broken_days:
        whole, broken = _whole_units(each, hour_start, timedelta(hours=1))
        hours += whole
        moments += broken
    return SplitSpan(days, hours, moments)


def _whole_units(
    span: Period, unit_start: Callable[[datetime], datetime], unit: timedelta
) -> tuple[list[Period], list[Period]]:
    """The whole units of a span as one piece, if it has any; and what is left before and after them."""
    first, last = unit_start(span.start), unit_start(span.end)
    # The next unit is asked for only where there is one: time ends with the year 9999.
    if first < span.start and first < last:
        first += unit
    if not span.start <= first < last:
        return [], [span]
    rest = [Period(span.start, first), Period(last, span.end)]
    return [Period(first, last)], [each for each in rest if each.start < each.end]
