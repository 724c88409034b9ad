"""Single events over REST: how many a second, and how long one takes at half of that."""

from __future__ import annotations

from tests.bench.echo import ECHO_REQUEST, open_echo
from tests.bench.harness import Row, at_least, at_most
from tests.bench.load import Sent, for_seconds, open_connections, percentile, send_closed, send_paced
from tests.bench.platform import CpuMeter, Customer, Platform
from tests.bench.usage_data import single_requests

_CONNECTIONS = (64, 256)
_SECONDS_A_RUN = 4.0
_WARM_UP_SECONDS = 1.0
_PACED_SECONDS = 8.0
_PACED_CONNECTIONS = 256


async def measure_single_events(platform: Platform, repetitions: int) -> list[Row]:
    """Throughput from few and many connections, then latency at half the load of the few."""
    customer = await platform.new_customer()
    async with open_echo(platform.directory) as echo_url:
        rows = [await _throughput(platform, customer, echo_url, count, repetitions) for count in _CONNECTIONS]
    return [*rows, *await _latency(platform, customer, rows[0].value / 2, repetitions)]


async def _throughput(platform: Platform, customer: Customer, echo_url: str, connections: int, repetitions: int) -> Row:
    judged = connections == _CONNECTIONS[0]
    row = Row(
        f"single events, {connections} connections ÷ echo that does nothing",
        "events/s",
        must=at_least(1) if judged else None,
        aim=at_least(2) if judged else None,
        note="the echo: REST → gRPC, one call a request",
    )
    meter = CpuMeter(platform)
    await _send(platform.url, customer, connections, _WARM_UP_SECONDS)
    await _echo(echo_url, connections, _WARM_UP_SECONDS)
    for _ in range(repetitions):
        with meter.measure():
            sent = await _send(platform.url, customer, connections, _SECONDS_A_RUN)
        meter.add_events(sent.requests)
        row.add(sent.rate, (await _echo(echo_url, connections, _SECONDS_A_RUN)).rate)
    row.cpu = meter.microseconds_an_event()
    return row


async def _latency(platform: Platform, customer: Customer, rate: float, repetitions: int) -> list[Row]:
    load = f"of a single event at {rate:,.0f}/s"
    p50 = Row(f"p50 {load}", "ms", note="half the load of 64 connections, sent at a steady pace")
    p99 = Row(f"p99 {load}", "ms", must=at_most(50), aim=at_most(20))
    async with open_connections(platform.url, _PACED_CONNECTIONS) as connections:
        for _ in range(repetitions):
            requests = single_requests(customer)
            latencies = await send_paced(connections, requests, rate=rate, seconds=_PACED_SECONDS)
            p50.add(percentile(latencies, 50) * 1000)
            p99.add(percentile(latencies, 99) * 1000)
    return [p50, p99]


async def _send(url: str, customer: Customer, count: int, seconds: float) -> Sent:
    async with open_connections(url, count) as connections:
        return await send_closed(connections, for_seconds(seconds, single_requests(customer)))


async def _echo(url: str, count: int, seconds: float) -> Sent:
    async with open_connections(url, count) as connections:
        return await send_closed(connections, for_seconds(seconds, iter(lambda: ECHO_REQUEST, b"")))
