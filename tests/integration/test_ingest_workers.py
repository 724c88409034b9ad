"""Several ingest processes on one port: all get work, none doubles any, and they live and end together."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import asyncpg
import grpc.aio
import httpx
import psutil
import pytest

from tests.conftest import Database, new_database
from tests.support.clock import ManualClock
from tests.support.services import Services, open_services
from tests.support.sql import fetch_rows, fetch_value
from tests.support.wait import until
from tests.support.workers import IngestProcesses, open_ingest_processes
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel
from usameter_devstack.postgres import EmbeddedPostgres
from usameter_devstack.valkey import EmbeddedValkey
from usameter_gateway.config import GatewaySettings
from usameter_gateway.server import open_gateway

RECORD_EVENTS = "/usameter.ingest.v1.EventService/RecordEvents"
RECORD_MANY = "/usameter.ingest.v1.EventService/RecordMany"


@pytest.fixture(scope="module")
async def shared(template: EmbeddedPostgres, valkey: EmbeddedValkey) -> AsyncIterator[Database]:
    """The database of all tests here; each has a tenant of its own. Interpreters are slow to start."""
    async with new_database(template, valkey) as database:
        yield database


@pytest.fixture(scope="module")
async def services(shared: Database) -> AsyncIterator[Services]:
    async with open_services(shared, clock=ManualClock()) as running:
        yield running


@pytest.fixture(scope="module")
async def ingest(shared: Database, services: Services) -> AsyncIterator[IngestProcesses]:
    """Two workers that both answer, for tests that let them live."""
    async with open_ingest_processes(shared, services, workers=2) as running:
        await running.wait_serving()
        yield running


def event(tenant: str, key: str) -> dict[str, Any]:
    return {"event_type": "req", "tenant_id": tenant, "idempotency_key": f"{tenant}.{key}"}


async def record(channel: grpc.aio.Channel, services: Services, tenant: str, key: str) -> Any:
    stub: Any = event_pb2_grpc.EventServiceStub(channel)
    request = event_pb2.RecordEventsRequest(events=[event(tenant, key)])
    return await stub.RecordEvents(request, metadata=services.metadata, timeout=20)


async def open_channels(opened: AsyncExitStack, address: Address, count: int) -> Sequence[grpc.aio.Channel]:
    return [await opened.enter_async_context(open_channel(address)) for _ in range(count)]


async def calls_of(ingest: IngestProcesses, method: str) -> list[int]:
    """How many calls of a method each worker has answered, by its metrics."""
    counts = []
    async with httpx.AsyncClient() as client:
        for number in range(2):
            metrics = (await client.get(f"http://127.0.0.1:{ingest.metrics_port + number}/metrics")).text
            pattern = rf'^usameter_grpc_call_seconds_count{{code="OK",method="{method}"}} (\S+)$'
            counts.append(sum(int(float(count)) for count in re.findall(pattern, metrics, re.MULTILINE)))
    return counts


async def test_64_clients_of_two_workers_send_one_key_and_it_is_recorded_once(
    ingest: IngestProcesses, services: Services, shared: Database
) -> None:
    """I1, I2: which worker gets a call makes no difference, and each adds to a slot of its own in the rollups."""
    async with AsyncExitStack() as opened:
        channels = await open_channels(opened, ingest.address, 64)
        for key in ("first", "second", "third"):
            answers = await asyncio.gather(*(record(each, services, "same", key) for each in channels))
            results = [answer.results[0] for answer in answers]
            assert [result.deduplicated for result in results].count(False) == 1
            assert len({result.event_id for result in results}) == 1
        # Chance gives one of them none of 64 connections once in 2^63 runs.
        calls = await calls_of(ingest, RECORD_EVENTS)
        assert sum(calls) == 3 * 64 and all(calls)
        assert {line["worker"] for line in ingest.logged("call_served")} == {0, 1}

        await asyncio.gather(*(record(each, services, "other", str(i)) for i, each in enumerate(channels)))
    stored = "SELECT count(*) FROM ingest.usage_event WHERE tenant_id = $1"
    assert await fetch_value(shared, stored, "same") == 3
    slots = "SELECT sum(event_count) AS count FROM ingest.usage_day WHERE tenant_id = 'other' GROUP BY slot"
    counts = [row["count"] for row in await fetch_rows(shared, slots)]
    assert len(counts) == 2 and sum(counts) == 64


async def test_the_gateway_spreads_its_calls_over_all_its_connections(
    ingest: IngestProcesses, services: Services
) -> None:
    settings = GatewaySettings(
        ingest_addr=ingest.address,
        identity_addr=services.identity,
        quota_addr=services.quota_address,
        billing_addr=Address("127.0.0.1", 1),
        ingest_workers=2,
    )
    headers = {"authorization": f"Bearer {services.api_key}"}
    async with (
        open_gateway(settings) as address,
        httpx.AsyncClient(base_url=f"http://{address}", headers=headers, timeout=20) as client,
    ):
        before = connections_of(ingest)
        for number in range(16):
            answer = await client.post("/api/v1/events", json=event("edge", str(number)))
            assert answer.status_code == 200, answer.text
        connections = [now - then for now, then in zip(connections_of(ingest), before, strict=True)]
    assert sum(connections) == 8
    # The one that was idle longest is next, so each has had two.
    assert await calls_of(ingest, RECORD_MANY) == [2 * count for count in connections]


def connections_of(ingest: IngestProcesses) -> list[int]:
    return [
        sum(
            each.status == psutil.CONN_ESTABLISHED and each.laddr.port == ingest.address.port
            for each in worker.net_connections("tcp")
        )
        for worker in ingest.workers()
    ]


@pytest.mark.parametrize(("workers", "why"), [(1, "; is the port taken?"), (2, ": Address already in use")])
async def test_a_port_that_workers_share_is_taken_for_everybody_else(
    ingest: IngestProcesses, services: Services, shared: Database, workers: int, why: str
) -> None:
    async with open_ingest_processes(shared, services, workers=workers, port=ingest.address.port) as second:
        assert await asyncio.wait_for(second.process.wait(), 60) == 1
    sentence = f"usameter ingest: USAMETER_LISTEN: {ingest.address} cannot be listened on{why}\n"
    assert second.text.endswith(sentence)
    assert not second.logged("worker_started") and not second.logged("server_started")


async def test_told_to_stop_it_finishes_what_every_worker_has_under_way(services: Services, shared: Database) -> None:
    holder = await asyncpg.connect(shared.admin_url)
    # By the port of the worker's side of the connection.
    waiting = "SELECT client_port FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
    async with open_ingest_processes(shared, services, workers=2) as ingest, AsyncExitStack() as opened:
        await ingest.wait_serving()
        calls = []
        try:
            await holder.execute("SELECT pg_advisory_lock(ingest.ledger_lock_key($1))", services.org_id)

            async def both_are_held_up() -> bool:
                (channel,) = await open_channels(opened, ingest.address, 1)
                calls.append(asyncio.create_task(record(channel, services, "held", str(len(calls)))))
                ports = {row["client_port"] for row in await holder.fetch(waiting)}
                return all(ports & ports_of(worker) for worker in ingest.workers())

            await until(both_are_held_up, "both workers have a call under way")
            ingest.process.terminate()
            await until(partial(refuses, ingest.address), "no worker takes connections")
            assert not any(call.done() for call in calls)
        finally:
            await holder.close()
        for answer in await asyncio.gather(*calls):
            assert answer.new_events == 1
        assert await asyncio.wait_for(ingest.process.wait(), 20) == 0
    assert len(ingest.logged("server_stopped")) == 2 and not ingest.logged("worker_died")


def ports_of(process: psutil.Process) -> set[int]:
    return {each.laddr.port for each in process.net_connections("tcp")}


async def refuses(address: Address) -> bool:
    try:
        _, writer = await asyncio.open_connection(*address)
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was in the queue of one that stopped listening just then
    writer.close()
    return False


async def test_workers_end_when_their_parent_is_killed(services: Services, shared: Database) -> None:
    async with open_ingest_processes(shared, services, workers=2) as ingest:
        await ingest.wait_serving()
        workers = ingest.workers()
        ingest.process.kill()

        async def gone() -> bool:
            return not any(worker.is_running() for worker in workers)

        await until(gone, "no worker runs")
    # By draining, not by force.
    assert len(workers) == len(ingest.logged("server_stopped")) == 2


async def test_a_parent_whose_workers_keep_dying_gives_up_and_says_why() -> None:
    script = """
import asyncio
from usameter_core.config import Address
from usameter_core.restarts import RestartPolicy
from usameter_core.workers import WorkerDiedTooOften, run_workers
policy = RestartPolicy(first_pause_seconds=0.01, deaths_max=2)
try:
    asyncio.run(run_workers("no_such_package", count=2, listen=Address("127.0.0.1", 0), drain_seconds=1, policy=policy))
except WorkerDiedTooOften as error:
    print(error)
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert re.search(rb"worker [01] exited with code 1; it has died 3 times within 60 s\n$", output), output
