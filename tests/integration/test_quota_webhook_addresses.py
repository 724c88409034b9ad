"""Where webhooks are sent, and where never: URLs of customers are reached from inside our network."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.conftest import Database
from tests.support.quota_webhooks import WebhookBench
from tests.support.receiver import Receiver, open_receiver, resolver_of
from usameter_core.errors import InvalidArgument
from usameter_core.postgres.pool import open_pool
from usameter_quota.clients import NotSent, WebhookClient, open_webhook_client
from usameter_quota.domain.webhooks import DeliveryState

CERTIFICATE = Path(__file__).parents[1] / "data" / "hooks_example.pem"


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


def guarded(transport: httpx.AsyncBaseTransport, *answers: Sequence[str], allow_private: bool = False) -> WebhookClient:
    """A client as it is deployed, but for who resolves names."""
    return WebhookClient(
        transport,
        resolve=resolver_of(*(list(answer) for answer in answers)),
        allow_private=allow_private,
        timeout_seconds=5,
    )


@pytest.mark.parametrize(
    "url",
    [
        *("http://hooks.example/", "ftp://hooks.example/", "hooks.example", "//hooks.example/", "", "https://"),
        *("https://user@hooks.example/", "https://user:password@hooks.example/", "https://hooks.example/#fragment"),
        *("https://hooks.example:0/", "https://hooks.example:65536/", "https://hooks.example\n/", "https://[::1/"),
    ],
)
async def test_a_url_of_another_form_is_never_sent_to(url: str) -> None:
    async with httpx.AsyncHTTPTransport() as transport:
        client = guarded(transport, ["1.1.1.1"])
        with pytest.raises(NotSent):
            await client.check(url)
        with pytest.raises(NotSent):
            await client.post(url, body=b"{}", headers={})
        await client.check("https://hooks.example/")


@pytest.mark.parametrize(
    "addresses",
    [[], ["127.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:10.0.0.1"], ["1.1.1.1", "10.0.0.1"], ["64:ff9b::a00:1"]],
)
async def test_a_name_that_is_not_public_in_all_its_addresses_is_never_sent_to(addresses: list[str]) -> None:
    async with httpx.AsyncHTTPTransport() as transport:
        client = guarded(transport, addresses)
        with pytest.raises(NotSent, match="resolve"):
            await client.check("https://hooks.example/")
        with pytest.raises(NotSent, match="resolve"):
            await client.post("https://hooks.example/", body=b"{}", headers={})


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0", "[::1]", "[::ffff:127.0.0.1]"]
)
async def test_loopback_is_known_however_it_is_written(host: str) -> None:
    """By what the system's own resolver makes of it."""
    async with open_webhook_client(allow_private=False) as client:
        with pytest.raises(NotSent, match="not public"):
            await client.check(f"https://{host}/")


async def test_what_is_never_sent_to_makes_no_endpoint(bench: WebhookBench) -> None:
    async with httpx.AsyncHTTPTransport() as transport:
        bench.client = guarded(transport, ["10.0.0.1"])
        with pytest.raises(InvalidArgument) as refused:
            await bench.service.create_endpoint(bench.org_id, url="https://hooks.example/", types=[], description="")
    assert [violation.field for violation in refused.value.violations] == ["url"]
    assert await bench.service.list_endpoints(bench.org_id, after=None, limit=10) == []


async def test_a_name_that_moves_inside_after_its_creation_is_sent_nothing(
    bench: WebhookBench, receiver: Receiver
) -> None:
    async with httpx.AsyncHTTPTransport() as transport:
        bench.client = guarded(transport, ["1.1.1.1"], ["127.0.0.1"])
        endpoint, _ = await bench.service.create_endpoint(
            bench.org_id, url=f"https://hooks.example:{receiver.port}/", types=[], description=""
        )
        await bench.happen()
        assert await bench.deliver() == 1
    delivery = await bench.delivery(endpoint)
    assert delivery.state == DeliveryState.PENDING
    assert delivery.attempts[0].error == "host hooks.example resolves to an address that is not public"
    assert receiver.received == []


async def test_the_connection_goes_to_the_address_that_was_checked_and_the_request_to_the_name(
    receiver: Receiver,
) -> None:
    """hooks.example is reserved: it resolves nowhere. The first address refuses, so the second is tried."""
    async with httpx.AsyncHTTPTransport() as transport:
        # Asked a second time, the resolver would have no answer.
        client = guarded(transport, ["127.0.0.2", "127.0.0.1"], [], allow_private=True)
        status = await client.post(f"http://hooks.example:{receiver.port}/a?b=c", body=b"{}", headers={})
    assert status == 200
    (message,) = receiver.received
    assert message.headers["host"] == f"hooks.example:{receiver.port}"
    assert message.path == "/a?b=c"


async def test_the_certificate_must_be_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE)
    async with open_receiver(tls=tls) as receiver, httpx.AsyncHTTPTransport() as transport:
        client = guarded(transport, ["127.0.0.1"], allow_private=True)
        assert await client.post(f"https://hooks.example:{receiver.port}/", body=b"{}", headers={}) == 200
        for host in ("other.example", "127.0.0.1"):
            with pytest.raises(NotSent, match="certificate"):
                await client.post(f"https://{host}:{receiver.port}/", body=b"{}", headers={})
        assert len(receiver.received) == 1
