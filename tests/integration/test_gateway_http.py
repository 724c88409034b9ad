"""The gateway over real sockets: HTTP in front, gRPC servers behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
from google.api.httpbody_pb2 import HttpBody
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from tests.support.wait import until
from usameter.billing.v1 import document_pb2, document_pb2_grpc, invoice_pb2_grpc
from usameter.common.v1 import job_pb2
from usameter.ingest.v1 import event_pb2, event_pb2_grpc
from usameter.quota.v1 import quota_pb2, quota_pb2_grpc
from usameter_core.config import Address, ConfigError
from usameter_core.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    IdempotencyConflict,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    UsameterError,
)
from usameter_core.grpc.server import SERVER_OPTIONS
from usameter_core.grpc.status import DETAILS_KEY, status_of
from usameter_gateway import coalescing
from usameter_gateway.config import GatewaySettings
from usameter_gateway.server import open_gateway

LOCAL = Address("127.0.0.1", 0)
SERVICES = ("identity", "ingest", "quota", "billing")
PDF = b"%PDF-1.7\n\x00\xff"
EVENT = {"event_type": "api_request", "tenant_id": "t", "idempotency_key": "k"}


@dataclass
class Backend:
    """What the services were asked, and what they are to answer."""

    requests: list[Message] = field(default_factory=list)
    # Calls that carried events, many requests each.
    calls: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    failure: UsameterError | grpc.StatusCode | None = None
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    # Holds answers back until it is set.
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Message, context: Any, response: Message) -> Message:
        self.requests.append(request)
        self.arrived.set()
        self.metadata = dict(context.invocation_metadata())
        await self.go_on.wait()
        if isinstance(self.failure, UsameterError):
            code, status = status_of(self.failure)
            context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))
            await context.abort(code, status.message)
        if self.failure is not None:
            await context.abort(self.failure, "for operators only")
        return response


class Events(event_pb2_grpc.EventServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def RecordMany(self, request: Any, context: Any) -> Any:
        """Answers like an ingest that reads no JSON: item by item, each by its own credentials."""
        backend = self.backend
        if all(item.WhichOneof("content") == "json" for item in request.items):
            return event_pb2.RecordManyResponse(outcomes=[event_pb2.RecordOutcome(unread=True) for _ in request.items])
        outcomes = []
        for item in request.items:
            backend.requests.append(item.request)
            backend.metadata = {"authorization": item.authorization, "x-request-id": item.request_id}
            answer = event_pb2.RecordEventsResponse(success=True, event_id="evt_1", deduplicated=False)
            refused = isinstance(backend.failure, UsameterError) or item.authorization == "Bearer nobody"
            error = backend.failure if isinstance(backend.failure, UsameterError) else Unauthenticated()
            outcomes.append(
                event_pb2.RecordOutcome(status=status_of(error)[1].SerializeToString())
                if refused
                else event_pb2.RecordOutcome(response=answer)
            )
        backend.calls += 1
        backend.arrived.set()
        await backend.go_on.wait()
        if isinstance(backend.failure, grpc.StatusCode):
            await context.abort(backend.failure, "for operators only")
        return event_pb2.RecordManyResponse(outcomes=outcomes)

    async def GetEvent(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, event_pb2.Event(id=request.event_id, quantity=10000))

    async def VoidEvent(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, event_pb2.Correction(event_id=request.event_id))


class Quotas(quota_pb2_grpc.QuotaServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def SetQuota(self, request: Any, context: Any) -> Any:
        quota = quota_pb2.Quota(tenant_id=request.tenant_id, event_type=request.event_type)
        return await self.backend.answer(request, context, quota)

    async def DeleteQuota(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, quota_pb2.DeleteQuotaResponse())


class Invoices(invoice_pb2_grpc.InvoiceServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def BulkGenerateInvoices(self, request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("usameter-http-status", "202"),))
        return await self.backend.answer(request, context, job_pb2.Job(id="job_1", state=job_pb2.running))


class Documents(document_pb2_grpc.InvoiceDocumentServiceServicer):
    """Answers in a form of its own."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    async def GetInvoicePdf(self, request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("content-disposition", 'inline; filename="invoice-7.pdf"'),))
        return await self.backend.answer(request, context, HttpBody(content_type="application/pdf", data=PDF))

    async def GetInvoiceHtml(self, request: Any, context: Any) -> Any:
        return await self.backend.answer(request, context, HttpBody(content_type="text/html; charset=utf-8"))


@dataclass
class Edge:
    """A gateway, a client of it, and what is behind it."""

    client: httpx.AsyncClient
    backend: Backend
    servers: dict[str, grpc.aio.Server]
    settings: GatewaySettings
    address: Address

    async def record(self, **arguments: Any) -> httpx.Response:
        return await self.client.post("/api/v1/events", **arguments)


def registrations(backend: Backend) -> dict[str, Callable[[grpc.aio.Server], None]]:
    return {
        "ingest": lambda server: event_pb2_grpc.add_EventServiceServicer_to_server(Events(backend), server),
        "quota": lambda server: quota_pb2_grpc.add_QuotaServiceServicer_to_server(Quotas(backend), server),
        "billing": lambda server: register_billing(backend, server),
    }


def register_billing(backend: Backend, server: grpc.aio.Server) -> None:
    invoice_pb2_grpc.add_InvoiceServiceServicer_to_server(Invoices(backend), server)
    document_pb2_grpc.add_InvoiceDocumentServiceServicer_to_server(Documents(backend), server)


@asynccontextmanager
async def open_edge() -> AsyncIterator[Edge]:
    backend = Backend()
    backend.go_on.set()
    servers, addresses = {}, {}
    for name in SERVICES:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        registrations(backend).get(name, lambda _: None)(server)
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        addresses[f"{name}_addr"] = Address("127.0.0.1", server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        servers[name] = server
    settings = GatewaySettings(listen=LOCAL, **addresses)
    async with AsyncExitStack() as stack:
        for server in servers.values():
            stack.push_async_callback(server.stop, None)
        address = await stack.enter_async_context(open_gateway(settings))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://{address}"))
        yield Edge(client, backend, servers, settings, address)


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Edge]:
    async with open_edge() as edge:
        yield edge


@pytest.fixture
def edge(shared: Edge) -> Edge:
    """The shared edge, with a backend that has forgotten everything."""
    shared.backend.requests.clear()
    shared.backend.failure = None
    return shared


async def test_an_event_goes_through_and_is_answered_as_published(edge: Edge) -> None:
    event = {**EVENT, "quantity": 1.5, "metadata": {"a": [1, None]}, "timestamp": "2026-01-15T10:30:00Z"}
    response = await edge.record(json=event)
    assert response.status_code == 200
    assert response.content == b'{"success":true,"event_id":"evt_1","deduplicated":false}'
    assert response.headers["content-type"] == "application/json"
    (request,) = edge.backend.requests
    assert isinstance(request, event_pb2.RecordEventsRequest)
    assert (request.quantity, request.timestamp.seconds, request.metadata["a"][0]) == (1.5, 1768473000, 1)


async def test_credentials_and_request_id_travel_verbatim(edge: Edge) -> None:
    headers = {"authorization": "Bearer usa_x==", "x-request-id": "trace-1:a/b"}
    response = await edge.record(json=EVENT, headers=headers)
    assert response.headers["x-request-id"] == "trace-1:a/b"
    assert edge.backend.metadata["authorization"] == "Bearer usa_x=="
    assert edge.backend.metadata["x-request-id"] == "trace-1:a/b"


@pytest.mark.parametrize("given", [None, "", "a b", "x" * 65, "é"])
async def test_a_request_without_a_sane_id_gets_one(edge: Edge, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given.encode()}
    response = await edge.record(json=EVENT, headers=headers)
    made = response.headers["x-request-id"]
    assert len(made) == 32
    assert edge.backend.metadata["x-request-id"] == made
    assert not edge.backend.metadata["authorization"]


async def test_credentials_that_no_key_has_are_401(edge: Edge) -> None:
    response = await edge.record(json=EVENT, headers={"authorization": "Bearer é".encode()})
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert not edge.backend.requests


async def test_a_tenant_id_may_hold_a_slash_and_an_event_type_a_colon(edge: Edge) -> None:
    limit = {"limit_value": "5", "enforcement_mode": "HARD", "period": "DAILY"}
    response = await edge.client.put("/api/v1/quotas/a%2Fb%20c/x:check", json=limit)
    assert response.status_code == 200
    assert (response.json()["tenant_id"], response.json()["event_type"]) == ("a/b c", "x:check")


async def test_a_custom_verb_reaches_its_method(edge: Edge) -> None:
    response = await edge.client.post("/api/v1/events/evt_1:void", json={"reason": "twice"})
    assert response.json()["event_id"] == "evt_1"
    assert isinstance(edge.backend.requests[0], event_pb2.VoidEventRequest)


async def test_head_answers_like_get_without_the_body(edge: Edge) -> None:
    get = await edge.client.get("/api/v1/events/evt_1")
    head = await edge.client.head("/api/v1/events/evt_1")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == get.headers["content-length"] == str(len(get.content))


async def test_an_empty_answer_is_an_empty_object(edge: Edge) -> None:
    response = await edge.client.delete("/api/v1/quotas/t/e")
    assert (response.status_code, response.content) == (200, b"{}")


async def test_long_work_is_accepted_with_202(edge: Edge) -> None:
    period = {"period_start": "2026-01-01T00:00:00Z", "period_end": "2026-02-01T00:00:00Z"}
    response = await edge.client.post("/api/v1/invoices:bulkGenerate", json=period)
    assert response.status_code == 202
    assert response.json() == {"id": "job_1", "state": "running", "done": 0, "total": 0}


async def test_a_chunked_body_is_read_to_its_end(edge: Edge) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for byte in json.dumps(EVENT).encode():
            yield bytes((byte,))

    response = await edge.record(content=chunks(), headers={"content-type": "application/json; charset=utf-8"})
    assert response.status_code == 200
    assert edge.backend.requests[0].idempotency_key == "k"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("failure", "status", "code", "details"),
    [
        (InvalidArgument([FieldViolation("events[3].quantity", "too small")]), 400, "INVALID_ARGUMENT",
         {"violations": [{"field": "events[3].quantity", "description": "too small"}]}),
        (Unauthenticated(), 401, "UNAUTHENTICATED", {}),
        (PermissionDenied("events:write"), 403, "PERMISSION_DENIED", {"missing_scope": "events:write"}),
        (NotFound("event", "evt_1"), 404, "NOT_FOUND", {"resource": "event", "id": "evt_1"}),
        (AlreadyExists("correction", "evt_1", "x"), 409, "ALREADY_EXISTS", {"resource": "correction", "id": "evt_1"}),
        (IdempotencyConflict(field="", idempotency_key="k", event_id="evt_1"), 409, "IDEMPOTENCY_CONFLICT",
         {"field": "", "idempotency_key": "k", "event_id": "evt_1"}),
        (FailedPrecondition("NOTHING_DUE", "x"), 409, "FAILED_PRECONDITION", {"condition": "NOTHING_DUE"}),
        (Unavailable("x", retry_safe=True), 503, "UNAVAILABLE", {"retry_safe": True}),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 503, "UNAVAILABLE", {"retry_safe": True}),
    ],
)  # fmt: skip
async def test_what_a_service_means_arrives(
    edge: Edge, failure: UsameterError | grpc.StatusCode, status: int, code: str, details: dict[str, Any]
) -> None:
    edge.backend.failure = failure
    response = await edge.record(json=EVENT)
    body = response.json()
    assert (response.status_code, body["code"], body["details"]) == (status, code, details)
    assert body["error"] and set(body) == {"error", "code", "details"}


async def test_a_fault_of_a_service_tells_the_request_id_only(edge: Edge) -> None:
    edge.backend.failure = grpc.StatusCode.UNKNOWN
    response = await edge.record(json=EVENT, headers={"x-request-id": "r1"})
    assert response.status_code == 500
    assert response.json() == {"error": "Internal error", "code": "INTERNAL", "details": {"request_id": "r1"}}


async def test_a_method_that_the_service_does_not_have_is_a_fault(edge: Edge) -> None:
    response = await edge.client.get("/api/v1/organization")
    assert (response.status_code, response.json()["code"]) == (500, "INTERNAL")


async def test_unknown_routes_and_methods_are_told(edge: Edge) -> None:
    unknown = await edge.client.get("/api/v1/evnts")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "NOT_FOUND")
    other = await edge.client.patch("/api/v1/events")
    assert (other.status_code, other.json()["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert other.headers["allow"] == "GET, HEAD, POST"


async def test_broken_json_is_malformed(edge: Edge) -> None:
    response = await edge.record(content=b'{"a": ', headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (400, "MALFORMED_JSON")
    assert "line 1, column 7" in response.json()["error"]


async def test_a_misspelt_field_is_named_and_nothing_is_sent(edge: Edge) -> None:
    response = await edge.record(json={"events": [EVENT, {**EVENT, "quantitty": 5}]})
    assert response.status_code == 400
    assert response.json()["details"] == {
        "violations": [{"field": "events[1].quantitty", "description": "unknown field"}]
    }
    assert not edge.backend.requests


@pytest.mark.parametrize(
    "headers",
    [{}, {"content-type": "text/plain"}, {"content-type": "application/json", "content-encoding": "gzip"}],
)
async def test_a_body_that_is_not_declared_as_plain_json_is_415(edge: Edge, headers: dict[str, str]) -> None:
    response = await edge.record(content=b"{}", headers=headers)
    assert (response.status_code, response.json()["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")


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


async def test_http2_is_spoken_without_tls(edge: Edge) -> None:
    reader, writer = await asyncio.open_connection(*edge.address)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5))
    frame = await asyncio.wait_for(reader.readexactly(9), 5)
    assert frame[3] == 4, "the server's settings frame"
    writer.close()


async def test_the_edge_describes_itself(edge: Edge) -> None:
    assert (await edge.client.get("/healthz")).json() == {"status": "alive"}
    assert (await edge.client.get("/readyz")).json() == {"status": "ready"}
    document = (await edge.client.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    page = await edge.client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Usameter" in page.text
    assert (await edge.client.post("/healthz")).status_code == 405


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


async def test_a_file_is_answered_as_it_is_and_under_its_name(edge: Edge) -> None:
    response = await edge.client.get("/api/v1/invoices/inv_7/pdf")
    assert (response.status_code, response.content) == (200, PDF)
    assert response.headers["content-type"] == "application/pdf"
    assert response.headers["content-disposition"] == 'inline; filename="invoice-7.pdf"'
    assert response.headers["x-content-type-options"] == "nosniff"
    (request,) = edge.backend.requests
    assert isinstance(request, document_pb2.GetInvoicePdfRequest)
    assert request.invoice_id == "inv_7"
    head = await edge.client.head("/api/v1/invoices/inv_7/pdf")
    assert (head.content, head.headers["content-length"]) == (b"", str(len(PDF)))


async def test_a_file_may_be_empty_and_without_a_name(edge: Edge) -> None:
    response = await edge.client.get("/api/v1/invoices/inv_7/html")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "content-disposition" not in response.headers


async def test_an_error_is_json_also_where_the_answer_is_a_file(edge: Edge) -> None:
    edge.backend.failure = FailedPrecondition("DOCUMENT_TOO_LARGE", "too many lines")
    response = await edge.client.get("/api/v1/invoices/inv_7/pdf")
    assert (response.status_code, response.headers["content-type"]) == (409, "application/json")
    assert response.json()["details"] == {"condition": "DOCUMENT_TOO_LARGE"}
