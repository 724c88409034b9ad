"""Durable batches over REST, beside the same rows inserted with nothing around them; and batches sent again."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg

from tests.bench.harness import Row, at_least
from tests.bench.load import HttpConnection, open_connections, send_closed
from tests.bench.platform import CpuMeter, Customer, Platform
from tests.bench.usage_data import BATCH_EVENTS, batch_columns, batch_request, new_batches

_TENANTS_A_BATCH = (1, 100, 1_000)
_BATCHES_A_RUN = 40
_CONNECTIONS = 4
_BARE_INSERT = """
    INSERT INTO bench.usage_event (
        org_id, event_id, tenant_id, event_type, quantity, occurred_at, timestamp_given, ingested_at,
        epoch, metadata, idempotency_key, request_hash, leaf_hash)
    SELECT $1, e.*
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::numeric[], $6::timestamptz[], $7::boolean[],
                $8::timestamptz[], $9::bigint[], $10::json[], $11::text[], $12::bytea[], $13::bytea[]) AS e
    """


async def measure_batches(platform: Platform, repetitions: int) -> list[Row]:
    """Events a second with few and many tenants a batch."""
    async with open_connections(platform.url, _CONNECTIONS) as connections, _bare_table(platform) as bare:
        return [await _measure(platform, connections, bare, tenants, repetitions) for tenants in _TENANTS_A_BATCH]


async def _measure(
    platform: Platform,
    connections: Sequence[HttpConnection],
    bare: asyncpg.Connection[asyncpg.Record],
    tenants: int,
    repetitions: int,
) -> Row:
    judged = tenants == 100
    row = Row(
        f"batches of {BATCH_EVENTS:,}, {tenants:,} tenant{'s' if tenants > 1 else ''} a batch ÷ bare insert",
        "events/s",
        must=at_least(0.5) if judged else None,
        aim=at_least(0.8) if judged else None,
        note=f"{_CONNECTIONS} REST connections; bare: asyncpg, one connection, one commit a batch",
    )
    customer, meter = await platform.new_customer(), CpuMeter(platform)
    await send_closed(connections, _requests(customer, tenants, _CONNECTIONS))
    await _insert(bare, customer, tenants, _CONNECTIONS)
    for _ in range(repetitions):
        requests = _requests(customer, tenants, _BATCHES_A_RUN)
        with meter.measure():
            sent = await send_closed(connections, requests)
        meter.add_events(_BATCHES_A_RUN * BATCH_EVENTS)
        row.add(sent.rate * BATCH_EVENTS, await _insert(bare, customer, tenants, _BATCHES_A_RUN))
    row.cpu = meter.microseconds_an_event()
    return row


async def measure_resending(platform: Platform, repetitions: int) -> list[Row]:
    """Events a second of batches that are stored already, beside sending them first."""
    row = Row(
        "known batches sent again ÷ sent first",
        "events/s",
        must=at_least(1),
        aim=at_least(2),
        note=f"{_CONNECTIONS} REST connections, 100 tenants a batch",
    )
    customer, meter = await platform.new_customer(), CpuMeter(platform)
    async with open_connections(platform.url, _CONNECTIONS) as connections:
        for _ in range(repetitions):
            requests = _requests(customer, 100, _BATCHES_A_RUN)
            first = await send_closed(connections, requests)
            with meter.measure():
                again = await send_closed(connections, requests)
            meter.add_events(_BATCHES_A_RUN * BATCH_EVENTS)
            row.add(again.rate * BATCH_EVENTS, first.rate * BATCH_EVENTS)
    row.cpu = meter.microseconds_an_event()
    return [row]


def _requests(customer: Customer, tenants: int, batches: int) -> list[bytes]:
    """Encoded before the clock starts."""
    return [batch_request(customer, events) for events in new_batches(batches, tenants)]


async def _insert(bare: asyncpg.Connection[asyncpg.Record], customer: Customer, tenants: int, batches: int) -> float:
    """Events a second into the bare table; the columns are made before the clock starts."""
    columns = [batch_columns(customer, events) for events in new_batches(batches, tenants)]
    statement = await bare.prepare(_BARE_INSERT)
    started = time.perf_counter()
    for each in columns:
        await statement.fetch(customer.org_id, *each)
    return batches * BATCH_EVENTS / (time.perf_counter() - started)


@asynccontextmanager
async def _bare_table(platform: Platform) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A connection, and an empty table with the columns, checks and indexes of the real one."""
    async with platform.connect() as connection:
        assert await connection.fetchval(
            "SELECT current_setting('fsync') || current_setting('synchronous_commit')"
        ) == ("onon"), "a ceiling that is not durable is no ceiling"
        await connection.execute(
            "CREATE SCHEMA bench; CREATE TABLE bench.usage_event (LIKE ingest.usage_event INCLUDING ALL)"
        )
        yield connection
        await connection.execute("DROP SCHEMA bench CASCADE")
