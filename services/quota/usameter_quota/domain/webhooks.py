"""Messages to webhook endpoints: what they say, how they are signed, when they are sent again.

Signed as Standard Webhooks 1.0.0 (https://www.standardwebhooks.com) has it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NewType
from uuid import UUID

import msgspec

from usameter_core.decimals import canonical
from usameter_core.ids import OrgId
from usameter_core.period import format_timestamp
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventType

WebhookEndpointId = NewType("WebhookEndpointId", UUID)

ENDPOINT_ID_PREFIX = "whe"
SECRET_BYTES = 32
# Together the pauses are some 27 hours: an endpoint may be away for a day.
ATTEMPTS_MAX = 10
_FIRST_PAUSE = timedelta(seconds=10)
_PAUSE_FACTOR = 3.0

MESSAGE_TYPES = {f"quota.{each.value.lower()}": each for each in QuotaEventType}
_TYPE_NAMES = {each: name for name, each in MESSAGE_TYPES.items()}


@dataclass(frozen=True, slots=True)
class WebhookEndpoint:
    """Where an organization wants to be told; `types` is empty for all."""

    endpoint_id: WebhookEndpointId
    url: str
    types: tuple[QuotaEventType, ...]
    description: str
    created_at: datetime
    disabled_at: datetime | None


class DeliveryState(StrEnum):
    """What became of a message."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A message that was sent, or could not be: either a status code or an error."""

    attempted_at: datetime
    duration_ms: int
    status_code: int | None
    error: str | None

    @property
    def is_success(self) -> bool:
        """The endpoint has taken the message."""
        return self.status_code is not None and 200 <= self.status_code < 300

    @property
    def is_gone(self) -> bool:
        """The endpoint wants no message any more."""
        return self.status_code == 410


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message to one endpoint, with its attempts, the oldest first."""

    position: int
    type: QuotaEventType
    state: DeliveryState
    created_at: datetime
    next_attempt_at: datetime | None
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """A message that is to be sent now.

    Attributes:
        secrets: Those in force, the newest first.
        attempt_count: How many attempts there were before.
    """

    org_id: OrgId
    endpoint_id: WebhookEndpointId
    url: str
    secrets: tuple[bytes, ...] = field(repr=False)
    attempt_count: int
    event: QuotaEvent


def message_type(event_type: QuotaEventType) -> str:
    """The `type` of a message, e.g. "quota.limit_reached"."""
    return _TYPE_NAMES[event_type]


def message_id(endpoint_id: WebhookEndpointId, position: int) -> str:
    """The same for every attempt, and for no other message. It has no full stop, which ends it in what is signed."""
    return f"msg_{endpoint_id.hex}_{position}"


def message_body(event: QuotaEvent) -> bytes:
    """The JSON that is sent; its `data` is the quota event as the REST API shows it."""
    data: dict[str, object] = {
        "position": event.position,
        "type": event.type.value,
        "tenant_id": event.tenant_id,
        "event_type": event.event_type,
        "occurred_at": format_timestamp(event.occurred_at),
        "limit_value": canonical(event.limit_value),
        "enforcement_mode": event.enforcement_mode.value,
        "period": event.period.value,
        "soft_limit_percent": event.soft_limit_percent,
        "period_start": format_timestamp(event.period_start),
        "period_end": format_timestamp(event.period_end),
        "stored": canonical(event.stored),
    }
    if event.grace_ends_at is not None:
        data["grace_ends_at"] = format_timestamp(event.grace_ends_at)
    return msgspec.json.encode({"type": message_type(event.type), "timestamp": data["occurred_at"], "data": data})


def signed_headers(body: bytes, *, message_id: str, secrets: Sequence[bytes], sent_at: datetime) -> dict[str, str]:
    """The headers by which an endpoint knows whom a body is from, and when this attempt was made.

    Args:
        body: As it is sent.
        message_id: Without a full stop.
        secrets: One signature each.
        sent_at: Of the attempt; cut to the second.
    """
    timestamp = str(int(sent_at.timestamp()))
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(secret, content, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def secret_text(secret: bytes) -> str:
    """A secret as its owner keeps it."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def pause_after(attempt_count: int, *, jitter: float) -> timedelta | None:
    """How long to wait after that many failed attempts; None: no more of them.

    10 s, 30 s, 90 s, … 18 h, each a quarter more or less, so that what failed together does not come
    back together.

    Args:
        attempt_count: At least 1.
        jitter: At random from [0, 1).
    """
    if attempt_count >= ATTEMPTS_MAX:
        return None
    return _FIRST_PAUSE * _PAUSE_FACTOR ** (attempt_count - 1) * (0.75 + jitter / 2)
