"""kill -9 of one of the workers that share ingest's port, under load."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import psutil

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, open_services
from tests.support.sql import fetch_rows
from tests.support.wait import until
from tests.support.workers import open_ingest_processes
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter_core.config import Address
from usameter_core.grpc.channels import open_channel


class Client:
    """Sends batches on a connection of its own, each again on the same keys until it is answered."""

    def __init__(self, number: int) -> None:
        self.acknowledged: dict[str, str] = {}
        self.refused = 0
        self._number = number

    async def run(self, address: Address, services: Services, stop: asyncio.Event) -> None:
        async with open_channel(address) as channel:
            stub: Any = event_pb2_grpc.EventServiceStub(channel)
            sent = 0
            while not stop.is_set():
                keys = [f"{self._number}.{sent}.{i}" for i in range(20)]
                for key, result in zip(keys, await self._send(stub, services, keys), strict=True):
                    self.acknowledged[key] = result.event_id
                sent += 1

    async def _send(self, stub: Any, services: Services, keys: list[str]) -> Any:
        events = [{"event_type": "req", "tenant_id": "acme", "idempotency_key": key} for key in keys]
        while True:
            try:
                request = event_pb2.RecordEventsRequest(events=events)
                return (await stub.RecordEvents(request, metadata=services.metadata, timeout=10)).results
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                self.refused += 1
                await asyncio.sleep(0.05)


async def test_one_worker_killed_under_load_loses_and_doubles_nothing_and_is_started_again(database: Database) -> None:
    """I1, I2: every acknowledged event is stored once, none that nobody sent, and rollups equal entries."""
    clients = [Client(number) for number in range(12)]
    stop = asyncio.Event()
    async with (
        open_services(database, clock=ManualClock()) as services,
        open_ingest_processes(database, services, workers=2) as ingest,
    ):
        await ingest.wait_serving()
        victim = ingest.logged("worker_started")[0]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.run(ingest.address, services, stop))

            async def all_have_answers() -> bool:
                return all(client.acknowledged for client in clients)

            await until(all_have_answers, "every client has an answer")
            psutil.Process(victim["pid"]).kill()
            (death,) = await ingest.wait_logged("worker_died", 1)
            again = (await ingest.wait_logged("worker_started", 3))[-1]
            await ingest.wait_logged("server_started", 3)
            stop.set()

        assert death["reason"] == "was killed by SIGKILL"
        assert death["pid"] == victim["pid"] != again["pid"]
        assert death["worker"] == victim["worker"] == again["worker"]
        # Half of the connections were the victim's; chance gives it none once in 4,096 runs.
        assert any(client.refused for client in clients)

        acknowledged = {key: event_id for client in clients for key, event_id in client.acknowledged.items()}
        rows = await fetch_rows(database, "SELECT idempotency_key, event_id FROM ingest.usage_event")
        assert {row["idempotency_key"]: f"evt_{row['event_id'].hex}" for row in rows} == acknowledged
        assert len(rows) == len(acknowledged)
        (sums,) = await fetch_rows(
            database, "SELECT sum(event_count) AS events, sum(quantity) AS quantity FROM ingest.usage_day"
        )
        assert sums["events"] == sums["quantity"] == len(rows)
