"""The Python client against the real services, over a connection that is cut again and again."""

from __future__ import annotations

import asyncio
from decimal import Decimal

import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import Services, open_services
from usameter.ingest.v1 import usage_pb2
from usameter.quota.v1 import quota_pb2
from usameter_client import AsyncRecorder, EventRefused, GrpcTransport, Options, UsageEvent
from usameter_core.config import Address
from usameter_devstack.fault_proxy import FaultProxy

CUTS = 10
EVENTS = 6_000


def ingest_address(services: Services) -> Address:
    host, _, port = services.ingest._channel.target.decode().rpartition(":")  # type: ignore[attr-defined]
    return Address(host, int(port))


async def usage_of(services: Services, tenant_id: str) -> tuple[Decimal, int]:
    request = usage_pb2.GetUsageRequest(tenant_id=tenant_id)
    (group,) = (await services.usage.GetUsage(request, metadata=services.metadata)).usage
    return Decimal(group.total_quantity), group.event_count


async def test_events_are_recorded_exactly_once_although_the_connection_is_cut_repeatedly(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """I1: every acknowledged event is stored exactly once; here, every recorded one is acknowledged in the end."""
    rejected: list[tuple[UsageEvent, EventRefused]] = []
    async with open_services(database, clock=ManualClock()) as services:
        address = ingest_address(services)
        async with FaultProxy(address.host, address.port) as proxy:
            transport = GrpcTransport(f"127.0.0.1:{proxy.port}", api_key=services.api_key)
            options = Options(linger_seconds=0.01, batch_events_max=200, events_max=1_000)

            async def cut_repeatedly() -> None:
                for _ in range(CUTS):
                    await asyncio.sleep(0.05)
                    await proxy.cut()
                    await proxy.forward()

            async with (
                AsyncRecorder(transport, on_rejected=lambda *each: rejected.append(each), options=options) as recorder,
                asyncio.TaskGroup() as tasks,
            ):
                cutting = tasks.create_task(cut_repeatedly())
                for number in range(EVENTS):
                    await recorder.record("api_request", tenant_id="t", quantity=number + 1)
                await cutting
                await recorder.flush()
        assert await usage_of(services, "t") == (Decimal(EVENTS * (EVENTS + 1) // 2), EVENTS)
    assert not rejected
    assert "not delivered now" in caplog.text, "no cut met a batch on its way"


async def test_what_a_quota_refuses_is_reported_and_the_rest_of_the_batch_is_recorded(database: Database) -> None:
    rejected: list[tuple[UsageEvent, EventRefused]] = []
    async with open_services(database, clock=ManualClock()) as services:
        limit = quota_pb2.SetQuotaRequest(
            tenant_id="small",
            event_type="api_request",
            limit_value="3",
            enforcement_mode=quota_pb2.HARD,
            period=quota_pb2.DAILY,
        )
        await services.quotas.SetQuota(limit, metadata=services.metadata)
        transport = GrpcTransport(str(ingest_address(services)), api_key=services.api_key)
        async with AsyncRecorder(transport, on_rejected=lambda *each: rejected.append(each)) as recorder:
            for _ in range(5):
                await recorder.record("api_request", tenant_id="small")
                await recorder.record("api_request", tenant_id="other")
            await recorder.record("not a type", tenant_id="other")
        assert await usage_of(services, "small") == (Decimal(3), 3)
        assert await usage_of(services, "other") == (Decimal(5), 5)
    codes = sorted(error.code for _, error in rejected)
    assert codes == ["INVALID_ARGUMENT", "QUOTA_EXCEEDED", "QUOTA_EXCEEDED"]
    assert next(error.details["limit"] for _, error in rejected if error.code == "QUOTA_EXCEEDED") == 3
