"""Months and moments as people write them on a command line."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

from usameter_cli.errors import UsageError
from usameter_core.period import Period, day_period, month_of

_MONTH = re.compile(r"(\d{4})-(\d{2})")


def month_from_text(text: str, *, option: str) -> Period:
    """The UTC calendar month that "2015-05" means; `option` is named where it means none."""
    match = _MONTH.fullmatch(text)
    try:
        if match is not None and match[1] != "9999":  # whose last month has no end
            return month_of(datetime(int(match[1]), int(match[2]), 1, tzinfo=UTC))
    except ValueError:
        pass
    raise UsageError(f'{option} must be a month like "2015-05", not {text!r}.')


def period_from_text(text: str, *, option: str) -> Period:
    """The month that "2015-05" means, or the days from one to another, without that one: "2015-05-17..2015-06-17"."""
    start_text, dots, end_text = text.partition("..")
    if not dots:
        return month_from_text(text, option=option)
    period = Period(moment_from_text(start_text, option=option), moment_from_text(end_text, option=option))
    if period.start >= period.end:
        raise UsageError(f"{option} must end after it starts, unlike {text!r}.")
    return period


def day_from_text(text: str, *, option: str) -> date:
    """The day that "2015-05-17" means."""
    try:
        if len(text) == len("2015-05-17"):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise UsageError(f'{option} must be a day like "2015-05-17", not {text!r}.')


def moment_from_text(text: str, *, option: str) -> datetime:
    """The moment that "2015-05-17" (UTC midnight) or an RFC 3339 time means."""
    try:
        if len(text) == len("2015-05-17"):
            return day_period(date.fromisoformat(text)).start
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise UsageError(f'{option} must be a day like "2015-05-17" or a time like "2015-05-17T10:30:00Z", not {text!r}.')
