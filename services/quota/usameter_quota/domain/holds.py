"""Holds: reservations that a customer makes before costly work, and an event consumes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from usameter_core.ids import OrgId, ReservationId, uuid_of
from usameter_quota.domain.admission import Finding

TTL_DEFAULT = timedelta(minutes=15)
_ID_DOMAIN = b"usameter.reservation.v1"


class HoldState(StrEnum):
    """What has become of a hold; all but HELD are for ever."""

    HELD = "HELD"
    CONSUMED = "CONSUMED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"


@dataclass(frozen=True, slots=True)
class HoldTerms:
    """What is asked for; two requests with one id must ask for the same. Quantity > 0, at most 6 decimals."""

    tenant_id: str
    event_type: str
    quantity: Decimal
    ttl: timedelta


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold as its id knows it.

    Attributes:
        public_id: Of the customer's choice, or ours.
        claimed: HELD, and an event that names it is being recorded.
        terms: None where it was cancelled before it was made.
        created_at: Of one that was cancelled before it was made: when that was.
        warnings: What making it was told.
    """

    public_id: str
    state: HoldState
    claimed: bool
    terms: HoldTerms | None
    created_at: datetime
    warnings: list[Finding]


def hold_id_of(org_id: OrgId, public_id: str) -> ReservationId:
    """The id of the hold that customers know by `public_id`: as an event's of its key, 16 bytes of a SHA-256."""
    return ReservationId(uuid_of(hashlib.sha256(_ID_DOMAIN + org_id.bytes + public_id.encode()).digest()[:16]))
