"""More than ingest can hold: the rest is refused at once, and whoever tries again is recorded."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import grpc.aio

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import details_of, open_services
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2

# One organization may hold 50,000 events.
BATCHES, EVENTS_A_BATCH = 54, 1_000


async def test_what_is_too_much_is_refused_and_recorded_later(database: Database) -> None:
    """I1: a refusal is no loss and no double, and says that nothing of the request was sent on."""
    refused: list[str] = []
    async with open_services(database, clock=ManualClock()) as services:

        async def record(request: Any) -> None:
            while True:
                try:
                    await services.events.RecordEvents(request, metadata=services.metadata, timeout=60)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    assert details_of(error, error_pb2.AvailabilityDetails()).retry_safe
                    refused.append(error.details() or "")
                    await asyncio.sleep(2)
                else:
                    return

        async def some_are_refused() -> bool:
            return any(why.startswith("Too many events") for why in refused)

        batches = [
            event_pb2.RecordEventsRequest(
                events=[
                    {"event_type": "req", "tenant_id": "acme", "idempotency_key": f"{batch}.{number}"}
                    for number in range(EVENTS_A_BATCH)
                ]
            )
            for batch in range(BATCHES)
        ]
        await record(batches[0])
        admin = await asyncpg.connect(database.admin_url)
        try:
            # While the ledger is locked no group can end.
            await admin.execute("SELECT pg_advisory_lock(ingest.ledger_lock_key($1))", services.org_id)
            async with asyncio.TaskGroup() as clients:
                for batch in batches:
                    clients.create_task(record(batch))
                await until(some_are_refused, "ingest holds as much as it may", seconds=30)
                await admin.execute("SELECT pg_advisory_unlock_all()")
        finally:
            await admin.close()
    assert await fetch_value(database, "SELECT count(*) FROM ingest.usage_event") == BATCHES * EVENTS_A_BATCH
