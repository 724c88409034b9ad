"""What may be concluded of a counter and a HARD limit, on both sides of every boundary."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from usameter_quota.domain.auditing import (
    Binding,
    BoundUse,
    LimitRecord,
    PeriodUse,
    bind_default,
    find_violation,
    most_admitted,
)
from usameter_quota.domain.limits import LimitPeriod

DAY = datetime(2026, 1, 15, tzinfo=UTC)
SINCE = DAY + timedelta(hours=10)
TEN = Decimal(10)
SECOND = timedelta(seconds=1)


def of_day(start: datetime, *, counter: str = "0") -> PeriodUse:
    return PeriodUse("t", "e", start, start + timedelta(days=1), Decimal(counter), SINCE)


def window(*, read_at: datetime) -> PeriodUse:
    today = read_at.replace(hour=0, minute=0, second=0)
    return PeriodUse("t", "e", today - timedelta(days=29), today + timedelta(days=1), Decimal(0), read_at)


def most(since: datetime, recorded: str | None, use: PeriodUse, period: LimitPeriod = LimitPeriod.DAILY) -> str | None:
    counter = None if recorded is None else Decimal(recorded)
    found = most_admitted(BoundUse(Binding(TEN, period, since, counter), use))
    return None if found is None else str(found)


@pytest.mark.parametrize(
    ("start", "recorded", "expected"),
    [
        # The period that holds the moment from which the limit binds.
        (DAY, "4", "10"),
        (DAY, "14", "14"),
        (DAY, None, None),
        # Over before, or just begun then.
        (DAY - timedelta(days=1), "14", None),
        (SINCE, "14", "14"),
        # Use of these may be older than the limit.
        (SINCE + SECOND, "14", None),
        (SINCE + timedelta(hours=1), "14", None),
        (SINCE + timedelta(hours=1, seconds=1), "14", "10"),
        (SINCE + timedelta(hours=1, seconds=1), None, "10"),
    ],
)
def test_a_calendar_period_is_judged_from_the_limit_on(
    start: datetime, recorded: str | None, expected: str | None
) -> None:
    assert most(SINCE, recorded, of_day(start)) == expected


@pytest.mark.parametrize(
    ("read_at", "recorded", "expected"),
    [
        (SINCE, "14", "14"),
        (SINCE, "4", "10"),
        (SINCE - SECOND, "14", None),
        (DAY + timedelta(hours=22, minutes=59), "14", "14"),
        # Another replica may be in the next window already.
        (DAY + timedelta(hours=23), "14", None),
        (DAY + timedelta(days=400), "14", "14"),
        (DAY + timedelta(days=59), None, None),
        (DAY + timedelta(days=60), None, "10"),
    ],
)
def test_the_rolling_window_is_one_period_that_goes_on(
    read_at: datetime, recorded: str | None, expected: str | None
) -> None:
    assert most(SINCE, recorded, window(read_at=read_at), LimitPeriod.ROLLING_30D) == expected


@pytest.mark.parametrize(
    ("deleted_after", "period", "since", "counter"),
    [
        (timedelta(hours=1), LimitPeriod.DAILY, SINCE + timedelta(hours=1), None),
        (timedelta(hours=1, seconds=1), LimitPeriod.DAILY, SINCE + timedelta(hours=1, seconds=1), "14"),
        (timedelta(hours=2), LimitPeriod.MONTHLY, SINCE + timedelta(hours=2), None),
        (timedelta(hours=-2), LimitPeriod.DAILY, SINCE, None),
    ],
)
def test_a_default_binds_a_tenant_once_both_it_is_set_and_the_tenants_own_limit_is_gone(
    deleted_after: timedelta, period: LimitPeriod, since: datetime, counter: str | None
) -> None:
    last = LimitRecord(SINCE + deleted_after, period, Decimal(14))
    bound = bind_default(TEN, LimitPeriod.DAILY, set_at=SINCE, last=last)
    assert bound == Binding(TEN, LimitPeriod.DAILY, since, None if counter is None else Decimal(counter))


@pytest.mark.parametrize(
    ("counter", "raised", "is_one"), [("10", "0", False), ("10.000001", "0", True), ("12", "2", False)]
)
def test_only_what_nothing_else_has_raised_is_a_violation(counter: str, raised: str, is_one: bool) -> None:
    bound = BoundUse(Binding(TEN, LimitPeriod.DAILY, SINCE, Decimal(0)), of_day(DAY, counter=counter))
    found = find_violation(bound, raised=Decimal(raised), changed=False)
    assert (found is not None) == is_one


def test_what_cannot_be_judged_is_no_violation() -> None:
    bound = BoundUse(Binding(TEN, LimitPeriod.DAILY, SINCE, None), of_day(DAY, counter="99"))
    assert find_violation(bound, raised=Decimal(0), changed=False) is None
