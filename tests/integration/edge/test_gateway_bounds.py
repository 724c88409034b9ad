"""The gateway at its bounds: what is too much or too early, and what stops or is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import httpx
import pytest

from tests.support.edge import EVENT, Edge, open_edge
from tests.support.wait import until
from usameter_core.config import ConfigError
from usameter_gateway import coalescing
from usameter_gateway.server import open_gateway


def padded(length: int) -> bytes:
    body = json.dumps(EVENT).encode()
    return body + b" " * (length - len(body))


async def test_more_than_the_edge_holds_is_a_503_and_other_routes_are_served(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coalescing, "HELD_ITEMS_MAX", 1)
    backend, calls = edge.backend, edge.backend.calls
    backend.go_on.clear()
    try:
        held = asyncio.create_task(edge.record(json=EVENT))

        async def is_held() -> bool:
            return backend.calls > calls

        await until(is_held, "the first request is under way")
        refused = await edge.record(json=EVENT)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["details"] == {"retry_safe": True}
        assert (await edge.client.get("/healthz")).status_code == 200
    finally:
        backend.go_on.set()
    assert (await held).status_code == 200


async def test_metadata_of_more_values_than_any_has_is_refused_before_it_is_converted(edge: Edge) -> None:
    body = json.dumps({**EVENT, "metadata": {"a": [1] * 16_384}}).encode()
    refused = await edge.record(content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    (violation,) = refused.json()["details"]["violations"]
    assert violation == {"field": "metadata", "description": "has more than 16384 values"}
    assert not edge.backend.requests


async def test_a_call_that_fails_fails_all_that_it_carried(edge: Edge) -> None:
    edge.backend.failure = grpc.StatusCode.UNAVAILABLE
    answers = await asyncio.gather(*(edge.record(json=EVENT) for _ in range(10)))
    assert {answer.status_code for answer in answers} == {503}


@pytest.mark.parametrize("chunked", [False, True])
async def test_four_mebibytes_are_the_limit(edge: Edge, chunked: bool) -> None:
    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    async def send(length: int) -> httpx.Response:
        body = padded(length)
        content = chunks(body) if chunked else body
        return await edge.record(content=content, headers={"content-type": "application/json"})

    assert (await send(4_194_304)).status_code == 200
    refused = await send(4_194_305)
    assert (refused.status_code, refused.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")
    assert refused.json()["details"] == {"limit_bytes": 4_194_304}


async def test_a_client_that_asks_first_is_told_before_it_sends_too_much(edge: Edge) -> None:
    reader, writer = await asyncio.open_connection(*edge.address)
    headers = "host: x\r\ncontent-length: 99999999999\r\nexpect: 100-continue"
    writer.write(f"POST /api/v1/events HTTP/1.1\r\n{headers}\r\n\r\n".encode())
    status = await asyncio.wait_for(reader.readline(), 5)
    assert status.startswith(b"HTTP/1.1 413")
    writer.close()


async def test_a_client_that_sends_too_much_still_gets_its_answer(edge: Edge) -> None:
    """Closing the connection on a client that is still sending would lose the answer."""
    refused = await edge.record(content=b" " * 20_000_000, headers={"content-type": "application/json"})
    assert (refused.status_code, refused.json()["code"]) == (413, "PAYLOAD_TOO_LARGE")


@pytest.mark.parametrize(("event", "safe"), [(EVENT, True), ({"event_type": "e", "tenant_id": "t"}, False)])
async def test_a_service_that_is_away_is_a_503_that_says_whether_to_retry(event: dict[str, str], safe: bool) -> None:
    async with open_edge() as edge:
        await edge.servers["ingest"].stop(None)
        response = await edge.record(json=event)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["details"] == {"retry_safe": safe}
        ready = await edge.client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["details"] == {"not_serving": ["ingest"]}
        assert (await edge.client.get("/healthz")).status_code == 200
        # The others go on.
        assert (await edge.client.delete("/api/v1/quotas/t/e")).status_code == 200


async def test_requests_under_way_are_finished_when_the_gateway_stops() -> None:
    async with AsyncExitStack() as stack:
        edge = await stack.enter_async_context(open_edge())
        second = await stack.enter_async_context(httpx.AsyncClient())
        edge.backend.go_on.clear()
        closing = AsyncExitStack()
        address = await closing.enter_async_context(open_gateway(edge.settings))
        request = asyncio.create_task(second.post(f"http://{address}/api/v1/events", json=EVENT))
        await edge.backend.arrived.wait()
        stopping = asyncio.create_task(closing.aclose())
        finished, _ = await asyncio.wait({request, stopping}, timeout=0.1)
        assert not finished
        edge.backend.go_on.set()
        assert (await request).status_code == 200
        await stopping


async def test_a_taken_port_is_a_clear_error(edge: Edge) -> None:
    settings = edge.settings.model_copy(update={"listen": edge.address})
    with pytest.raises(ConfigError, match=r"USAMETER_LISTEN: 127\.0\.0\.1:\d+ cannot be listened on"):
        async with open_gateway(settings):
            pass
