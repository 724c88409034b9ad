"""Ten million events of one tenant: sealing them, invoicing them, and showing the invoice.

Beside it a tenant with one event for each of the big one's snapshots. Its invoice has as many lines and
snapshots, and should take as long to show.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.progress import Progress

from tests.bench.harness import Row, at_least
from tests.bench.platform import Customer, Platform
from tests.bench.sealing import watched_memory
from usameter_core.period import month_of

if TYPE_CHECKING:
    import asyncpg

_EVENTS = 10_000_000
_EVENTS_AT_ONCE = 250_000
_TYPES = 5
_MONTH = month_of(datetime(2026, 1, 1, tzinfo=UTC))
_DAYS = (_MONTH.end - _MONTH.start).days
_EPOCH = 1
_READS = 20


async def measure_ten_million(platform: Platform, repetitions: int) -> list[Row]:
    """Seal and invoice once, whatever the repetitions: making the events takes minutes."""
    note = f"{_EVENTS:,} events of a tenant, {_TYPES} types × {_DAYS} days"
    roots = Row("sealing 10 million events", "events/s", at_least(100_000), at_least(400_000), note=note)
    memory = Row("memory that sealing them takes", "MiB", note="the most that ingest had above what it had before")
    invoicing = Row("their invoice, drafted and finalized", "ms")
    few = _DAYS * _TYPES
    showing = Row(
        "showing their invoice",
        "ms",
        inverse=True,
        note=f"against that of a tenant with {few} events in as many snapshots; {_READS} reads in turn",
    )
    await platform.seal_everything()
    many, little = await platform.new_customer(), await platform.new_customer()
    async with platform.connect() as connection:
        await _load(connection, many, _EVENTS)
        await _load(connection, little, few)
        await connection.execute("VACUUM (ANALYZE) ingest.usage_event, ingest.usage_day")
        await connection.execute("CHECKPOINT")
        async with watched_memory(platform.process("ingest")) as bytes_taken:
            await platform.seal_everything()
        query = "SELECT extract(epoch FROM sealed_at - closed_at) FROM ingest.epoch WHERE org_id = $1 AND epoch = $2"
        roots.add(_EVENTS / float(await connection.fetchval(query, many.org_id, _EPOCH)))
    memory.add(max(bytes_taken) / 2**20)
    async with _client(platform, many) as large, _client(platform, little) as small:
        started = time.perf_counter()
        path = await _invoice(large)
        invoicing.add((time.perf_counter() - started) * 1000)
        path_beside = await _invoice(small)
        for _ in range(_READS):
            showing.add(await _milliseconds(large, path), await _milliseconds(small, path_beside))
    return [roots, memory, invoicing, showing]


async def _load(connection: asyncpg.Connection[asyncpg.Record], customer: Customer, events: int) -> None:
    """Write an open epoch as if its events had come, evenly over the month and the types."""
    await connection.execute("INSERT INTO ingest.epoch (org_id, epoch) VALUES ($1, $2)", customer.org_id, _EPOCH)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"writing {events:,} events", total=events)
        for first in range(0, events, _EVENTS_AT_ONCE):
            last = min(first + _EVENTS_AT_ONCE, events)
            await connection.execute(
                """
                INSERT INTO ingest.usage_event (
                    org_id, event_id, tenant_id, event_type, quantity, occurred_at, timestamp_given, ingested_at,
                    epoch, metadata, idempotency_key, request_hash, leaf_hash)
                SELECT $1, gen_random_uuid(), 'tenant', 'type_' || n % $4, 1,
                       $5::timestamptz + (n / $4) % $6 * interval '1 day' + n % 86400 * interval '1 second',
                       TRUE, $7, $2, '{}', 'key_' || n, sha256(int8send(n)), sha256(int8send(n))
                FROM generate_series($3::bigint, $8::bigint - 1) AS n
                """,
                customer.org_id,
                _EPOCH,
                first,
                _TYPES,
                _MONTH.start,
                _DAYS,
                _MONTH.end + timedelta(days=1),
                last,
            )
            progress.update(task, completed=last)
    await connection.execute(
        """
        INSERT INTO ingest.usage_day (
            org_id, tenant_id, event_type, day, epoch, slot, event_count, correction_count, quantity)
        SELECT org_id, tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date AS day, epoch, 0,
               count(*), 0, sum(quantity)
        FROM ingest.usage_event WHERE org_id = $1 AND epoch = $2
        GROUP BY org_id, tenant_id, event_type, day, epoch
        """,
        customer.org_id,
        _EPOCH,
    )


def _client(platform: Platform, customer: Customer) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {customer.api_key}"}
    return httpx.AsyncClient(base_url=f"{platform.url}/api/v1", headers=headers, timeout=60)


async def _invoice(client: httpx.AsyncClient) -> str:
    """The path of a finalized invoice of the month."""
    for number in range(_TYPES):
        price = {"model": "per_unit", "currency": "USD", "unit_amount": "0.001"}
        body = {"event_type": f"type_{number}", "effective_from": _MONTH.start.isoformat(), "price": price}
        await _post(client, "/prices", body)
    period = {"period_start": _MONTH.start.isoformat(), "period_end": _MONTH.end.isoformat()}
    draft = await _post(client, "/invoices", {"tenant_id": "tenant", **period})
    invoice = await _post(client, f"/invoices/{draft['id']}:finalize", {})
    assert len(invoice["lines"]) == _TYPES
    return f"/invoices/{invoice['id']}"


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == httpx.codes.OK, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def _milliseconds(client: httpx.AsyncClient, path: str) -> float:
    started = time.perf_counter()
    answer = await client.get(path)
    assert answer.status_code == httpx.codes.OK, answer.text
    return (time.perf_counter() - started) * 1000
