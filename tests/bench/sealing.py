"""Sealing an epoch: its totals beside a bare GROUP BY, its Merkle roots, and the memory that takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime

import asyncpg
import psutil

from tests.bench.harness import Row, above, at_least
from tests.bench.platform import Customer, Platform

_TENANTS = 1_000
_TYPES = 5
_EVENTS = 300_000
_EPOCH = 1

# The statement of SealStore.day_totals (ingest's store), read in one go as its rival is.
_TOTALS = """
    SELECT row_number() OVER (ORDER BY tenant_id, event_type, day) AS number, tenant_id, event_type, day,
           sum(event_count + correction_count)::bigint AS entry_count, sum(quantity) AS quantity
    FROM ingest.usage_day WHERE org_id = $1 AND epoch = $2
    GROUP BY tenant_id, event_type, day ORDER BY number
    """
_BARE_GROUP_BY = """
    SELECT tenant_id, event_type, (occurred_at AT TIME ZONE 'UTC')::date AS day, count(*), sum(quantity)
    FROM ingest.usage_event WHERE org_id = $1 AND epoch = $2
    GROUP BY 1, 2, 3
    """


async def measure_sealing(platform: Platform, repetitions: int) -> list[Row]:
    """Totals, roots and memory; every run has an organization and an epoch of its own."""
    note = f"{_EVENTS:,} events of one day, {_TENANTS:,} tenants × {_TYPES} types"
    totals = Row("snapshot totals of a day ÷ bare GROUP BY", "ms", above(1), at_least(5), inverse=True, note=note)
    roots = Row(
        "sealing, Merkle roots included", "events/s", at_least(100_000), at_least(400_000), note="from closed to sealed"
    )
    memory = Row("memory that sealing takes", "MiB", note="the most that ingest had above what it had before")
    # The benchmarks before have left epochs open: what is timed is ours alone.
    await platform.seal_everything()
    for _ in range(repetitions):
        customer = await platform.new_customer()
        async with platform.connect() as connection:
            await _load(connection, customer)
            totals.add(
                await _milliseconds(connection, _TOTALS, customer),
                await _milliseconds(connection, _BARE_GROUP_BY, customer),
            )
            async with watched_memory(platform.process("ingest")) as bytes_taken:
                await platform.seal_everything()
            seconds = await _seconds_to_seal(connection, customer)
        roots.add(_EVENTS / seconds)
        memory.add(max(bytes_taken) / 2**20)
    return [totals, roots, memory]


async def _load(connection: asyncpg.Connection[asyncpg.Record], customer: Customer) -> None:
    """Write an open epoch as if its events had come."""
    await connection.execute("INSERT INTO ingest.epoch (org_id, epoch) VALUES ($1, $2)", customer.org_id, _EPOCH)
    await connection.execute(
        """
        INSERT INTO ingest.usage_event (
            org_id, event_id, tenant_id, event_type, quantity, occurred_at, timestamp_given, ingested_at,
            epoch, metadata, idempotency_key, request_hash, leaf_hash)
        SELECT $1, gen_random_uuid(), 'tenant_' || lpad((n % $3)::text, 6, '0'), 'type_' || n / $3 % $4, 1,
               $5::timestamptz + make_interval(secs => n * 86400.0 / $6), TRUE, $5, $2, '{}', 'key_' || n,
               sha256(int8send(n)), sha256(int8send(n))
        FROM generate_series(0::bigint, $6::bigint - 1) AS n
        """,
        customer.org_id,
        _EPOCH,
        _TENANTS,
        _TYPES,
        datetime(2026, 1, 15, tzinfo=UTC),
        _EVENTS,
    )
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
    await connection.execute("VACUUM (ANALYZE) ingest.usage_event, ingest.usage_day")


async def _seconds_to_seal(connection: asyncpg.Connection[asyncpg.Record], customer: Customer) -> float:
    query = "SELECT extract(epoch FROM sealed_at - closed_at) FROM ingest.epoch WHERE org_id = $1 AND epoch = $2"
    return float(await connection.fetchval(query, customer.org_id, _EPOCH))


async def _milliseconds(connection: asyncpg.Connection[asyncpg.Record], query: str, customer: Customer) -> float:
    started = time.perf_counter()
    rows = await connection.fetch(query, customer.org_id, _EPOCH)
    assert len(rows) == _TENANTS * _TYPES
    return (time.perf_counter() - started) * 1000


@asynccontextmanager
async def watched_memory(process: psutil.Process) -> AsyncIterator[list[int]]:
    """Bytes that a process holds above what it held at first, every 10 ms."""
    before = process.memory_info().rss
    taken = [0]

    async def watch() -> None:
        while True:
            taken.append(process.memory_info().rss - before)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    try:
        yield taken
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
