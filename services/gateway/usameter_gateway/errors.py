"""Errors as REST clients see them: `{"error": sentence, "code": CODE, "details": {...}}`.

The only place that knows which meaning is which HTTP status. What a service says in
google.rpc.ErrorInfo passes through; what it did not mean to say (an exception, a missing method)
becomes INTERNAL and a request id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from usameter.common.v1 import error_pb2
from usameter.common.v1.error_pb2 import ErrorReason
from usameter_gateway.descriptors import message_class, type_of
from usameter_gateway.response import Encoders, json_bytes
from usameter_gateway.upstream import rate_limit_headers
from usameter_gateway.violations import VIOLATIONS_MAX, Violation

DOMAIN = "usameter"
DETAILS_KEY = "grpc-status-details-bin"

HTTP_STATUS = {
    error_pb2.INVALID_ARGUMENT: 400,
    error_pb2.MALFORMED_JSON: 400,
    error_pb2.UNAUTHENTICATED: 401,
    error_pb2.PERMISSION_DENIED: 403,
    error_pb2.QUOTA_EXCEEDED: 403,
    error_pb2.NOT_FOUND: 404,
    error_pb2.METHOD_NOT_ALLOWED: 405,
    error_pb2.IDEMPOTENCY_CONFLICT: 409,
    error_pb2.ALREADY_EXISTS: 409,
    error_pb2.FAILED_PRECONDITION: 409,
    error_pb2.PAYLOAD_TOO_LARGE: 413,
    error_pb2.UNSUPPORTED_MEDIA_TYPE: 415,
    error_pb2.RATE_LIMIT_EXCEEDED: 429,
    error_pb2.INTERNAL: 500,
    error_pb2.UNAVAILABLE: 503,
}

# For a status without ErrorInfo: gRPC's own, or a proxy's. RESOURCE_EXHAUSTED is then a server that
# takes no more calls, for no message that passes our 4 MiB comes near gRPC's 32 MiB.
_REASON_BY_CODE = {
    code.value[0]: reason
    for code, reason in (
        (grpc.StatusCode.INVALID_ARGUMENT, error_pb2.INVALID_ARGUMENT),
        (grpc.StatusCode.OUT_OF_RANGE, error_pb2.INVALID_ARGUMENT),
        (grpc.StatusCode.UNAUTHENTICATED, error_pb2.UNAUTHENTICATED),
        (grpc.StatusCode.PERMISSION_DENIED, error_pb2.PERMISSION_DENIED),
        (grpc.StatusCode.NOT_FOUND, error_pb2.NOT_FOUND),
        (grpc.StatusCode.ALREADY_EXISTS, error_pb2.ALREADY_EXISTS),
        (grpc.StatusCode.FAILED_PRECONDITION, error_pb2.FAILED_PRECONDITION),
        (grpc.StatusCode.ABORTED, error_pb2.FAILED_PRECONDITION),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, error_pb2.UNAVAILABLE),
        (grpc.StatusCode.UNAVAILABLE, error_pb2.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, error_pb2.UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, error_pb2.UNAVAILABLE),
    )
}

_REASON_BY_NAME = {ErrorReason.Name(reason): reason for reason in HTTP_STATUS}

_HEADERS = {
    error_pb2.UNAUTHENTICATED: ((b"www-authenticate", b"Bearer"),),
    error_pb2.UNAVAILABLE: ((b"retry-after", b"1"),),
}

_ENCODERS = Encoders()


class ApiError(Exception):
    """A request that ends with an error; `details` is the typed message of its reason."""

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        sentence: str,
        details: Message | None = None,
        *,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence
        self.details = details
        self.status = HTTP_STATUS[reason]
        self.headers: tuple[tuple[bytes, bytes], ...] = (*_HEADERS.get(reason, ()), *headers)

    def body(self) -> bytes:
        """The error as JSON."""
        details = {} if self.details is None else _ENCODERS.of(type_of(self.details))(self.details)
        code = ErrorReason.Name(self.reason)
        return json_bytes({"error": self.sentence, "code": code, "details": details})


def invalid_argument(violations: Sequence[Violation]) -> ApiError:
    """The request can never succeed as it is; the sentence names the first violation."""
    first = violations[0]
    sentence = f"{first.field}: {first.description}" if first.field else first.description
    if len(violations) > 1:
        sentence += f" (and {len(violations) - 1} more)"
    return ApiError(error_pb2.INVALID_ARGUMENT, sentence, _violation_details(violations))


def malformed_json(description: str) -> ApiError:
    """The body is not JSON; the description says where."""
    violations = [Violation("", description)]
    sentence = f"The body is not valid JSON: {description}"
    return ApiError(error_pb2.MALFORMED_JSON, sentence, _violation_details(violations))


def _violation_details(violations: Sequence[Violation]) -> error_pb2.ViolationDetails:
    return error_pb2.ViolationDetails(
        violations=[
            error_pb2.FieldViolation(field=each.field, description=each.description)
            for each in violations[:VIOLATIONS_MAX]
        ]
    )


def unknown_route() -> ApiError:
    """No route has this path."""
    return ApiError(error_pb2.NOT_FOUND, "No such route; see /docs")


def method_not_allowed(allowed: Iterable[str]) -> ApiError:
    """The path has routes, none of them with this method."""
    verbs = ", ".join(sorted(allowed))
    return ApiError(
        error_pb2.METHOD_NOT_ALLOWED,
        f"This route takes {verbs}",
        headers=((b"allow", verbs.encode()),),
    )


def payload_too_large(limit_bytes: int) -> ApiError:
    """The body is longer than the edge reads."""
    details = error_pb2.PayloadDetails(limit_bytes=limit_bytes)
    return ApiError(error_pb2.PAYLOAD_TOO_LARGE, f"The body exceeds {limit_bytes} bytes", details)


def unsupported_media_type(sentence: str) -> ApiError:
    """The body is in a form that the edge does not read."""
    return ApiError(error_pb2.UNSUPPORTED_MEDIA_TYPE, sentence)


def internal(request_id: str) -> ApiError:
    """A fault of ours: the caller learns an id to ask about, and nothing else."""
    return ApiError(error_pb2.INTERNAL, "Internal error", error_pb2.InternalDetails(request_id=request_id))


def overloaded() -> ApiError:
    """More is waiting than the edge keeps; nothing of the request was sent on."""
    details = error_pb2.AvailabilityDetails(retry_safe=True)
    return ApiError(error_pb2.UNAVAILABLE, "Too many requests are waiting; try again", details)


def error_from_call(error: grpc.aio.AioRpcError, *, request_id: str, retry_safe: bool) -> ApiError:
    """What a failed call means to the REST client.

    Args:
        error: As grpc.aio raised it.
        request_id: Told to the client where the fault is ours.
        retry_safe: Whether the same request may be sent again without recording anything twice;
            used where the service did not say itself.
    """
    raw = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")
    status = _status_from_bytes(raw if isinstance(raw, bytes) else b"")
    status.code = error.code().value[0]
    translated = error_from_status(status, request_id=request_id, retry_safe=retry_safe)
    translated.headers += rate_limit_headers(error.initial_metadata() or ())
    return translated


def error_from_refusal(status: bytes, metadata: Mapping[str, str], *, request_id: str, retry_safe: bool) -> ApiError:
    """What one request's refusal, in a call of many, means to its REST client; else as `error_from_call`.

    Args:
        status: A serialized google.rpc.Status.
        metadata: The initial metadata that a call of its own would have had.
    """
    translated = error_from_status(_status_from_bytes(status), request_id=request_id, retry_safe=retry_safe)
    translated.headers += rate_limit_headers(metadata.items())
    return translated


def error_from_status(status: Status, *, request_id: str, retry_safe: bool) -> ApiError:
    """What a status means to the REST client; else as `error_from_call`."""
    reason = _stated_reason(status)
    stated = reason is not None
    if reason is None:
        reason = _REASON_BY_CODE.get(status.code, error_pb2.INTERNAL)
    if reason == error_pb2.INTERNAL:
        return internal(request_id)
    details = _typed_details(status)
    if reason == error_pb2.UNAVAILABLE:
        details = details or error_pb2.AvailabilityDetails(retry_safe=retry_safe)
    sentence = status.message if stated else _sentence(reason, retry_safe)
    return ApiError(reason, sentence, details)


def _status_from_bytes(raw: bytes) -> Status:
    try:
        return Status.FromString(raw)
    except DecodeError:
        return Status()


def _stated_reason(status: Status) -> ErrorReason.ValueType | None:
    info = ErrorInfo()
    for packed in status.details:
        if packed.Unpack(info) and info.domain == DOMAIN:
            # None for the reason of a service newer than this edge; its code is known.
            return _REASON_BY_NAME.get(info.reason)
    return None


def _typed_details(status: Status) -> Message | None:
    for packed in status.details:
        name = packed.TypeName()
        if name.startswith("usameter.common.v1."):
            try:
                descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
                return message_class(descriptor).FromString(packed.value)
            except (KeyError, DecodeError):
                # A service newer than this edge: its code still tells the client what to do.
                return None
    return None


def _sentence(reason: ErrorReason.ValueType, retry_safe: bool) -> str:
    # Texts without ErrorInfo were written for operators ("failed to connect to 10.0.0.7:7001").
    if reason == error_pb2.UNAVAILABLE:
        advice = "try again" if retry_safe else "whether it carried the request out is unknown"
        return f"The service did not answer; {advice}"
    return ErrorReason.Name(reason).replace("_", " ").capitalize()
