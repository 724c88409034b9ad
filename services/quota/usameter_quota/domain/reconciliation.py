"""Counters beside what is stored: what they should be, and where they are something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

from usameter_core.decimals import CONTEXT
from usameter_core.ids import ReservationId
from usameter_core.period import day_start
from usameter_quota.domain.admission import Adjustment, UsageItem

_ZERO = Decimal(0)


class CounterUnit(StrEnum):
    """What a counter is of."""

    HOUR = "HOUR"
    DAY = "DAY"


@dataclass(frozen=True, slots=True)
class CounterKey:
    """One counter; `start` is that of its UTC hour or day."""

    tenant_id: str
    event_type: str
    unit: CounterUnit
    start: datetime


@dataclass(frozen=True, slots=True)
class HeldItem:
    """What an open reservation holds of one hour."""

    reservation_id: ReservationId
    item: UsageItem


@dataclass(frozen=True, slots=True)
class StuckReservation:
    """A reservation that nobody has settled for a while."""

    reservation_id: ReservationId
    created_at: datetime
    items: Sequence[UsageItem]


@dataclass(frozen=True, slots=True)
class Stored:
    """What the ledger says of some counters, in one snapshot.

    Attributes:
        entries: Sums of entries; a counter that is absent has none.
        committed: Reservations whose entries are among them.
        given_back: What corrections among them give back, and ingest has not heard to be counted.
    """

    entries: Mapping[CounterKey, Decimal]
    committed: Set[ReservationId]
    given_back: Sequence[Adjustment]


@dataclass(frozen=True, slots=True)
class Difference:
    """A counter that is wrong; `expected` is what it should be. In units.

    Attributes:
        reserved: What open reservations hold whose entries are not stored.
    """

    key: CounterKey
    counter: Decimal
    entries: Decimal
    reserved: Decimal
    expected: Decimal


def find_differences(
    counters: Mapping[CounterKey, Decimal], held: Sequence[HeldItem], stored: Stored, *, adjusted: Set[UUID]
) -> list[Difference]:
    """Those of the counters that are not entries + unconsumed reservations (invariant I4).

    It is exact where the heads of the counters were locked before `held` was read and are still, and
    `stored` is a snapshot of the time between. Entries of whoever reserved before the lock are either
    stored in it, or their reservation is among `held`: it is settled only after its entries are
    committed. Whoever reserves later waits for the lock.

    Args:
        counters: All that are asked for; 0 where there is no row.
        held: What is open on their heads.
        adjusted: Those of `stored.given_back` that are counted.
    """
    reserved: dict[CounterKey, Decimal] = defaultdict(Decimal)
    for each in held:
        if each.reservation_id not in stored.committed:
            for key in _keys_of(each.item.tenant_id, each.item.event_type, each.item.hour):
                reserved[key] = CONTEXT.add(reserved[key], each.item.quantity)
    awaited: dict[CounterKey, Decimal] = defaultdict(Decimal)
    for given_back in stored.given_back:
        if given_back.adjustment_id not in adjusted:
            for key in _keys_of(given_back.tenant_id, given_back.event_type, given_back.hour):
                awaited[key] = CONTEXT.subtract(awaited[key], given_back.quantity)
    differences = []
    for key, counter in counters.items():
        entries = stored.entries.get(key, _ZERO)
        expected = CONTEXT.add(CONTEXT.add(entries, reserved[key]), awaited[key])
        if counter != expected:
            differences.append(Difference(key, counter, entries, reserved[key], expected))
    return differences


def _keys_of(tenant_id: str, event_type: str, hour: datetime) -> tuple[CounterKey, CounterKey]:
    """The two counters that a quantity of an hour is counted in."""
    return (
        CounterKey(tenant_id, event_type, CounterUnit.HOUR, hour),
        CounterKey(tenant_id, event_type, CounterUnit.DAY, day_start(hour)),
    )
