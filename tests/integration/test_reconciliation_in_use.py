"""Reconciling while everything is in use: nothing is reported that is right, what is wrong is mended exactly (I4)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from functools import partial
from typing import Any

import grpc.aio

from tests.conftest import Database
from tests.support.reconciliation import WRONG, WRONG_DAYS, reconcile
from tests.support.services import Services, open_replica, open_services
from tests.support.sql import fetch_rows, fetch_value
from tests.support.wait import until
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter.quota.v1 import quota_pb2
from usameter_core.clock import SystemClock


async def test_nothing_is_reported_while_everything_is_in_use(database: Database) -> None:
    """I4 holds at every moment, and so it must look: recorded, refused, sent twice, voided, amended meanwhile."""
    async with (
        open_services(database, clock=SystemClock()) as services,
        open_replica(database, services, clock=SystemClock()) as replica,
        load(services, [services.ingest, replica]) as counts,
    ):
        looks = 0
        while looks < 40 or counts.recorded <= 100 or counts.refused <= 10 or counts.corrected <= 5:
            _, found, stuck = await reconcile(services)
            assert (found, stuck) == ([], [])
            looks += 1
    await assert_exact_once_settled(database)


async def test_what_is_wrong_is_mended_exactly_while_it_is_in_use(database: Database) -> None:
    """The amounts are those that were tampered with, not a unit more or less, whatever is recorded meanwhile."""
    async with (
        open_services(database, clock=SystemClock()) as services,
        open_replica(database, services, clock=SystemClock()) as replica,
        load(services, [services.ingest, replica]) as counts,
    ):
        for number in range(10):
            tenant_id = f"tenant{number % 3}"
            moved = [
                await fetch_value(
                    database,
                    f"""
                    UPDATE quota.{table} SET quantity = quantity + 1000
                    WHERE org_id = $1 AND tenant_id = $2 AND event_type = 'req'
                    AND {column} = (SELECT max({column}) FROM quota.{table} WHERE org_id = $1 AND tenant_id = $2)
                    RETURNING 1
                    """,
                    services.org_id,
                    tenant_id,
                )
                for table, column in (("usage_hour", "hour"), ("usage_day", "day"))
            ]
            assert moved == [1, 1]
            _, found, _ = await reconcile(services, fix=True)
            assert [(each[0], each[1], Decimal(each[3]) - Decimal(each[4]), each[5]) for each in found] == [
                (tenant_id, "HOUR", 1000, True),
                (tenant_id, "DAY", 1000, True),
            ]
        await until(partial(counts.have_recorded, 50), "enough was recorded meanwhile")
    await assert_exact_once_settled(database)


class Counts:
    """What clients were told."""

    def __init__(self) -> None:
        self.recorded = self.refused = self.corrected = 0

    async def have_recorded(self, more_than: int) -> bool:
        return self.recorded > more_than

    def __repr__(self) -> str:
        return f"recorded {self.recorded}, refused {self.refused}, corrected {self.corrected}"


@asynccontextmanager
async def load(services: Services, channels: Sequence[grpc.aio.Channel]) -> AsyncIterator[Counts]:
    """Clients that record, resend, are refused, void and amend, on few tenants, until the exit."""
    limit = quota_pb2.SetQuotaRequest(
        tenant_id="limited", event_type="req", limit_value="20", enforcement_mode=quota_pb2.HARD, period=quota_pb2.DAILY
    )
    await services.quotas.SetQuota(limit, metadata=services.metadata, timeout=10)
    counts, stop = Counts(), asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for number in range(6):
            tasks.create_task(_record_until(stop, services, channels[number % len(channels)], number, counts))

        await until(partial(counts.have_recorded, 20), "the first events are recorded")
        try:
            yield counts
        finally:
            stop.set()


async def _record_until(
    stop: asyncio.Event, services: Services, channel: grpc.aio.Channel, number: int, counts: Counts
) -> None:
    events: Any = event_pb2_grpc.EventServiceStub(channel)
    for sent in itertools.count():
        if stop.is_set():
            return
        # Two clients share keys, so that twins meet.
        batch = [
            {
                "tenant_id": f"tenant{each % 3}",
                "event_type": "req",
                "quantity": 1 + each,
                "idempotency_key": f"{number // 2}.{sent}.{each}",
            }
            for each in range(1 + sent % 5)
        ]
        request = event_pb2.RecordEventsRequest(events=batch)
        answer = await events.RecordEvents(request, metadata=services.metadata, timeout=30)
        counts.recorded += answer.new_events
        limited = event_pb2.RecordEventsRequest(event_type="req", tenant_id="limited", quantity=7)
        try:
            await events.RecordEvents(limited, metadata=services.metadata, timeout=30)
        except grpc.aio.AioRpcError:
            counts.refused += 1
        if sent % 3 == 0:
            await _correct(events, services, answer.results[-1].event_id, sent, counts)


async def _correct(events: Any, services: Services, event_id: str, sent: int, counts: Counts) -> None:
    try:
        if sent % 2:
            void = event_pb2.VoidEventRequest(event_id=event_id, reason="r")
            await events.VoidEvent(void, metadata=services.metadata, timeout=30)
        else:
            amend = event_pb2.AmendEventRequest(event_id=event_id, quantity_decimal=f"{sent % 4}.5", reason="r")
            await events.AmendEvent(amend, metadata=services.metadata, timeout=30)
        counts.corrected += 1
    except grpc.aio.AioRpcError as error:
        # The twin was faster.
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS, error


async def assert_exact_once_settled(database: Database) -> None:
    """Ingest drained its settlements as it ended; what corrections give back may wait for its next start."""
    async with open_services(database, clock=SystemClock()):

        async def settled() -> bool:
            return not await fetch_value(
                database,
                """
                SELECT (SELECT count(*) FROM quota.reservation WHERE state = 'OPEN')
                     + (SELECT count(*) FROM ingest.quota_outbox)
                """,
            )

        await until(settled, "everything is settled", seconds=60)
    assert await fetch_rows(database, WRONG) == []
    assert await fetch_rows(database, WRONG_DAYS) == []
