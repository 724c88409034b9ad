"""Reading usage: of one tenant, and of a whole organization, over a month of ten million events."""

from __future__ import annotations

import time

from tests.bench.harness import Row, at_most
from tests.bench.load import expect_ok, http_request, open_connections, percentile
from tests.bench.platform import Customer, Platform

_TENANTS = 1_000
_TYPES = 5
_HOURS = 30 * 24
# What ten million events in as many hours, tenants and types come to; the sums do not depend on it.
_EVENTS_AN_HOUR = 3
_EVENTS = _TENANTS * _TYPES * _HOURS * _EVENTS_AN_HOUR
_MONTH = "start_date=2026-01-01T00:00:00Z&end_date=2026-01-31T00:00:00Z"
_BROKEN = "start_date=2026-01-01T12:00:00Z&end_date=2026-01-30T12:00:00Z"
# More than five for each connection of the pool: from then on PostgreSQL might plan them otherwise.
_READS_A_RUN = {"tenant": 50, "organization": 20}


async def measure_usage(platform: Platform, repetitions: int) -> list[Row]:
    """Median latency of GET /usage."""
    customer = await platform.new_customer()
    await _load(platform, customer)
    note = f"every hour of 30 days in use: {_EVENTS:,} events, {_TENANTS * _TYPES * _HOURS:,} rollups by hour"
    tenant = Row("GET /usage of one tenant, a month", "ms", must=at_most(20), aim=at_most(5), note=note)
    organization = f"GET /usage of {_TENANTS:,} tenants × {_TYPES} types, a month"
    by_type = Row(f"{organization}, by type", "ms", must=at_most(500), aim=at_most(50))
    by_tenant = Row(f"{organization}, by tenant", "ms", must=at_most(500), aim=at_most(50))
    broken = Row(f"{organization} less half a day at each end", "ms", note="hours instead of days there; by type")
    for _ in range(repetitions):
        tenant.add(await _read(platform, customer, f"{_MONTH}&tenant_id=tenant_000500", _READS_A_RUN["tenant"]))
        by_type.add(await _read(platform, customer, f"{_MONTH}&group_by=event_type", _READS_A_RUN["organization"]))
        by_tenant.add(await _read(platform, customer, f"{_MONTH}&group_by=tenant", _READS_A_RUN["organization"]))
        broken.add(await _read(platform, customer, f"{_BROKEN}&group_by=event_type", _READS_A_RUN["organization"]))
    return [tenant, by_type, by_tenant, broken]


async def _load(platform: Platform, customer: Customer) -> None:
    """Write the rollups as if the events had come, and let PostgreSQL tidy up as it would have by itself."""
    async with platform.connect() as connection:
        # Hour by hour: so rows lie where they would.
        await connection.execute(
            """
            INSERT INTO ingest.usage_hour (org_id, tenant_id, event_type, hour, slot, event_count, quantity)
            SELECT $1, 'tenant_' || lpad(tenant::text, 6, '0'), 'type_' || type,
                   timestamptz '2026-01-01 00:00Z' + make_interval(hours => hour), 0, $5::integer, $5::integer
            FROM generate_series(0, $4::integer - 1) AS hour, generate_series(0, $2::integer - 1) AS tenant,
                 generate_series(0, $3::integer - 1) AS type
            ORDER BY hour
            """,
            customer.org_id,
            _TENANTS,
            _TYPES,
            _HOURS,
            _EVENTS_AN_HOUR,
        )
        await connection.execute(
            """
            INSERT INTO ingest.usage_day (
                org_id, tenant_id, event_type, day, epoch, slot, event_count, correction_count, quantity)
            SELECT org_id, tenant_id, event_type, (hour AT TIME ZONE 'UTC')::date AS day, 1, slot,
                   sum(event_count), 0, sum(quantity)
            FROM ingest.usage_hour WHERE org_id = $1
            GROUP BY org_id, tenant_id, event_type, day, slot
            ORDER BY day
            """,
            customer.org_id,
        )
        await connection.execute("VACUUM (ANALYZE) ingest.usage_hour, ingest.usage_day")


async def _read(platform: Platform, customer: Customer, query: str, reads: int) -> float:
    """The median of some reads, one after another, in milliseconds."""
    request = http_request("GET", f"/api/v1/usage?{query}", customer.api_key)
    seconds = []
    async with open_connections(platform.url, 1) as (connection,):
        expect_ok(await connection.exchange(request))
        for _ in range(reads):
            started = time.perf_counter()
            expect_ok(await connection.exchange(request))
            seconds.append(time.perf_counter() - started)
    return percentile(sorted(seconds), 50) * 1000
