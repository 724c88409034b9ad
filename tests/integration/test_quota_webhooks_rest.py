"""Webhooks as a customer meets them: over REST, and as the documentation tells a receiver to read them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Database
from tests.support.clock import ManualClock
from tests.support.quota_webhooks import WebhookBench
from tests.support.receiver import Received, Receiver, open_receiver
from tests.support.services import ANY_PORT, new_organization, open_services
from tests.support.wait import until
from usameter_core.config import Address
from usameter_core.postgres.pool import open_pool
from usameter_gateway.config import GatewaySettings
from usameter_gateway.server import open_gateway
from usameter_quota.clients import WebhookClient, open_webhook_client
from usameter_quota.domain.webhooks import secret_text

DOCS = Path(__file__).parents[2] / "docs" / "webhooks.md"


@pytest.fixture
async def client() -> AsyncIterator[WebhookClient]:
    async with open_webhook_client(allow_private=True, timeout_seconds=60) as opened:
        yield opened


@pytest.fixture
async def bench(database: Database, client: WebhookClient) -> AsyncIterator[WebhookBench]:
    """In a database of its own: workers look at all organizations."""
    async with open_pool(database.role_url("quota"), application_name="test") as pool:
        yield WebhookBench(pool, client)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with open_receiver() as opened:
        yield opened


async def test_over_rest_from_a_full_quota_to_a_signed_message(database: Database, receiver: Receiver) -> None:
    """As a customer meets it: the secret once, the message soon, the log afterwards."""
    async with (
        open_services(database, clock=ManualClock()) as services,
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
            base_url=f"http://{address}/api/v1", headers={"Authorization": f"Bearer {services.api_key}"}, timeout=10
        ) as rest,
    ):

        async def call(method: str, path: str, status: int = 200, **body: Any) -> Any:
            answer = await rest.request(method, path, **({"json": body} if body else {}))
            assert answer.status_code == status, answer.text
            return answer.json()

        made = await call(
            "POST", "/webhook-endpoints", url=receiver.url, event_types=["quota.limit_reached"], description="mine"
        )
        secret = made.pop("secret")
        assert made == {
            "id": made["id"],
            "url": receiver.url,
            "event_types": ["quota.limit_reached"],
            "description": "mine",
            "created_at": made["created_at"],
            "disabled_at": None,
        }
        path = f"/webhook-endpoints/{made['id']}"
        assert await call("GET", path) == made
        assert await call("GET", "/webhook-endpoints") == {"webhook_endpoints": [made]}

        await call("PUT", "/quotas/acme/call", limit_value="10.5", enforcement_mode="HARD", period="MONTHLY")
        await call("POST", "/events", tenant_id="acme", event_type="call", quantity=10.5, idempotency_key="k")
        (message,) = await receiver.until_received(1)
        assert message.is_signed_with(secret)
        (event,) = (await call("GET", "/quota-events?type=LIMIT_REACHED"))["quota_events"]
        assert message.json == {"type": "quota.limit_reached", "timestamp": event["occurred_at"], "data": event}

        async def logged() -> bool:
            (delivery,) = (await call("GET", f"{path}/deliveries"))["deliveries"]
            return bool(delivery["state"] == "DELIVERED")

        await until(logged, "the delivery is logged")
        (delivery,) = (await call("GET", f"{path}/deliveries"))["deliveries"]
        (attempt,) = delivery.pop("attempts")
        assert delivery == {
            "id": message.id,
            "type": "quota.limit_reached",
            "position": event["position"],
            "state": "DELIVERED",
            "created_at": delivery["created_at"],
            "next_attempt_at": None,
        }
        assert (attempt["status_code"], attempt["error"]) == (200, None)
        assert set(attempt) == {"attempted_at", "duration_ms", "status_code", "error"}

        rotated = await call("POST", f"{path}:rotateSecret")
        assert rotated.pop("secret") not in (secret, None) and rotated == made
        refused = await call("POST", "/webhook-endpoints", 400, url=receiver.url, event_types=["quota.nothing"])
        assert refused["details"]["violations"][0]["field"] == "event_types[0]"
        refused = await call("POST", "/webhook-endpoints", 400, url="http://user@127.0.0.1/")
        assert refused["details"]["violations"][0]["field"] == "url"
        _, stranger = await new_organization(database, "stranger")
        answer = await rest.get(path, headers={"Authorization": f"Bearer {stranger}"})
        assert (answer.status_code, answer.json()["details"]["id"]) == (404, made["id"])
        assert await call("DELETE", path) == {}
        await call("GET", path, 404)
        await call("DELETE", path, 404)


def documented_verify() -> Callable[[bytes, dict[str, str], str], None]:
    """The function of docs/webhooks.md, which is what customers copy."""
    (source,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, str(DOCS), "exec"), names)
    verify: Callable[[bytes, dict[str, str], str], None] = names["verify"]
    return verify


async def test_what_the_documentation_tells_receivers_to_do_accepts_our_messages_and_no_others(
    bench: WebhookBench, receiver: Receiver
) -> None:
    verify = documented_verify()
    bench.clock.set(datetime.now(UTC))
    _, secret = await bench.endpoint(receiver)
    await bench.happen()
    await bench.deliver()
    (message,) = receiver.received
    verify(message.body, message.headers, secret)
    old = {**message.headers, "webhook-timestamp": str(int(message.headers["webhook-timestamp"]) - 301)}
    for body, headers, key in (
        (message.body + b" ", message.headers, secret),
        (message.body, {**message.headers, "webhook-id": "msg_other"}, secret),
        (message.body, old, secret),
        (message.body, message.headers, secret_text(b"x" * 32)),
    ):
        with pytest.raises(ValueError):
            verify(body, headers, key)


def test_the_message_in_the_documentation_is_signed_as_it_says() -> None:
    text = DOCS.read_text()
    (secret,) = re.findall(r'"(whsec_\S+)"', text)
    ((head, body),) = re.findall(r"```http\n(.*?)\n\n(.*?)\n```", text, re.DOTALL)
    headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    assert Received("/", headers, body.replace("\n", "").encode()).is_signed_with(secret)
