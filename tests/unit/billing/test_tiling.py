"""Billing periods: they tile a tenant's time whatever its history of subscriptions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.domain.subscription import Phase, Subscription, subscribed_plan
from usameter_billing.domain.tiling import Tiling
from usameter_core.period import Period, month_of

DAY = timedelta(days=1)
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
PLANS = [
    Plan(uuid4(), f"Plan {number}", Decimal(29), "USD", interval, (), FIRST)
    for number, interval in enumerate([PlanInterval.MONTHLY, PlanInterval.MONTHLY, PlanInterval.YEARLY])
]


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def subscription(start: str, end: str | None = None, *, changes: tuple[str, ...] = ()) -> Subscription:
    phases = [Phase(day(moment), PLANS[index % 2]) for index, moment in enumerate([start, *changes])]
    return Subscription(uuid4(), "acme", day(start), None if end is None else day(end), tuple(phases), day(start))


def tiles(tiling: Tiling, start: str, end: str) -> list[str]:
    """The days on which a period begins, from `start` to `end`."""
    found, moment = [], day(start)
    while moment < day(end):
        found.append(f"{moment:%m-%d}")
        moment = tiling.period_of(moment).end
    return found


def test_without_a_subscription_periods_are_calendar_months() -> None:
    assert Tiling().period_of(day("2026-02-10")) == month_of(day("2026-02-10"))


def test_a_start_cuts_the_calendar_month_and_anchors_the_months_after_it() -> None:
    tiling = Tiling([subscription("2026-01-31")])
    assert tiles(tiling, "2026-01-01", "2026-06-01") == ["01-01", "01-31", "02-28", "03-31", "04-30", "05-31"]


def test_a_change_of_plan_makes_stubs_and_keeps_the_anchor() -> None:
    tiling = Tiling([subscription("2026-01-15", changes=("2026-01-20",))])
    assert tiles(tiling, "2026-01-01", "2026-03-20") == ["01-01", "01-15", "01-20", "02-15", "03-15"]


def test_an_end_cuts_the_month_and_the_calendar_goes_on() -> None:
    tiling = Tiling([subscription("2026-01-15", "2026-02-10")])
    assert tiles(tiling, "2026-01-01", "2026-04-01") == ["01-01", "01-15", "02-10", "03-01"]


def test_a_new_subscription_may_start_where_the_last_one_ended() -> None:
    tiling = Tiling([subscription("2026-01-15", "2026-02-10"), subscription("2026-02-10")])
    assert tiles(tiling, "2026-01-15", "2026-04-01") == ["01-15", "02-10", "03-10"]


def test_one_that_never_began_cuts_and_anchors_nothing() -> None:
    never = subscription("2026-01-20", "2026-01-20")
    assert tiles(Tiling([never]), "2026-01-01", "2026-03-01") == ["01-01", "01-20", "02-01"]
    around = subscription("2026-01-15")
    assert tiles(Tiling([around, never]), "2026-01-15", "2026-03-01") == ["01-15", "01-20", "02-15"]


def test_the_last_ended_period_of_a_month_is_the_one_before_the_one_that_runs() -> None:
    february = day("2026-02-01")
    assert Tiling().last_ended(february) == month_of(day("2026-01-01"))
    anchored = Tiling([subscription("2026-01-15")])
    assert anchored.last_ended(february) == Period(day("2026-01-01"), day("2026-01-15"))
    assert anchored.last_ended(day("2026-03-01")) == Period(day("2026-01-15"), day("2026-02-15"))


def test_taking_a_change_back_at_its_own_moment_keeps_the_period_that_ended_there() -> None:
    changed = subscription("2026-01-15", changes=("2026-01-20", "2026-01-25"))
    back = changed.changed(PLANS[0], day("2026-01-20"))
    assert [phase.plan for phase in back.phases] == [PLANS[0], PLANS[0]]
    assert tiles(Tiling([back]), "2026-01-15", "2026-03-01") == ["01-15", "01-20", "02-15"]
    assert changed.changed(PLANS[0], day("2026-01-19")).phases == changed.phases[:1]


def test_an_end_is_moved_earlier_and_never_later() -> None:
    ended = subscription("2026-01-15", "2026-03-01", changes=("2026-02-01",))
    assert ended.ended(day("2026-04-01")) == ended
    earlier = ended.ended(day("2026-02-01"))
    assert (earlier.end, earlier.phases) == (day("2026-02-01"), ended.phases[:1])
    assert ended.ended(day("2026-01-15")).phases == ended.phases[:1]


@dataclass(frozen=True)
class _Change:
    """What is done to the last subscription, or without one, after some days."""

    days: int
    plan: Plan
    is_cancelled: bool


changes = st.builds(_Change, days=st.integers(0, 70), plan=st.sampled_from(PLANS), is_cancelled=st.booleans())


def replay(history: list[_Change]) -> list[Subscription]:
    """The subscriptions after a history of starts, changes of plan and cancellations."""
    subscriptions: list[Subscription] = []
    moment = FIRST
    for change in history:
        moment += change.days * DAY
        last = subscriptions[-1] if subscriptions else None
        if last is None or last.end is not None:
            subscriptions.append(Subscription(uuid4(), "acme", moment, None, (Phase(moment, change.plan),), FIRST))
        elif change.is_cancelled:
            subscriptions[-1] = last.ended(moment)
        else:
            subscriptions[-1] = last.changed(change.plan, moment)
    return subscriptions


@given(history=st.lists(changes, max_size=8))
def test_periods_tile_all_time_for_any_history_of_starts_changes_and_ends(history: list[_Change]) -> None:
    subscriptions = replay(history)
    tiling = Tiling(subscriptions)
    moment, ends = FIRST - 40 * DAY, []
    until = FIRST + 700 * DAY
    while moment < until:
        period = tiling.period_of(moment)
        assert period.start <= moment < period.end <= period.start + 31 * DAY
        # Whatever moment is asked for, and however it is reached, the answer is the same period.
        assert tiling.period_of(period.start) == tiling.period_of(period.end - DAY) == period
        assert tiling.period_of(period.start - DAY).end == period.start
        # A period is on one plan as a whole, or on none.
        days = [period.start + number * DAY for number in range((period.end - period.start).days)]
        assert len({plan and plan.plan_id for plan in (subscribed_plan(subscriptions, each) for each in days)}) == 1
        moment = period.end
        ends.append(period.end)
    for month in range(12):
        bounds = month_of(FIRST + month * 30.5 * DAY)
        last = tiling.last_ended(bounds.end)
        assert bounds.start < last.end <= bounds.end
        assert tiling.period_of(last.end).end > bounds.end


@given(history=st.lists(changes, max_size=6), more=st.lists(changes, min_size=1, max_size=3))
def test_later_changes_leave_earlier_periods_as_they_were(history: list[_Change], more: list[_Change]) -> None:
    """So what is invoiced is never cut again: changes are refused before the end of the last invoiced period."""
    changed_at = FIRST + sum(change.days for change in [*history, more[0]]) * DAY
    before, after = Tiling(replay(history)), Tiling(replay([*history, *more]))
    moment = FIRST - 40 * DAY
    while (period := before.period_of(moment)).end <= changed_at:
        assert after.period_of(moment) == period
        moment = period.end
