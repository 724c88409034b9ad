"""Quota that is reserved before costly work, over REST."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.support.stack import RunningStack
from tests.support.wait import until

EVENT = {"tenant_id": "reserving", "event_type": "tokens"}


@pytest.fixture
async def client(stack: RunningStack) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"Authorization": f"Bearer {stack.environment['USAMETER_API_KEY']}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=10) as opened:
        yield opened


async def current(client: httpx.AsyncClient) -> str:
    found: str = (await client.get("/api/v1/quotas/reserving/tokens")).json()["current"]
    return found


async def post(client: httpx.AsyncClient, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = await client.post(f"/api/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def wait_for_state(client: httpx.AsyncClient, name: str, state: str) -> None:
    async def is_reached() -> bool:
        return bool((await client.get(f"/api/v1/reservations/{name}")).json()["state"] == state)

    await until(is_reached, f"{name} is {state}")


async def test_quota_is_reserved_consumed_cancelled_and_expires(client: httpx.AsyncClient) -> None:
    limit = {"limit_value": "10", "enforcement_mode": "HARD", "period": "MONTHLY"}
    assert (await client.put("/api/v1/quotas/reserving/tokens", json=limit)).status_code == 200
    reserved = await post(client, "quotas:reserve", **EVENT, quantity="9", reservation_id="job.17", ttl_seconds=600)
    assert list(reserved) == [
        *("reservation_id", "state", "tenant_id", "event_type", "quantity", "created_at", "expires_at", "warnings")
    ]
    assert (reserved["state"], reserved["quantity"]) == ("HELD", "9")
    assert [warning["code"] for warning in reserved["warnings"]] == ["QUOTA_SOFT_LIMIT"]
    assert (await client.get("/api/v1/reservations/job.17")).json() == reserved
    assert (await post(client, "quotas:reserve", 403, **EVENT, quantity="2"))["code"] == "QUOTA_EXCEEDED"
    assert (await post(client, "quotas:reserve", 409, **EVENT, quantity="1", reservation_id="job.17"))["code"] == (
        "IDEMPOTENCY_CONFLICT"
    )
    assert (await post(client, "events", 403, **EVENT, quantity=2))["code"] == "QUOTA_EXCEEDED"
    mismatched = await post(client, "events", 400, **{**EVENT, "tenant_id": "x"}, quantity=2, reservation_id="job.17")
    assert "job.17 is of another tenant" in mismatched["error"]

    recorded = await post(client, "events", **EVENT, quantity=2.5, reservation_id="job.17", idempotency_key="job.17")
    assert recorded["success"] and not recorded["deduplicated"]
    await wait_for_state(client, "job.17", "CONSUMED")
    assert await current(client) == "2.5"

    await post(client, "quotas:reserve", **EVENT, quantity="5", reservation_id="idle")
    assert (await post(client, "reservations/idle:cancel"))["state"] == "CANCELLED"
    assert await post(client, "reservations/never:cancel") == {"reservation_id": "never", "state": "CANCELLED"}
    closed = await post(client, "quotas:reserve", 409, **EVENT, quantity="1", reservation_id="never")
    assert closed["details"] == {"condition": "RESERVATION_CLOSED"}

    brief = (await post(client, "quotas:reserve", **EVENT, quantity="5", ttl_seconds=1))["reservation_id"]
    await wait_for_state(client, brief, "EXPIRED")
    assert await current(client) == "2.5"
    assert (await client.get("/api/v1/reservations/unknown")).status_code == 404
