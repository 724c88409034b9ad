"""Months and moments on the command line."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from usameter_cli.errors import UsageError
from usameter_cli.moments import moment_from_text, month_from_text, period_from_text
from usameter_core.period import Period


def test_a_month_is_its_utc_days() -> None:
    assert month_from_text("2015-12", option="--month") == Period(
        datetime(2015, 12, 1, tzinfo=UTC), datetime(2016, 1, 1, tzinfo=UTC)
    )


@pytest.mark.parametrize("text", ["2015", "2015-13", "2015-00", "0000-01", "9999-12", "2015-5", "May 2015", ""])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--month"):
        month_from_text(text, option="--month")


def test_a_period_is_a_month_or_goes_from_a_day_up_to_another() -> None:
    assert period_from_text("2015-12", option="--period") == month_from_text("2015-12", option="--period")
    expected = Period(datetime(2015, 1, 15, tzinfo=UTC), datetime(2015, 2, 15, tzinfo=UTC))
    # As errors of the API write the bounds, too.
    for text in ("2015-01-15..2015-02-15", "2015-01-15T00:00:00Z..2015-02-15T00:00:00Z"):
        assert period_from_text(text, option="--period") == expected


@pytest.mark.parametrize(
    "text",
    ["2015-01..2015-02", "2015-01-15..", "..2015-02-15", "2015-01-15...2015-02-15", "2015-01-15..2015-01-15", "2015-1"],
)
def test_what_is_no_period_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--period"):
        period_from_text(text, option="--period")


def test_a_day_is_its_midnight_and_a_time_its_moment() -> None:
    assert moment_from_text("2015-05-17", option="--start") == datetime(2015, 5, 17, tzinfo=UTC)
    assert moment_from_text("2015-05-17T02:00:00+02:00", option="--start") == datetime(2015, 5, 17, tzinfo=UTC)


@pytest.mark.parametrize("text", ["2015-05-32", "2015-05-17T10:00:00", "yesterday", "", "0001-01-01T00:00:00+10:00"])
def test_a_time_without_offset_or_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--start"):
        moment_from_text(text, option="--start")
