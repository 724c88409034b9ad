"""What must hold of the books of a whole platform, whatever has happened to it before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import asyncpg

_HOUR = "date_trunc('hour', occurred_at, 'UTC') AS hour"
_DAY = "(occurred_at AT TIME ZONE 'UTC')::date AS day"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a client was told of an event, and what is stored of it."""

    event_id: str
    tenant_id: str
    quantity: Decimal


async def is_settled(url: str) -> bool:
    """Whether no reservation is open."""
    return not await _fetch(url, "SELECT FROM quota.reservation WHERE state = 'OPEN'")


async def assert_books_agree(url: str, acknowledged: Mapping[str, Entry]) -> None:
    """I1 to I4, once everything is settled; there may be no corrections.

    Args:
        url: The database, as superuser.
        acknowledged: By idempotency key, all that was answered with 200. Nothing else may be stored.
    """
    rows = await _fetch(url, "SELECT idempotency_key, event_id, tenant_id, quantity FROM ingest.usage_event")
    stored = {
        row["idempotency_key"]: Entry(f"evt_{row['event_id'].hex}", row["tenant_id"], row["quantity"]) for row in rows
    }
    assert stored.items() ^ acknowledged.items() == set()
    assert len(rows) == len(acknowledged)
    await _assert_equal(
        url,
        key="hour",
        entries=f"{_HOUR}, ROW(count(*), sum(quantity)) AS total FROM ingest.usage_event",
        sums="hour, ROW(sum(event_count)::bigint, sum(quantity)) AS total FROM ingest.usage_hour",
    )
    await _assert_equal(
        url,
        key="day, epoch",
        entries=f"{_DAY}, epoch, ROW(count(*), sum(quantity)) AS total FROM ingest.usage_event",
        sums="day, epoch, ROW(sum(event_count)::bigint, sum(quantity)) AS total FROM ingest.usage_day",
    )
    await _assert_equal(
        url,
        key="day, epoch",
        entries=f"""{_DAY}, epoch, ROW(count(*), sum(quantity)) AS total
                    FROM ingest.usage_event JOIN ingest.epoch USING (org_id, epoch) WHERE state = 'SEALED'""",
        sums="day, epoch, ROW(sum(entry_count)::bigint, sum(quantity)) AS total FROM ingest.snapshot",
    )
    for key, of_event, table in (("hour", _HOUR, "usage_hour"), ("day", _DAY, "usage_day")):
        await _assert_equal(
            url,
            key=key,
            entries=f"{of_event}, sum(quantity) AS total FROM ingest.usage_event",
            sums=f"{key}, sum(quantity) AS total FROM quota.{table} WHERE quantity > 0",
        )


async def _assert_equal(url: str, *, key: str, entries: str, sums: str) -> None:
    key = f"org_id, tenant_id, event_type, {key}"
    scope = "org_id, tenant_id, event_type"
    differences = await _fetch(
        url,
        f"""SELECT * FROM (SELECT {scope}, {entries} GROUP BY {key}) AS entries
            FULL JOIN (SELECT {scope}, {sums} GROUP BY {key}) AS sums USING ({key})
            WHERE entries.total IS DISTINCT FROM sums.total""",
    )
    assert differences == []


async def _fetch(url: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()
