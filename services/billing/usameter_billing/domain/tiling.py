"""The billing periods of a tenant: they tile its time, without gap or overlap, whatever its history."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from usameter_billing.domain.subscription import Subscription
from usameter_core.period import Period, anchored_period, month_of

_INSTANT = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class _Cut:
    """A moment at which a period begins, and what the months after it are counted from; None: the calendar."""

    moment: datetime
    anchor: datetime | None


class Tiling:
    """Calendar months, or months counted from the start of a subscription while there is one.

    Its start, its end and each of its phases begin a period, so the one before is cut short: each period
    lies on one plan or on none.

    Args:
        subscriptions: Of one tenant; they do not overlap.
    """

    def __init__(self, subscriptions: Sequence[Subscription] = ()) -> None:
        moments = {phase.start for each in subscriptions for phase in each.phases}
        # One that never began cuts all the same: the period that ends there may be invoiced.
        moments |= {each.end for each in subscriptions if each.end is not None}
        self._cuts = [
            _Cut(moment, next((each.start for each in subscriptions if each.holds(moment)), None))
            for moment in sorted(moments)
        ]

    def period_of(self, moment: datetime) -> Period:
        """The billing period that holds the moment.

        Raises:
            OverflowError: It ends beyond the calendar.
        """
        index = bisect_right(self._cuts, moment, key=lambda cut: cut.moment)
        last = self._cuts[index - 1] if index else None
        if last is None or last.anchor is None:
            month = month_of(moment)
        else:
            month = anchored_period(last.anchor, moment, months=1)
        start = month.start if last is None else max(month.start, last.moment)
        end = min([month.end, *(cut.moment for cut in self._cuts[index : index + 1])])
        return Period(start, end)

    def last_ended(self, by: datetime) -> Period:
        """The last billing period that ends at `by` or before."""
        period = self.period_of(by - _INSTANT)
        return period if period.end <= by else self.period_of(period.start - _INSTANT)
