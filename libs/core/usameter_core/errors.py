"""Everything that can go wrong, as meanings.

    UsameterError
    ├── InvalidArgument          the request says something impossible; names the fields
    ├── Unauthenticated          nobody we know
    ├── PermissionDenied         somebody we know, without the scope
    ├── NotFound                 no such resource in the caller's organization
    ├── AlreadyExists            it is there already, and cannot be there twice
    ├── IdempotencyConflict      the key belongs to an event with other content
    ├── FailedPrecondition       not in this state; names the condition
    ├── QuotaExceeded            a limit would be exceeded; says which
    ├── RateLimited              too many requests for now; says when one will be admitted
    ├── Unavailable              a dependency is away; says whether a retry is safe
    └── Internal                 ours; the caller learns a request id and nothing else

Domain and storage code raise these; `usameter_core.grpc.status` alone knows what they are in
gRPC, and the gateway alone what they are in HTTP. The reasons are those of
usameter/common/v1/error.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


class UsameterError(Exception):
    """The root; its text is a sentence that the caller may read and can act on."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field; `field` is a path such as "events[3].quantity"."""

    field: str
    description: str


class InvalidArgument(UsameterError):
    """The request can never succeed as it is."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        self.violations = list(violations)
        first = self.violations[0]
        more = f" (and {len(self.violations) - 1} more)" if len(self.violations) > 1 else ""
        super().__init__(f"{first.field}: {first.description}{more}" if first.field else f"{first.description}{more}")


class Unauthenticated(UsameterError):
    """No credentials, or none that we know. The same sentence for all: it must not help guessing."""

    def __init__(self) -> None:
        super().__init__("Missing, unknown or revoked credentials; send `Authorization: Bearer <api key>`")


class PermissionDenied(UsameterError):
    """The caller is known, but may not do this."""

    def __init__(self, missing_scope: str) -> None:
        self.missing_scope = missing_scope
        super().__init__(f"The API key lacks the scope {missing_scope}")


class NotFound(UsameterError):
    """The caller's organization has no such resource."""

    def __init__(self, resource: str, resource_id: str) -> None:
        self.resource = resource
        self.resource_id = resource_id
        super().__init__(f"No {resource} {resource_id}")


class AlreadyExists(UsameterError):
    """It is there already; trying again will not change that."""

    def __init__(self, resource: str, resource_id: str, sentence: str) -> None:
        self.resource = resource
        self.resource_id = resource_id
        super().__init__(sentence)


class IdempotencyConflict(UsameterError):
    """The idempotency key belongs to an event with other content; nothing was stored."""

    def __init__(self, *, field: str, idempotency_key: str, event_id: str) -> None:
        self.field = field
        self.idempotency_key = idempotency_key
        self.event_id = event_id
        at = f"{field}: " if field else ""
        super().__init__(f"{at}idempotency key already used by {event_id} with other content")


class FailedPrecondition(UsameterError):
    """Not possible in the present state; `condition` is a stable word for programs."""

    def __init__(self, condition: str, sentence: str) -> None:
        self.condition = condition
        super().__init__(sentence)


@dataclass(frozen=True, slots=True)
class LimitViolation:
    """One limit that a request would have exceeded."""

    tenant_id: str
    event_type: str
    limit: Decimal
    current: Decimal
    requested: Decimal
    reset_at: datetime | None


class QuotaExceeded(UsameterError):
    """Admitting the request would exceed a hard limit; nothing was stored or used up."""

    def __init__(self, violations: Sequence[LimitViolation], *, batch: bool) -> None:
        self.violations = list(violations)
        self.batch = batch
        super().__init__("Quota exceeded")


class RateLimited(UsameterError):
    """The API key has sent too many requests; nothing of this one was done. A retry is safe at `reset_at`.

    `limit` is the requests that the exhausted window admits, `retry_after_seconds` the time left, rounded up.
    """

    def __init__(self, *, limit: int, reset_at: datetime, retry_after_seconds: int) -> None:
        self.limit = limit
        self.reset_at = reset_at
        self.retry_after_seconds = retry_after_seconds
        super().__init__("Rate limit exceeded")


class Unavailable(UsameterError):
    """A dependency cannot be reached now.

    `retry_safe` says whether the same request may be sent again without recording anything
    twice; None where only the request itself can tell, and the edge that has it decides.
    """

    def __init__(self, sentence: str, *, retry_safe: bool | None = None) -> None:
        self.retry_safe = retry_safe
        super().__init__(sentence)


class Internal(UsameterError):
    """A fault of ours. The sentence goes to the log; the caller gets a request id."""
