"""The gateway over real sockets: HTTP in front, gRPC servers behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.support.edge import EVENT, PDF, Edge
from usameter.billing.v1 import document_pb2
from usameter.ingest.v1 import event_pb2
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
