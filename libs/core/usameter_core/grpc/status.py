"""Errors on the wire: a status code, google.rpc.ErrorInfo, and one typed message of details.

This module alone knows which meaning is which gRPC code. Both directions are here: a servicer's
exception becomes a status, and a peer's status becomes an exception again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import TypeVar

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from usameter.common.v1 import error_pb2
from usameter_core.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    IdempotencyConflict,
    Internal,
    InvalidArgument,
    LimitViolation,
    NotFound,
    PermissionDenied,
    QuotaExceeded,
    RateLimited,
    Unauthenticated,
    Unavailable,
    UsameterError,
)
from usameter_core.grpc.timestamps import timestamp_from_datetime

_Details = TypeVar("_Details", bound=Message)

DOMAIN = "usameter"
DETAILS_KEY = "grpc-status-details-bin"


def status_of(error: UsameterError) -> tuple[grpc.StatusCode, Status]:
    """The code and the status message of an error; `Internal` and others have none here."""
    code, reason, details = _meaning(error)
    status = Status(code=code.value[0], message=str(error))
    info = ErrorInfo(reason=error_pb2.ErrorReason.Name(reason), domain=DOMAIN)
    _pack(status, info)
    if details is not None:
        _pack(status, details)
    return code, status


def reason_and_details_of(error: UsameterError) -> tuple[str, Message | None]:
    """The error's reason, which is `code` in REST, and its typed details."""
    _, reason, details = _meaning(error)
    return error_pb2.ErrorReason.Name(reason), details


def internal_status(request_id: str) -> tuple[grpc.StatusCode, Status]:
    """What a caller learns of a fault of ours: a request id to ask about, and nothing else."""
    status = Status(code=grpc.StatusCode.INTERNAL.value[0], message="Internal error")
    _pack(status, ErrorInfo(reason="INTERNAL", domain=DOMAIN))
    _pack(status, error_pb2.InternalDetails(request_id=request_id))
    return grpc.StatusCode.INTERNAL, status


def _pack(status: Status, detail: Message) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)


def _meaning(error: UsameterError) -> tuple[grpc.StatusCode, error_pb2.ErrorReason.ValueType, Message | None]:
    match error:
        case InvalidArgument():
            violations = [
                error_pb2.FieldViolation(field=each.field, description=each.description) for each in error.violations
            ]
            return (
                grpc.StatusCode.INVALID_ARGUMENT,
                error_pb2.INVALID_ARGUMENT,
                error_pb2.ViolationDetails(violations=violations),
            )
        case Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED, error_pb2.UNAUTHENTICATED, None
        case PermissionDenied(missing_scope=scope):
            return (
                grpc.StatusCode.PERMISSION_DENIED,
                error_pb2.PERMISSION_DENIED,
                error_pb2.PermissionDetails(missing_scope=scope),
            )
        case NotFound(resource=resource, resource_id=resource_id):
            details = error_pb2.ResourceDetails(resource=resource, id=resource_id)
            return grpc.StatusCode.NOT_FOUND, error_pb2.NOT_FOUND, details
        case AlreadyExists(resource=resource, resource_id=resource_id):
            details = error_pb2.ResourceDetails(resource=resource, id=resource_id)
            return grpc.StatusCode.ALREADY_EXISTS, error_pb2.ALREADY_EXISTS, details
        case IdempotencyConflict():
            conflict = error_pb2.ConflictDetails(
                field=error.field, idempotency_key=error.idempotency_key, event_id=error.event_id
            )
            return grpc.StatusCode.ALREADY_EXISTS, error_pb2.IDEMPOTENCY_CONFLICT, conflict
        case FailedPrecondition(condition=condition):
            return (
                grpc.StatusCode.FAILED_PRECONDITION,
                error_pb2.FAILED_PRECONDITION,
                error_pb2.PreconditionDetails(condition=condition),
            )
        case QuotaExceeded():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, error_pb2.QUOTA_EXCEEDED, _quota_details(error)
        case RateLimited():
            rate_limit = error_pb2.RateLimitDetails(
                limit=error.limit,
                remaining=0,
                resetAt=timestamp_from_datetime(error.reset_at),
                retryAfter=error.retry_after_seconds,
            )
            return grpc.StatusCode.RESOURCE_EXHAUSTED, error_pb2.RATE_LIMIT_EXCEEDED, rate_limit
        case Unavailable(retry_safe=retry_safe):
            availability = None if retry_safe is None else error_pb2.AvailabilityDetails(retry_safe=retry_safe)
            return grpc.StatusCode.UNAVAILABLE, error_pb2.UNAVAILABLE, availability
    raise error


def _quota_details(error: QuotaExceeded) -> error_pb2.QuotaExceededDetails:
    first = error.violations[0]
    details = error_pb2.QuotaExceededDetails(limit=_number(first.limit), current=_number(first.current))
    if first.reset_at is not None:
        details.reset_at.FromDatetime(first.reset_at)
    if error.batch:
        details.violations.extend(_quota_violation(each) for each in error.violations)
    return details


def _quota_violation(violation: LimitViolation) -> error_pb2.QuotaViolation:
    message = error_pb2.QuotaViolation(
        tenant_id=violation.tenant_id,
        event_type=violation.event_type,
        limit=_number(violation.limit),
        current=_number(violation.current),
        requested=_number(violation.requested),
    )
    if violation.reset_at is not None:
        message.reset_at.FromDatetime(violation.reset_at)
    return message


def _number(value: Decimal) -> float:
    # The published error has JSON numbers; the exact values are strings on the quota itself.
    return float(value)


@contextmanager
def peer_errors(peer: str) -> Iterator[None]:
    """Turns a peer's failure into the error it means to us.

    Raises:
        Unavailable: The peer cannot be reached or did not answer in time; whether it acted is unknown.
        InvalidArgument, NotFound, FailedPrecondition, Unauthenticated: It said so.
        Internal: It said anything else.
    """
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _error_from_peer(peer, error) from error


def _error_from_peer(peer: str, error: grpc.aio.AioRpcError) -> UsameterError:
    sentence = error.details() or ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Unavailable(f"The {peer} service cannot be reached; try again")
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated()
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidArgument([FieldViolation("", sentence)])
        case grpc.StatusCode.NOT_FOUND:
            details = _details_of(error, error_pb2.ResourceDetails())
            return NotFound(details.resource, details.id)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return FailedPrecondition(_details_of(error, error_pb2.PreconditionDetails()).condition, sentence)
    return Internal(f"{peer} answered {error.code().name}: {sentence}")


def _details_of(error: grpc.aio.AioRpcError, message: _Details) -> _Details:
    raw = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), None)
    if isinstance(raw, bytes):
        for packed in Status.FromString(raw).details:
            if packed.Unpack(message):
                break
    return message
