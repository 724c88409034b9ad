"""Spans of UTC time, and all calendar arithmetic there is."""

from __future__ import annotations

from calendar import monthrange
from dataclasses import dataclass
from datetime import MAXYEAR, UTC, date, datetime, time, timedelta


@dataclass(frozen=True, slots=True)
class Period:
    """A half-open span of UTC time, [start, end)."""

    start: datetime
    end: datetime

    @property
    def seconds(self) -> int:
        """Its length; bounds at midnights have no fraction."""
        length = self.end - self.start
        return length.days * 86_400 + length.seconds


def minute_start(moment: datetime) -> datetime:
    """The beginning of the UTC minute that holds the moment."""
    return _in_utc(moment).replace(second=0, microsecond=0)


def hour_start(moment: datetime) -> datetime:
    """The beginning of the UTC hour that holds the moment."""
    return _in_utc(moment).replace(minute=0, second=0, microsecond=0)


def day_start(moment: datetime) -> datetime:
    """The beginning of a moment's UTC day."""
    return hour_start(moment).replace(hour=0)


def latest_time_of_day(at: time, moment: datetime) -> datetime:
    """The last moment not after another one at which it was that time of day, in UTC."""
    today = day_start(moment).replace(hour=at.hour, minute=at.minute)
    return today if today <= moment else today - timedelta(days=1)


def _in_utc(moment: datetime) -> datetime:
    # Nearly all moments are in UTC already, and converting one takes as long as all the rest.
    return moment if moment.tzinfo is UTC else moment.astimezone(UTC)


def month_of(moment: datetime) -> Period:
    """The calendar month, in UTC, that holds the moment."""
    start = hour_start(moment).replace(day=1, hour=0)
    return Period(start, (start + timedelta(days=31)).replace(day=1))


def add_months(moment: datetime, months: int) -> datetime:
    """The same day and time of day `months` later, or the last day of a month that has no such day.

    Counting goes from one remembered day, 31 January: 28 February, 31 March. Adding a month to each
    result would stay at the 28th.

    Raises:
        OverflowError: It is beyond the calendar.
    """
    years, month = divmod(moment.month - 1 + months, 12)
    year = moment.year + years
    if not 1 <= year <= MAXYEAR:
        raise OverflowError("date value out of range")
    return moment.replace(year=year, month=month + 1, day=min(moment.day, monthrange(year, month + 1)[1]))


def anchored_period(anchor: datetime, moment: datetime, *, months: int) -> Period:
    """Of the spans of `months` months that are counted from `anchor`, the one that holds the moment.

    Raises:
        OverflowError: It ends beyond the calendar.
    """
    passed = (moment.year - anchor.year) * 12 + moment.month - anchor.month
    count = passed // months
    if add_months(anchor, count * months) > moment:
        count -= 1
    return Period(add_months(anchor, count * months), add_months(anchor, (count + 1) * months))


def day_period(day: date) -> Period:
    """The whole of a UTC day."""
    start = datetime.combine(day, time(0), UTC)
    return Period(start, start + timedelta(days=1))


def format_timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC: "2026-01-15T10:30:00Z", with microseconds where there are any."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
