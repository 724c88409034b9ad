"""Base fees: charged in advance for each interval of a plan, for the seconds that the tenant is on it.

A subject of their own, like the use of an event type in a period: one a subscription, plan and interval.
A line is what is due of it less what was billed, so whoever cancels or changes the plan within an interval
that was charged gets the rest back by a line, and however often that happens the lines of the subject add
up to the fee for its seconds, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from usameter_billing.domain.invoice import BilledLine, DueLine, FeeCharge, LineKind
from usameter_billing.domain.plan import Plan
from usameter_billing.domain.subscription import Subscription
from usameter_core.decimals import CONTEXT, exact_sum
from usameter_core.period import Period, anchored_period
from usameter_proof.rating import prorated_fee

# (subscription, plan, start of the interval): what fees are due and billed for.
Subject = tuple[UUID, UUID, datetime]


@dataclass(frozen=True, slots=True)
class BilledFee:
    """What was billed of a plan's fee for an interval.

    Attributes:
        lines: Finalized, oldest first, void ones left out; at least one.
        tax_rate: Percent; that of the oldest of them.
    """

    subscription_id: UUID
    plan: Plan
    interval: Period
    lines: tuple[BilledLine, ...]
    tax_rate: Decimal

    @property
    def subject(self) -> Subject:
        """What it is about."""
        return self.subscription_id, self.plan.plan_id, self.interval.start


@dataclass(frozen=True, slots=True)
class _Due:
    """`seconds` of the interval are on the plan, the first of them at `begins`."""

    subscription_id: UUID
    plan: Plan
    interval: Period
    seconds: int
    begins: datetime


def due_fee_lines(
    subscriptions: Sequence[Subscription], billed: Sequence[BilledFee], *, until: datetime, tax_rate: Decimal
) -> list[DueLine]:
    """The lines of all fees that begin by `until` and are not what was billed of them; by interval.

    Args:
        subscriptions: Of one tenant.
        billed: All that was billed of the tenant's base fees.
        until: The end of the invoiced period: the fee of the interval that begins there is on its invoice.
        tax_rate: Percent, for what was not billed before.
    """
    due: dict[Subject, _Due] = {}
    for subscription in subscriptions:
        _add_due(due, subscription, until=until)
    known = {fee.subject: fee for fee in billed}
    for subject, fee in known.items():
        # Billed, and then cancelled or changed from its very beginning: nothing of it is due.
        due.setdefault(subject, _Due(fee.subscription_id, fee.plan, fee.interval, 0, fee.interval.start))
    ordered = sorted(due.items(), key=lambda item: (item[1].interval.start, item[1].begins, item[0]))
    lines = [_line(each, known.get(subject), tax_rate) for subject, each in ordered if each.begins <= until]
    return [line for line in lines if line.amount]


def _add_due(due: dict[Subject, _Due], subscription: Subscription, *, until: datetime) -> None:
    for span in subscription.spans():
        months = span.plan.interval.months
        moment = span.start
        while span.end is None or moment < span.end:
            interval = anchored_period(subscription.start, moment, months=months)
            # An interval that has begun counts whole, also where the tenant leaves the plan and comes back.
            if interval.start > until:
                break
            end = interval.end if span.end is None else min(interval.end, span.end)
            subject = (subscription.subscription_id, span.plan.plan_id, interval.start)
            first = due.setdefault(subject, _Due(subscription.subscription_id, span.plan, interval, 0, moment))
            due[subject] = replace(first, seconds=first.seconds + Period(moment, end).seconds)
            moment = end


def _line(due: _Due, billed: BilledFee | None, tax_rate: Decimal) -> DueLine:
    plan = due.plan
    rated = prorated_fee(plan.base_fee, plan.currency, seconds=due.seconds, interval_seconds=due.interval.seconds)
    before = billed.lines if billed else ()
    return DueLine(
        kind=LineKind.TRUE_UP if billed else LineKind.BASE_FEE,
        period=due.interval,
        charge=FeeCharge(due.subscription_id, plan, due.seconds),
        tax_rate=billed.tax_rate if billed else tax_rate,
        rated_amount=rated,
        amount=CONTEXT.subtract(rated, exact_sum(line.amount for line in before)),
        previously_billed=before,
        snapshot_ids=(),
    )
