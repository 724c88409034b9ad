"""Quota: reserving as ingest does it, and what part of recording that is."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal

import psutil

from tests.bench.harness import Row
from tests.bench.load import expect_ok, for_seconds, http_request, open_connections, percentile, send_closed
from tests.bench.platform import CpuMeter, Customer, Platform
from tests.bench.usage_data import EVENT_TYPE, batch_request, new_batches, single_requests
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_core.ids import ReservationId, new_uuid
from usameter_ingest.clients import QuotaClient, Usage
from usameter_ingest.service.settling import Settler
from usameter_ingest.store.outcomes import Outcome

_HOT_TENANTS = (1, 1_000)
# What 64 connections with single events come to.
_REQUESTS_A_CALL = 64
# As many as ingest has for one organization.
_CALLS_AT_ONCE = 2
_SECONDS_A_RUN = 4.0
_WARM_UP_SECONDS = 1.0
_BATCHES_A_RUN = 40
# Above what any run comes to, so that limits are looked at and nothing is refused or warned of.
_LIMIT = {"limit_value": "1000000000000", "enforcement_mode": "HARD", "period": "MONTHLY"}


async def measure_quota(platform: Platform, repetitions: int) -> list[Row]:
    """How fast quota is reserved, and its share of the CPU that recording takes."""
    customer = await _limited_customer(platform)
    rows = []
    async with _open_quota(platform) as (quota, settler):
        for tenants in _HOT_TENANTS:
            rows += await _reserving(platform, customer, quota, settler, tenants, repetitions)
    return [*rows, *await _shares(platform, customer, repetitions)]


async def _limited_customer(platform: Platform) -> Customer:
    """A customer whose tenants all have a limit."""
    customer = await platform.new_customer()
    path, body = f"/api/v1/quota-defaults/{EVENT_TYPE}", json.dumps(_LIMIT).encode()
    async with open_connections(platform.url, 1) as (connection,):
        expect_ok(await connection.exchange(http_request("PUT", path, customer.api_key, body)))
    return customer


@asynccontextmanager
async def _open_quota(platform: Platform) -> AsyncIterator[tuple[QuotaClient, Settler]]:
    """Ingest's own client of quota and its settling, in this process."""
    host, _, port = platform.environment["USAMETER_QUOTA_ADDR"].rpartition(":")
    token = platform.process("quota").environ()["USAMETER_INTERNAL_TOKEN"]
    async with open_channel(Address(host, int(port))) as channel:
        quota = QuotaClient(channel, internal_token=token)
        settler = Settler(quota)
        settling = asyncio.create_task(settler.run())
        yield quota, settler
        await settler.drain()
        settling.cancel()


async def _reserving(
    platform: Platform, customer: Customer, quota: QuotaClient, settler: Settler, tenants: int, repetitions: int
) -> list[Row]:
    of_tenants = f"{tenants:,} hot tenant{'s' if tenants > 1 else ''}"
    rate = Row(
        f"reserving, {of_tenants}",
        "requests/s",
        note=f"gRPC to quota, {_REQUESTS_A_CALL} requests of one event a call, {_CALLS_AT_ONCE} calls at once; settled",
    )
    p50 = Row(f"p50 of a call to reserve, {of_tenants}", "ms")
    meter = CpuMeter(platform)
    groups = _groups(tenants)
    await _reserve(customer, quota, settler, groups, _WARM_UP_SECONDS)
    for _ in range(repetitions):
        started = time.perf_counter()
        with meter.measure():
            latencies = await _reserve(customer, quota, settler, groups, _SECONDS_A_RUN)
        requests = len(latencies) * _REQUESTS_A_CALL
        meter.add_events(requests)
        rate.add(requests / (time.perf_counter() - started))
        p50.add(percentile(latencies, 50) * 1_000)
    rate.cpu = meter.microseconds_an_event()
    return [rate, p50]


def _groups(tenants: int) -> Iterator[list[list[Usage]]]:
    """Groups without end; one tenant after another, each with the next request."""
    now = datetime.now(UTC)
    turns = itertools.cycle([[Usage(f"tenant_{number:06}", EVENT_TYPE, now, Decimal(1))] for number in range(tenants)])
    while True:
        yield list(itertools.islice(turns, _REQUESTS_A_CALL))


async def _reserve(
    customer: Customer, quota: QuotaClient, settler: Settler, groups: Iterator[list[list[Usage]]], seconds: float
) -> list[float]:
    """Reserve for groups and have them settled; the latency of each call in seconds, ascending."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    async def call() -> None:
        while (began := time.perf_counter()) < deadline:
            reservation_id = ReservationId(new_uuid())
            verdicts = await quota.reserve(customer.org_id, reservation_id, next(groups))
            latencies.append(time.perf_counter() - began)
            assert not any(verdict.violations or verdict.warnings for verdict in verdicts)
            settler.settle(customer.org_id, reservation_id, Outcome.COMMITTED)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_CALLS_AT_ONCE):
            tasks.create_task(call())
    return sorted(latencies)


async def _shares(platform: Platform, customer: Customer, repetitions: int) -> list[Row]:
    """Quota's share of the CPU of recording, in batches and event by event."""

    def batches() -> Sequence[bytes]:
        return [batch_request(customer, events) for events in new_batches(_BATCHES_A_RUN, tenants=100)]

    def singles() -> Iterator[bytes]:
        return for_seconds(_SECONDS_A_RUN, single_requests(customer))

    in_batches = await _share(platform, "batches of 1,000, 100 tenants a batch", 4, batches, repetitions)
    in_batches.note = "CPU of the process and of its backends in PostgreSQL ÷ that of all but the client"
    return [in_batches, await _share(platform, "single events, 64 connections", 64, singles, repetitions)]


async def _share(
    platform: Platform, what: str, count: int, requests: Callable[[], Sequence[bytes] | Iterator[bytes]], runs: int
) -> Row:
    row = Row(f"quota's part of {what}", "% of CPU")
    async with open_connections(platform.url, count) as connections:
        await send_closed(connections, requests())
        for _ in range(runs):
            waiting = requests()
            quota, everything = await _cpu_seconds(platform)
            await send_closed(connections, waiting)
            quota_after, everything_after = await _cpu_seconds(platform)
            row.add(100 * (quota_after - quota) / (everything_after - everything))
    return row


async def _cpu_seconds(platform: Platform) -> tuple[float, float]:
    """CPU that quota has used so far, its connections to PostgreSQL included, and that everything but the client has.

    What PostgreSQL does for all of them, such as writing the log, is part of everything only.
    """
    async with platform.connect() as connection:
        rows = await connection.fetch("SELECT pid FROM pg_stat_activity WHERE usename = 'usameter_quota'")
    used = platform.cpu_seconds()
    backends = [psutil.Process(row["pid"]).cpu_times() for row in rows]
    quota = used["quota"] + sum(times.user + times.system for times in backends)
    return quota, sum(used.values()) - used["client"]
