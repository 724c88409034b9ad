"""Calendar arithmetic: months that are counted from a remembered day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_core.period import Period, add_months, anchored_period, month_of

midnights = st.integers(-10_000, 30_000).map(lambda days: datetime(2000, 1, 1, tzinfo=UTC) + timedelta(days=days))


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def bounds(anchor: str, moment: str, *, months: int = 1) -> tuple[str, str]:
    period = anchored_period(day(anchor), day(moment), months=months)
    return period.start.date().isoformat(), period.end.date().isoformat()


@pytest.mark.parametrize(
    ("months", "expected"),
    [
        (1, "2026-02-28"),
        (2, "2026-03-31"),
        (3, "2026-04-30"),
        (13, "2027-02-28"),
        (25, "2028-02-29"),
        (-2, "2025-11-30"),
    ],
)
def test_the_31st_of_a_shorter_month_is_its_last_day_and_is_remembered(months: int, expected: str) -> None:
    assert add_months(day("2026-01-31"), months) == day(expected)


def test_the_29th_of_february_comes_back_in_a_leap_year() -> None:
    assert [add_months(day("2024-02-29"), 12 * years) for years in (1, 2, 3, 4)] == [
        day("2025-02-28"),
        day("2026-02-28"),
        day("2027-02-28"),
        day("2028-02-29"),
    ]


def test_months_beyond_the_calendar_are_an_overflow() -> None:
    assert add_months(day("9999-11-30"), 1) == day("9999-12-30")
    for moment, months in ((day("9999-12-30"), 1), (day("0001-01-30"), -1)):
        with pytest.raises(OverflowError):
            add_months(moment, months)


def test_anchored_months_begin_on_the_anchors_day() -> None:
    assert bounds("2026-01-31", "2026-02-27") == ("2026-01-31", "2026-02-28")
    assert bounds("2026-01-31", "2026-02-28") == ("2026-02-28", "2026-03-31")
    assert bounds("2026-01-31", "2026-03-30") == ("2026-02-28", "2026-03-31")
    assert bounds("2026-01-31", "2026-03-31") == ("2026-03-31", "2026-04-30")
    assert bounds("2026-01-15", "2025-12-31") == ("2025-12-15", "2026-01-15")


def test_anchored_years_begin_on_the_anchors_day() -> None:
    assert bounds("2024-02-29", "2025-02-27", months=12) == ("2024-02-29", "2025-02-28")
    assert bounds("2024-02-29", "2025-02-28", months=12) == ("2025-02-28", "2026-02-28")
    assert bounds("2024-02-29", "2028-02-29", months=12) == ("2028-02-29", "2029-02-28")


@given(anchor=midnights, moment=midnights, months=st.sampled_from([1, 12]))
def test_anchored_spans_hold_their_moments_and_follow_on_each_other(
    anchor: datetime, moment: datetime, months: int
) -> None:
    span = anchored_period(anchor, moment, months=months)
    assert span.start <= moment < span.end
    assert anchored_period(anchor, span.start, months=months) == span
    assert anchored_period(anchor, span.end, months=months).start == span.end
    assert anchored_period(anchor, span.start - timedelta(microseconds=1), months=months).end == span.start


@given(moment=midnights)
def test_months_anchored_to_a_first_are_calendar_months(moment: datetime) -> None:
    assert anchored_period(day("2026-01-01"), moment, months=1) == month_of(moment)


def test_the_seconds_of_a_period_are_those_of_its_days() -> None:
    assert month_of(day("2026-01-05")).seconds == 31 * 86_400
    assert Period(day("2024-02-29"), day("2028-02-29")).seconds == 1461 * 86_400
