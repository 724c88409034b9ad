"""Events: quantities are exact or refused, and content tells a duplicate from a conflict."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_core.ids import OrgId
from usameter_ingest.domain.event import (
    InvalidQuantity,
    UsageEvent,
    checked_quantity,
    is_same_event,
    new_event,
    quantity_from_double,
)

ORG = OrgId(UUID(int=1))
NOW = datetime(2026, 1, 15, tzinfo=UTC)


def event(
    key: str | None = "k", quantity: str = "1", timestamp: datetime | None = None, now: datetime = NOW
) -> UsageEvent:
    return new_event(
        org_id=ORG,
        tenant_id="t",
        event_type="e",
        quantity=Decimal(quantity),
        metadata=b"{}",
        idempotency_key=key,
        timestamp=timestamp,
        now=now,
    )


@pytest.mark.parametrize(
    ("number", "quantity"),
    [
        (1.0, "1"),
        (0.1, "0.1"),
        (1e-6, "0.000001"),
        (123456789.123456, "123456789.123456"),
        (99999999999999.0, "99999999999999"),
    ],
)
def test_a_number_is_read_by_its_shortest_decimal_form(number: float, quantity: str) -> None:
    assert quantity_from_double(number) == Decimal(quantity)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (1e-7, "6 decimals"),
        (0.1234567, "6 decimals"),
        (1234567890.123456, "15 significant digits"),
        (0.30000000000000004, "15 significant digits"),
        (1e14, "less than 10"),
        (0.0, "greater than 0"),
        (-1.0, "greater than 0"),
    ],
)
def test_a_number_that_would_have_to_be_rounded_is_refused(number: float, sentence: str) -> None:
    with pytest.raises(InvalidQuantity, match=sentence):
        quantity_from_double(number)


def test_bounds_of_a_decimal_quantity() -> None:
    assert checked_quantity(Decimal("99999999999999.999999")) == Decimal("99999999999999.999999")
    assert checked_quantity(Decimal("0.000001")) == Decimal("0.000001")
    for refused in ("100000000000000", "0", "0.0000001"):
        with pytest.raises(InvalidQuantity):
            checked_quantity(Decimal(refused))


@given(st.decimals(min_value="0.000001", max_value="999999999", places=6))
def test_every_quantity_of_15_digits_survives_the_trip_through_a_double(quantity: Decimal) -> None:
    assert quantity_from_double(float(quantity)) == quantity


def test_same_key_has_the_same_id_and_without_a_key_every_event_is_new() -> None:
    assert event("a").event_id == event("a").event_id
    assert event("a").event_id != event("b").event_id
    assert event(None).event_id != event(None).event_id


def test_quantity_is_compared_by_value_not_by_spelling() -> None:
    assert is_same_event(event(quantity="1.50"), event(quantity="1.5"))
    assert not is_same_event(event(quantity="1.5"), event(quantity="1.51"))


def test_a_retry_without_timestamp_is_the_same_event_at_another_time() -> None:
    assert is_same_event(event(), event(now=NOW + timedelta(minutes=1)))
    assert is_same_event(event(timestamp=NOW), event(now=NOW + timedelta(minutes=1)))


def test_two_given_timestamps_have_to_agree() -> None:
    assert is_same_event(event(timestamp=NOW), event(timestamp=NOW))
    assert not is_same_event(event(timestamp=NOW), event(timestamp=NOW + timedelta(microseconds=1)))
