"""gRPC statuses as REST errors."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc.aio import AioRpcError, Metadata

from usameter.common.v1 import error_pb2
from usameter.ingest.v1 import event_pb2
from usameter.quota.v1 import reservation_pb2
from usameter_core.errors import LimitViolation, QuotaExceeded, Unavailable
from usameter_core.grpc.status import status_of
from usameter_gateway.errors import DETAILS_KEY, HTTP_STATUS, error_from_call
from usameter_gateway.retries import is_recording_retry_safe, is_retry_safe


def failed(code: grpc.StatusCode, text: str = "secret text", *details: Message) -> AioRpcError:
    status = Status(code=code.value[0], message=text)
    for detail in details:
        packed = Packed()
        packed.Pack(detail)
        status.details.append(packed)
    trailing = Metadata((DETAILS_KEY, status.SerializeToString())) if details else Metadata()
    return AioRpcError(code, Metadata(), trailing, details=text)


def rest(error: AioRpcError, *, retry_safe: bool = False) -> tuple[int, dict[str, Any]]:
    translated = error_from_call(error, request_id="req-1", retry_safe=retry_safe)
    return translated.status, json.loads(translated.body())


def info(reason: str, domain: str = "usameter") -> ErrorInfo:
    return ErrorInfo(reason=reason, domain=domain)


def test_every_reason_of_the_contract_has_an_http_status() -> None:
    reasons = set(error_pb2.ErrorReason.values()) - {error_pb2.ERROR_REASON_UNSPECIFIED}
    assert set(HTTP_STATUS) == reasons


def test_a_full_quota_is_the_published_403() -> None:
    details = error_pb2.QuotaExceededDetails(limit=10000, current=10000, reset_at={"seconds": 1706745600})
    error = failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "Quota exceeded", info("QUOTA_EXCEEDED"), details)
    translated = error_from_call(error, request_id="req-1", retry_safe=False)
    assert translated.status == 403
    assert translated.body() == (
        b'{"error":"Quota exceeded","code":"QUOTA_EXCEEDED",'
        b'"details":{"limit":10000,"current":10000,"reset_at":"2024-02-01T00:00:00Z"}}'
    )


def test_what_the_core_library_puts_on_the_wire_is_understood() -> None:
    limit = LimitViolation("t", "e", Decimal(10), Decimal(9), Decimal(2), None)
    code, status = status_of(QuotaExceeded([limit], batch=True))
    trailing = Metadata((DETAILS_KEY, status.SerializeToString()))
    http, body = rest(AioRpcError(code, Metadata(), trailing, details=status.message))
    assert http == 403
    assert body["details"] == {
        "limit": 10,
        "current": 9,
        "reset_at": None,
        "violations": [
            {"tenant_id": "t", "event_type": "e", "limit": 10, "current": 9, "requested": 2, "reset_at": None}
        ],
    }


@pytest.mark.parametrize(
    ("reason", "status"),
    [(error_pb2.ErrorReason.Name(reason), status) for reason, status in HTTP_STATUS.items() if status < 500],
)
def test_a_stated_reason_decides_code_and_status(reason: str, status: int) -> None:
    found = rest(failed(grpc.StatusCode.UNKNOWN, "A sentence", info(reason)))
    assert found == (status, {"error": "A sentence", "code": reason, "details": {}})


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_ARGUMENT"),
        (grpc.StatusCode.OUT_OF_RANGE, 400, "INVALID_ARGUMENT"),
        (grpc.StatusCode.UNAUTHENTICATED, 401, "UNAUTHENTICATED"),
        (grpc.StatusCode.PERMISSION_DENIED, 403, "PERMISSION_DENIED"),
        (grpc.StatusCode.NOT_FOUND, 404, "NOT_FOUND"),
        (grpc.StatusCode.ALREADY_EXISTS, 409, "ALREADY_EXISTS"),
        (grpc.StatusCode.FAILED_PRECONDITION, 409, "FAILED_PRECONDITION"),
        (grpc.StatusCode.ABORTED, 409, "FAILED_PRECONDITION"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 503, "UNAVAILABLE"),
        (grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 503, "UNAVAILABLE"),
        (grpc.StatusCode.CANCELLED, 503, "UNAVAILABLE"),
        (grpc.StatusCode.UNIMPLEMENTED, 500, "INTERNAL"),
        (grpc.StatusCode.UNKNOWN, 500, "INTERNAL"),
        (grpc.StatusCode.INTERNAL, 500, "INTERNAL"),
        (grpc.StatusCode.DATA_LOSS, 500, "INTERNAL"),
    ],
)
def test_a_bare_status_is_mapped_by_code_and_its_text_stays_inside(
    code: grpc.StatusCode, status: int, reason: str
) -> None:
    http, body = rest(failed(code))
    assert (http, body["code"]) == (status, reason)
    assert "secret" not in json.dumps(body)


def test_a_fault_of_ours_tells_a_request_id_and_nothing_else() -> None:
    bare = rest(failed(grpc.StatusCode.UNKNOWN))
    stated = rest(
        failed(grpc.StatusCode.INTERNAL, "secret", info("INTERNAL"), error_pb2.InternalDetails(request_id="x"))
    )
    expected = {"error": "Internal error", "code": "INTERNAL", "details": {"request_id": "req-1"}}
    assert bare == stated == (500, expected)


@pytest.mark.parametrize("retry_safe", [True, False])
def test_who_is_away_leaves_it_to_the_edge_whether_a_retry_is_safe(retry_safe: bool) -> None:
    error = failed(grpc.StatusCode.UNAVAILABLE)
    translated = error_from_call(error, request_id="", retry_safe=retry_safe)
    assert json.loads(translated.body())["details"] == {"retry_safe": retry_safe}
    assert (b"retry-after", b"1") in translated.headers
    code, status = status_of(Unavailable("Busy"))
    trailing = Metadata((DETAILS_KEY, status.SerializeToString()))
    _, body = rest(AioRpcError(code, Metadata(), trailing), retry_safe=retry_safe)
    assert body == {"error": "Busy", "code": "UNAVAILABLE", "details": {"retry_safe": retry_safe}}


def test_what_a_service_says_about_retries_stands() -> None:
    details = error_pb2.AvailabilityDetails(retry_safe=True)
    _, body = rest(failed(grpc.StatusCode.UNAVAILABLE, "Busy", info("UNAVAILABLE"), details), retry_safe=False)
    assert body["details"] == {"retry_safe": True}


def test_reasons_of_others_and_of_newer_services_count_by_their_code() -> None:
    for other in (info("QUOTA_EXCEEDED", domain="googleapis.com"), info("TENANT_SUSPENDED")):
        assert rest(failed(grpc.StatusCode.PERMISSION_DENIED, "x", other))[1]["code"] == "PERMISSION_DENIED"


def test_details_that_cannot_be_read_are_left_out() -> None:
    unknown = Packed(type_url="type.googleapis.com/usameter.common.v1.Newer", value=b"\x08\x01")
    status = Status(details=[Packed(), unknown])
    status.details[0].Pack(info("NOT_FOUND"))
    for raw in (status.SerializeToString(), b"\xff\xff"):
        error = AioRpcError(grpc.StatusCode.NOT_FOUND, Metadata(), Metadata((DETAILS_KEY, raw)), details="x")
        http, body = rest(error)
        assert (http, body["details"]) == (404, {})


@pytest.mark.parametrize(
    ("request_", "safe"),
    [
        ({"idempotency_key": "k"}, True),
        ({"tenant_id": "t"}, False),
        ({"idempotency_key": ""}, False),
        ({"events": [{"idempotency_key": "a"}, {"idempotency_key": "b"}]}, True),
        ({"events": [{"idempotency_key": "a"}, {}]}, False),
        ({"events": [{}], "idempotency_key": "k"}, False),
        ({}, False),
    ],
)
def test_recording_is_safe_to_retry_where_every_event_carries_a_key(request_: dict[str, Any], safe: bool) -> None:
    assert is_retry_safe("POST", event_pb2.RecordEventsRequest(**request_)) is safe
    assert is_recording_retry_safe(json.dumps(request_).encode()) is safe


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"events": 1}', b'{"idempotency_key": "k"', b'{"events": [{"idempotency_key": null}]}']
)
def test_what_is_no_request_is_not_safe_to_retry(body: bytes) -> None:
    assert not is_recording_retry_safe(body)


def test_a_reservation_under_an_id_of_the_callers_is_safe_to_retry_and_an_event_that_names_one_is_not() -> None:
    assert is_retry_safe("POST", reservation_pb2.ReserveQuotaRequest(tenant_id="t", reservation_id="r"))
    assert not is_retry_safe("POST", reservation_pb2.ReserveQuotaRequest(tenant_id="t"))
    assert is_retry_safe("POST", reservation_pb2.CancelReservationRequest(reservation_id="r"))
    assert not is_retry_safe("POST", event_pb2.RecordEventsRequest(tenant_id="t", reservation_id="r"))
    assert not is_retry_safe("POST", event_pb2.RecordEventsRequest(events=[{"reservation_id": "r"}]))


def test_only_post_needs_keys() -> None:
    request = event_pb2.VoidEventRequest(event_id="e")
    assert not is_retry_safe("POST", request)
    assert all(is_retry_safe(verb, request) for verb in ("GET", "HEAD", "PUT", "DELETE"))
