"""What a counter should be: entries, what is reserved and not stored, and what is given back and not taken off yet."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID, uuid4

from usameter_core.ids import ReservationId
from usameter_quota.domain.admission import Adjustment, UsageItem
from usameter_quota.domain.reconciliation import (
    CounterKey,
    CounterUnit,
    Difference,
    HeldItem,
    Stored,
    find_differences,
)

DAY = datetime(2026, 1, 15, tzinfo=UTC)
HOUR = DAY.replace(hour=10)
OF_HOUR = CounterKey("t", "e", CounterUnit.HOUR, HOUR)
OF_DAY = CounterKey("t", "e", CounterUnit.DAY, DAY)
OPEN = ReservationId(uuid4())


def held(quantity: str, *, hour: datetime = HOUR, tenant_id: str = "t") -> HeldItem:
    return HeldItem(OPEN, UsageItem(tenant_id, "e", hour, Decimal(quantity)))


def given_back(quantity: str, adjustment_id: UUID) -> Adjustment:
    return Adjustment(adjustment_id, "t", "e", HOUR, Decimal(quantity))


def differences(
    counters: dict[CounterKey, str],
    *items: HeldItem,
    entries: dict[CounterKey, str] | None = None,
    committed: bool = False,
    back: tuple[Adjustment, ...] = (),
    adjusted: frozenset[UUID] = frozenset(),
) -> list[Difference]:
    stored = Stored(
        entries={key: Decimal(value) for key, value in (entries or {}).items()},
        committed={OPEN} if committed else set(),
        given_back=back,
    )
    return find_differences({key: Decimal(value) for key, value in counters.items()}, items, stored, adjusted=adjusted)


def test_entries_and_what_is_reserved_add_up_in_the_hour_and_in_its_day() -> None:
    items = held("2"), held("3", hour=DAY), held("100", tenant_id="other")
    assert differences({OF_HOUR: "7", OF_DAY: "15"}, *items, entries={OF_HOUR: "5", OF_DAY: "10"}) == []
    assert differences({OF_HOUR: "6.999999"}, *items, entries={OF_HOUR: "5"}) == [
        Difference(OF_HOUR, Decimal("6.999999"), Decimal(5), Decimal(2), Decimal(7))
    ]


def test_what_is_stored_is_not_reserved_besides() -> None:
    assert differences({OF_HOUR: "5"}, held("2"), entries={OF_HOUR: "5"}, committed=True) == []


def test_what_is_given_back_is_expected_to_be_counted_until_it_is_taken_off() -> None:
    back = given_back("-2", uuid4())
    assert differences({OF_HOUR: "5", OF_DAY: "5"}, entries={OF_HOUR: "3", OF_DAY: "3"}, back=(back,)) == []
    taken_off = frozenset({back.adjustment_id})
    assert differences({OF_HOUR: "3"}, entries={OF_HOUR: "3"}, back=(back,), adjusted=taken_off) == []


def test_a_counter_that_nothing_is_known_of_should_be_zero() -> None:
    assert differences({OF_HOUR: "0"}) == []
    assert [each.expected for each in differences({OF_HOUR: "0.000001"})] == [Decimal(0)]


def test_the_largest_sums_are_exact() -> None:
    large = "999999999999999999999999.999999"
    (difference,) = differences({OF_HOUR: large}, held("0.000002"), entries={OF_HOUR: large})
    assert difference.expected == Decimal("1000000000000000000000000.000001")
