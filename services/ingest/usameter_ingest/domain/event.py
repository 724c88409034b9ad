"""Events: what callers send, made exact and checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

import msgspec

from usameter_core.decimals import (
    DOUBLE_DIGITS,
    QUANTITY_DECIMALS,
    QUANTITY_LIMIT,
    canonical,
    decimal_from_double,
    decimals_of,
    significant_digits_of,
)
from usameter_core.ids import OrgId, new_uuid
from usameter_proof import ledger_format

AHEAD_MAX = timedelta(minutes=5)
# The first moment and the first day that Python knows are minus infinity to PostgreSQL's driver: the day of a rollup,
# which the database makes, would be another than that of its snapshot.
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
ONE = Decimal(1)
_DOUBLE_LIMIT = float(QUANTITY_LIMIT)
_OUT_OF_RANGE = "must be greater than 0 and less than 10^14"


class InvalidQuantity(ValueError):
    """The text says what is wrong, for the field's violation."""


class UsageEvent(msgspec.Struct, frozen=True):
    """One record of use, as it will be stored; its epoch and `ingested_at` are the transaction's to give.

    A struct of msgspec's and no dataclass: a thousand are made at once, and a frozen dataclass takes six times as long.
    """

    event_id: UUID
    tenant_id: str
    event_type: str
    quantity: Decimal
    # The same, canonical.
    quantity_text: str
    # Aware UTC, microseconds.
    occurred_at: datetime
    timestamp_given: bool
    # Canonical JSON.
    metadata: bytes
    idempotency_key: str | None
    request_hash: bytes
    leaf_prefix: bytes
    # What it consumes; neither stored nor hashed.
    reservation_id: str | None = None


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """As much of a stored event as tells whether a request with its id is the same event."""

    event_id: UUID
    request_hash: bytes
    occurred_at: datetime
    timestamp_given: bool
    voided: bool


class CorrectionKind(StrEnum):
    """How a correction changes its event's quantity."""

    VOID = "VOID"
    AMEND = "AMEND"


def new_event(
    *,
    org_id: OrgId,
    tenant_id: str,
    event_type: str,
    quantity: Decimal,
    metadata: bytes,
    idempotency_key: str | None,
    timestamp: datetime | None,
    now: datetime,
    reservation_id: str | None = None,
) -> UsageEvent:
    """An event with its id and hashes.

    With a key the id is the key's: whoever sends it again has the same id. Without one the id is
    new, and sending it again is another event.
    """
    event_id = new_uuid() if idempotency_key is None else ledger_format.event_id_of_key(org_id, idempotency_key)
    quantity_text = canonical(quantity)
    content_hash = ledger_format.request_hash(tenant_id, event_type, quantity_text, metadata)
    occurred_at = now if timestamp is None else timestamp
    return UsageEvent(
        event_id=event_id,
        tenant_id=tenant_id,
        event_type=event_type,
        quantity=quantity,
        quantity_text=quantity_text,
        occurred_at=occurred_at,
        timestamp_given=timestamp is not None,
        metadata=metadata,
        idempotency_key=idempotency_key,
        request_hash=content_hash,
        leaf_prefix=ledger_format.event_leaf_prefix(
            org_id=org_id,
            event_id=event_id,
            content_hash=content_hash,
            occurred_at=occurred_at,
            timestamp_given=timestamp is not None,
            idempotency_key=idempotency_key,
        ),
        reservation_id=reservation_id,
    )


def is_same_event(event: UsageEvent, other: UsageEvent | StoredEvent) -> bool:
    """Whether two events with one id are one: the same content, and time where both gave one."""
    if event.request_hash != other.request_hash:
        return False
    return not (event.timestamp_given and other.timestamp_given) or event.occurred_at == other.occurred_at


def quantity_from_double(value: float) -> Decimal:
    """The quantity that a JSON number stands for, by its shortest decimal form.

    Raises:
        InvalidQuantity: It has more digits than a double carries faithfully, or more than 6 decimals.
    """
    if not 0 < value < _DOUBLE_LIMIT:
        raise InvalidQuantity(_OUT_OF_RANGE)
    if value.is_integer():
        return Decimal(int(value))
    quantity = decimal_from_double(value)
    if significant_digits_of(quantity) > DOUBLE_DIGITS:
        raise InvalidQuantity(f"has more than {DOUBLE_DIGITS} significant digits; send it as quantity_decimal")
    return checked_quantity(quantity)


def checked_quantity(quantity: Decimal) -> Decimal:
    """The quantity itself.

    Raises:
        InvalidQuantity: Not above 0, not below 10^14, or more than 6 decimals. Nothing is rounded.
    """
    if not 0 < quantity < QUANTITY_LIMIT:
        raise InvalidQuantity(_OUT_OF_RANGE)
    if decimals_of(quantity) > QUANTITY_DECIMALS:
        raise InvalidQuantity(f"has more than {QUANTITY_DECIMALS} decimals; nothing is rounded")
    return quantity
