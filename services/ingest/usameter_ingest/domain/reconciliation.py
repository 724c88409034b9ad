"""Quota counters as ingest sees them: what they are of, and how they differ from the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum

from usameter_core.ids import ReservationId


class CounterUnit(StrEnum):
    """What a counter is of."""

    HOUR = "HOUR"
    DAY = "DAY"


@dataclass(frozen=True, slots=True, order=True)
class CounterKey:
    """One counter; `start` is that of its UTC hour or day.

    Keys of one unit are in order by tenant, event type and start: texts by their bytes in UTF-8, as
    the database has them, which is the order of their characters.
    """

    tenant_id: str
    event_type: str
    unit: CounterUnit
    start: datetime

    @classmethod
    def first(cls, unit: CounterUnit) -> CounterKey:
        """The key before every other of its unit."""
        return cls("", "", unit, datetime.min.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class Difference:
    """A counter that is wrong, in units; `expected` is what it should be.

    Attributes:
        reserved: What open reservations hold whose entries are not stored.
        fixed: It has been set to what it should be.
    """

    key: CounterKey
    counter: Decimal
    entries: Decimal
    reserved: Decimal
    expected: Decimal
    fixed: bool


@dataclass(frozen=True, slots=True)
class HeldQuantity:
    """What a reservation holds of one UTC hour."""

    tenant_id: str
    event_type: str
    hour: datetime
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class StuckReservation:
    """A reservation that has been open for longer than settling takes."""

    reservation_id: ReservationId
    created_at: datetime
    held: Sequence[HeldQuantity]
