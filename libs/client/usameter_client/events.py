"""A usage event as the application records it, checked where it is made.

What is checked here is what could not be carried exactly, so that the mistake shows at its own
line. Everything else (patterns, quotas, keys) the server judges.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TypeAlias

from usameter_client.errors import InvalidEvent
from usameter_core.decimals import QUANTITY_DECIMALS, QUANTITY_LIMIT, decimal_from_double, decimals_of
from usameter_core.ids import new_uuid

Json: TypeAlias = "str | int | float | bool | Mapping[str, Json] | list[Json] | tuple[Json, ...] | None"

METADATA_LEVELS_MAX = 32
# The server takes 16 KiB of metadata, and 555 characters beside it. With this bound the buffer's, which
# holds events encoded, is one of memory too.
EVENT_BYTES_MAX = 32 * 1024
# protobuf's Struct carries numbers as doubles: a larger integer would arrive as another one.
EXACT_INTEGER_MAX = 2**53


@dataclass(frozen=True, slots=True)
class UsageEvent:
    """One record of use; made by `usage_event`.

    `timestamp` None means that the server dates the event when it arrives.
    """

    event_type: str
    tenant_id: str
    quantity: Decimal
    idempotency_key: str
    timestamp: datetime | None
    metadata: Mapping[str, Json] | None
    reservation_id: str | None = None


def usage_event(
    event_type: str,
    *,
    tenant_id: str,
    quantity: int | float | Decimal,
    idempotency_key: str | None,
    timestamp: datetime | None,
    metadata: Mapping[str, Json] | None,
    now: datetime,
    reservation_id: str | None = None,
) -> UsageEvent:
    """An event that can be sent as often as need be: it has a key.

    Args:
        quantity: Above 0, below 10^14, at most 6 decimals. A float counts as its shortest decimal form.
        idempotency_key: None: a fresh one.
        timestamp: When it happened, aware. None: `now` where the key is fresh. Beside a key of the
            caller's it stays open: the application may record that key again, at another time, and
            two times would make the second a conflict instead of a duplicate.
        metadata: A JSON object; copied, so that later changes to it do not matter.
        now: The present moment.
        reservation_id: Of the quota that was reserved for it; the event consumes it.

    Raises:
        InvalidEvent: A value cannot be carried exactly.
    """
    if timestamp is not None and timestamp.tzinfo is None:
        raise InvalidEvent("timestamp has no time zone: an hour's guess could move use to another month")
    if idempotency_key is None:
        idempotency_key = new_uuid().hex
        timestamp = timestamp or now
    return UsageEvent(
        event_type=event_type,
        tenant_id=tenant_id,
        quantity=_exact_quantity(quantity),
        idempotency_key=idempotency_key,
        timestamp=None if timestamp is None else timestamp.astimezone(UTC),
        metadata=None if metadata is None else {name: _copied(value, 1) for name, value in _items(metadata)},
        reservation_id=reservation_id,
    )


def _exact_quantity(value: int | float | Decimal) -> Decimal:
    quantity = decimal_from_double(value) if isinstance(value, float) else Decimal(value)
    if not (quantity.is_finite() and 0 < quantity < QUANTITY_LIMIT):
        raise InvalidEvent(f"quantity {value} is not above 0 and below 10^14")
    if not isinstance(value, int) and decimals_of(quantity) > QUANTITY_DECIMALS:
        raise InvalidEvent(f"quantity {value} has more than {QUANTITY_DECIMALS} decimals; round it first")
    return quantity


def _copied(value: Json, level: int) -> Json:
    if level > METADATA_LEVELS_MAX:
        raise InvalidEvent(f"metadata is nested deeper than {METADATA_LEVELS_MAX} levels")
    match value:
        case None | bool() | str():
            return value
        case int():
            if abs(value) > EXACT_INTEGER_MAX:
                raise InvalidEvent("metadata has an integer beyond 2^53; send it as a string")
            return value
        case float():
            if not math.isfinite(value):
                raise InvalidEvent("metadata has a number that JSON does not know (NaN or infinity)")
            return value
        case Mapping():
            return {name: _copied(each, level + 1) for name, each in _items(value)}
        case list() | tuple():
            return [_copied(each, level + 1) for each in value]
    raise InvalidEvent(f"metadata has a {type(value).__name__}, which JSON does not know")


def _items(value: Mapping[str, Json]) -> list[tuple[str, Json]]:
    if not all(isinstance(name, str) for name in value):
        raise InvalidEvent("metadata has a name that is not a string")
    return list(value.items())
