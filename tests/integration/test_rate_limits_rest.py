"""Rate limits as clients meet them: set over REST, told in headers, refused as published."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import httpx
import pytest
from redis.asyncio import Redis

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.services import ANY_PORT, Services, details_of, new_organization, open_services, reason_of
from tests.support.sql import fetch_value
from tests.support.wait import until
from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2, snapshot_pb2, usage_pb2
from usameter_core.config import Address
from usameter_core.ids import format_id, new_uuid
from usameter_devstack.fault_proxy import FaultProxy
from usameter_devstack.valkey import EmbeddedValkey
from usameter_gateway.config import GatewaySettings
from usameter_gateway.server import open_gateway

# Of its own: the mirror is the whole platform's, and each test is a platform.
DATABASE = 6


@dataclass
class Platform:
    """Services behind a gateway, and a client with the organization's key."""

    services: Services
    client: httpx.AsyncClient
    database: Database

    async def limit(self, **policy: Any) -> dict[str, Any]:
        """Set a policy; in force at once for those services that the organization has not called yet."""
        answer = await self.client.put("/api/v1/rate-limits", json=policy)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def until_limit_is(self, requests: int, **arguments: Any) -> None:
        """Wait until a changed policy is in force in ingest; the last look is counted, if it is not refused."""

        async def is_in_force() -> bool:
            answer = await self.client.get("/api/v1/usage", **arguments)
            return answer.headers.get("ratelimit-limit") == str(requests)

        await until(is_in_force, "the changed policy is in force")

    async def record(self, **more: Any) -> httpx.Response:
        event = {"tenant_id": "acme", "event_type": "call", "idempotency_key": new_uuid().hex, **more}
        return await self.client.post("/api/v1/events", json=event)

    async def new_key(self) -> tuple[str, str]:
        """The id and the secret of another key of the organization."""
        scopes = ["events:write", "usage:read"]
        answer = await self.client.post("/api/v1/api-keys", json={"name": "second", "scopes": scopes})
        assert answer.status_code == 200, answer.text
        return answer.json()["api_key"]["id"], answer.json()["secret"]


@asynccontextmanager
async def open_platform(database: Database, redis_url: str) -> AsyncIterator[Platform]:
    async with (
        open_services(replace(database, redis_url=redis_url), clock=ManualClock()) as services,
        open_gateway(
            GatewaySettings(
                listen=ANY_PORT,
                identity_addr=services.identity,
                ingest_addr=services.ingest_address,
                quota_addr=services.quota_address,
                billing_addr=Address("127.0.0.1", 1),
            )
        ) as address,
        httpx.AsyncClient(
            base_url=f"http://{address}", headers={"Authorization": f"Bearer {services.api_key}"}, timeout=10
        ) as client,
    ):
        # By another organization: every service has a connection to Redis then, and none knows a policy of this one.
        _, other = await new_organization(database, "other")
        for path in ("/api/v1/usage", "/api/v1/api-keys", "/api/v1/quotas"):
            await client.get(path, headers={"Authorization": f"Bearer {other}"})
        yield Platform(services, client, database)


@pytest.fixture
async def platform(database: Database, valkey: EmbeddedValkey) -> AsyncIterator[Platform]:
    async with Redis.from_url(valkey.url(DATABASE)) as redis:
        await redis.flushdb()
    async with open_platform(database, valkey.url(DATABASE)) as running:
        yield running


async def test_policies_are_set_listed_and_deleted(platform: Platform) -> None:
    client = platform.client
    key_id = format_id("key", new_uuid())
    answer = await client.get("/api/v1/rate-limits")
    assert (answer.status_code, answer.json()) == (200, {"rate_limits": []})
    own = await client.put("/api/v1/rate-limits", json={"api_key_id": key_id, "requests_per_hour": 7})
    default = await client.put("/api/v1/rate-limits", json={"requests_per_second": 10, "requests_per_minute": 100})
    assert default.status_code == 200, default.text
    updated_at = default.json()["updated_at"]
    assert default.json() == {
        "api_key_id": None,
        "requests_per_second": 10,
        "requests_per_minute": 100,
        "requests_per_hour": None,
        "updated_at": updated_at,
    }
    listed = await client.get("/api/v1/rate-limits")
    assert listed.json() == {"rate_limits": [default.json(), own.json()]}
    first = await client.get("/api/v1/rate-limits", params={"limit": 1})
    assert first.json()["rate_limits"] == [default.json()]
    second = await client.get("/api/v1/rate-limits", params={"page_token": first.json()["next_page_token"]})
    assert second.json() == {"rate_limits": [own.json()]}

    # PUT replaces the whole policy; a key without limits is exempt.
    exempt = await client.put("/api/v1/rate-limits", json={"api_key_id": key_id})
    assert exempt.json()["requests_per_hour"] is None
    for arguments in ({}, {"api_key_id": key_id}):
        assert (await client.delete("/api/v1/rate-limits", params=arguments)).json() == {}
        missing = await client.delete("/api/v1/rate-limits", params=arguments)
        assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")
    assert (await client.get("/api/v1/rate-limits")).json() == {"rate_limits": []}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "requests_per_second"),
        ({"requests_per_second": 0}, "requests_per_second"),
        ({"requests_per_hour": 1_000_000_001}, "requests_per_hour"),
        ({"requests_per_minute": 1, "api_key_id": "acme"}, "api_key_id"),
        ({"requests_per_minute": 1, "api_key_id": ""}, "api_key_id"),
        ({"requests_per_day": 1}, "requests_per_day"),
    ],
)
async def test_a_policy_that_makes_no_sense_is_refused_by_field(
    platform: Platform, body: dict[str, Any], field: str
) -> None:
    answer = await platform.client.put("/api/v1/rate-limits", json=body)
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_ARGUMENT")
    assert answer.json()["details"]["violations"][0]["field"] == field


async def test_without_a_policy_nothing_is_limited_and_nothing_is_said(platform: Platform) -> None:
    answers = [await platform.record() for _ in range(30)]
    answers.append(await platform.client.get("/api/v1/usage"))
    assert {answer.status_code for answer in answers} == {200}
    assert not [name for answer in answers for name in answer.headers if "ratelimit" in name]


async def test_every_limited_answer_says_where_its_key_stands(platform: Platform) -> None:
    await platform.limit(requests_per_second=50, requests_per_minute=100)
    answer = await platform.record()
    assert answer.status_code == 200, answer.text
    headers = answer.headers
    assert headers["ratelimit-policy"] == '"second";q=50;w=1, "minute";q=100;w=60'
    assert headers["ratelimit"] == '"second";r=49;t=1'
    assert (headers["ratelimit-limit"], headers["ratelimit-remaining"], headers["ratelimit-reset"]) == ("50", "49", "1")
    assert (headers["x-ratelimit-limit"], headers["x-ratelimit-remaining"]) == ("50", "49")
    assert 0 <= int(headers["x-ratelimit-reset"]) - time.time() <= 2
    assert "retry-after" not in headers
    # Reads, errors and calls of other services count too, on one account.
    seen = [
        await platform.client.get("/api/v1/usage"),
        await platform.client.get(f"/api/v1/events/{format_id('evt', new_uuid())}"),
        await platform.record(quantity=0),
        await platform.client.get("/api/v1/quotas/acme/call"),
        await platform.client.get("/api/v1/api-keys"),
    ]
    assert [each.status_code for each in seen] == [200, 404, 400, 404, 200]
    assert all(each.headers["ratelimit-policy"] == headers["ratelimit-policy"] for each in seen)
    # What the edge refuses reaches no service, and is not counted.
    assert "ratelimit" not in (await platform.record(quantitty=1)).headers


async def test_the_refusal_is_the_published_one_and_nothing_is_stored(platform: Platform) -> None:
    policy = await platform.limit(requests_per_minute=3, requests_per_hour=1000)
    assert [(await platform.record()).status_code for _ in range(3)] == [200, 200, 200]
    asked_at = time.time()
    for answer in (await platform.record(), await platform.client.get("/api/v1/usage")):
        assert answer.status_code == 429
        body = answer.json()
        assert list(body) == ["error", "code", "details"]
        assert (body["error"], body["code"]) == ("Rate limit exceeded", "RATE_LIMIT_EXCEEDED")
        details = body["details"]
        assert list(details) == ["limit", "remaining", "resetAt", "retryAfter"]
        assert (details["limit"], details["remaining"]) == (3, 0)
        assert 55 <= details["retryAfter"] <= 60
        reset_at = datetime.strptime(details["resetAt"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        assert asked_at + details["retryAfter"] - 1 <= reset_at <= asked_at + details["retryAfter"] + 2
        headers = answer.headers
        assert headers["retry-after"] == headers["ratelimit-reset"] == str(details["retryAfter"])
        assert headers["ratelimit"] == f'"minute";r=0;t={details["retryAfter"]}'
        assert headers["x-ratelimit-reset"] == str(int(reset_at))
    assert await fetch_value(platform.database, "SELECT count(*) FROM ingest.usage_event") == 3
    # Who set the limit too low can still raise it.
    assert policy["requests_per_minute"] == 3
    assert (await platform.client.get("/api/v1/rate-limits")).status_code == 200
    await platform.limit(requests_per_minute=5)
    await platform.until_limit_is(5)
    statuses = [(await platform.record()).status_code for _ in range(3)]
    assert statuses == [200, 429, 429], "what was refused has used up nothing"


async def test_a_hundred_at_once_are_admitted_up_to_the_limit_and_stored_exactly(platform: Platform) -> None:
    await platform.limit(requests_per_hour=40)
    answers = await asyncio.gather(*(platform.record() for _ in range(100)))
    statuses = [answer.status_code for answer in answers]
    assert (statuses.count(200), statuses.count(429)) == (40, 60)
    assert await fetch_value(platform.database, "SELECT count(*) FROM ingest.usage_event") == 40


async def test_a_batch_is_one_request_and_so_is_one_that_the_edge_transcodes(platform: Platform) -> None:
    await platform.limit(requests_per_hour=10)
    event = {"tenant_id": "acme", "event_type": "call"}
    answer = await platform.client.post("/api/v1/events", json={"events": [event] * 500})
    assert (answer.status_code, answer.headers["ratelimit-remaining"]) == (200, "9")
    # Written in a way that ingest leaves to the edge, which sends it a second time.
    for remaining in ("8", "7"):
        answer = await platform.record(timestamp="2026-01-15T10:30:00+02:00")
        assert (answer.status_code, answer.headers["ratelimit-remaining"]) == (200, remaining)


async def test_a_keys_own_policy_replaces_the_default(platform: Platform) -> None:
    key_id, secret = await platform.new_key()
    await platform.limit(requests_per_hour=2)
    await platform.limit(api_key_id=key_id, requests_per_hour=4)
    as_second = {"Authorization": f"Bearer {secret}"}
    statuses = [(await platform.client.get("/api/v1/usage", headers=as_second)).status_code for _ in range(6)]
    assert statuses == [200] * 4 + [429] * 2
    statuses = [(await platform.client.get("/api/v1/usage")).status_code for _ in range(4)]
    assert statuses == [200] * 2 + [429] * 2
    assert (await platform.client.delete("/api/v1/rate-limits", params={"api_key_id": key_id})).status_code == 200
    await platform.until_limit_is(2, headers=as_second)
    refused = await platform.client.get("/api/v1/usage", headers=as_second)
    assert refused.json()["details"]["limit"] == 2, "the default binds it now, and counts what it has used"


async def test_grpc_callers_get_the_same_answer_as_status_and_metadata(platform: Platform) -> None:
    services = platform.services
    await platform.limit(requests_per_hour=2)
    call = services.usage.GetUsage(usage_pb2.GetUsageRequest(), metadata=services.metadata)
    await call
    assert dict(await call.initial_metadata())["ratelimit"].startswith('"hour";r=1;t=')
    await services.usage.GetUsage(usage_pb2.GetUsageRequest(), metadata=services.metadata)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await services.usage.GetUsage(usage_pb2.GetUsageRequest(), metadata=services.metadata)
    assert (caught.value.code(), reason_of(caught.value)) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "RATE_LIMIT_EXCEEDED",
    )
    details = details_of(caught.value, error_pb2.RateLimitDetails())
    assert (details.limit, details.remaining) == (2, 0)
    assert dict(caught.value.initial_metadata() or ())["retry-after"] == str(details.retryAfter)
    # Neither the scheduler nor the services of the deployment are limited.
    for _ in range(3):
        await services.snapshots.SealEpochs(snapshot_pb2.SealEpochsRequest(), metadata=services.cron_metadata)


async def test_each_message_of_a_stream_is_a_request(platform: Platform) -> None:
    services = platform.services
    await platform.limit(requests_per_hour=4)  # one opens the stream
    stream = services.events.StreamEvents(metadata=services.metadata)
    outcomes = []
    for number in range(6):
        request = event_pb2.RecordEventsRequest(tenant_id="acme", event_type="call", idempotency_key=str(number))
        await stream.write(event_pb2.StreamEventsRequest(sequence=number, request=request))
        outcomes.append((await stream.read()).outcome)
    await stream.done_writing()
    assert [outcome.WhichOneof("outcome") for outcome in outcomes] == ["response"] * 3 + ["status"] * 3
    assert all(outcome.metadata["ratelimit-limit"] == "4" for outcome in outcomes)
    assert await fetch_value(platform.database, "SELECT count(*) FROM ingest.usage_event") == 3


async def test_redis_killed_and_emptied_midway_leaves_limits_in_force(
    database: Database, valkey: EmbeddedValkey
) -> None:
    async with Redis.from_url(valkey.url(DATABASE)) as redis:
        await redis.flushdb()
    async with (
        FaultProxy("127.0.0.1", valkey.port) as proxy,
        open_platform(database, f"redis://127.0.0.1:{proxy.port}/{DATABASE}") as platform,
    ):
        await platform.limit(requests_per_hour=20)
        assert [(await platform.record()).status_code for _ in range(5)] == [200] * 5
        await proxy.cut()
        async with Redis.from_url(valkey.url(DATABASE)) as redis:
            await redis.flushdb()
        # Ingest counts by itself, from nothing; a changed limit has to wait for Redis.
        statuses = [(await platform.record()).status_code for _ in range(30)]
        assert statuses == [200] * 20 + [429] * 10
        answer = await platform.client.put("/api/v1/rate-limits", json={"requests_per_hour": 3})
        assert answer.status_code == 200
        assert (await platform.record()).status_code == 429
        await proxy.forward()
        await platform.until_limit_is(3)
