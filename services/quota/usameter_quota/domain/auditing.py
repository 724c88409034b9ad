"""Whether a HARD limit was kept: what counters, and what changes of limits recorded of them, allow to conclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from usameter_core.audit import Violation
from usameter_core.decimals import CONTEXT, canonical
from usameter_core.period import format_timestamp
from usameter_quota.domain.limits import LimitPeriod

# How far apart a time that is stored and what happened then may be, with much to spare: events are dated up to five
# minutes ahead, a change of a limit has waited for its lock since it was asked for, and clocks of replicas differ.
TIMES_DIFFER_MAX = timedelta(hours=1)
# A hold from before a limit was set can be claimed after it, and moves within the rolling window then. It expires
# after a day; a claim of it that nobody settles, which is all that keeps it longer, is itself found by the audit.
_HOLDS_KEPT_MAX = timedelta(days=30)

_NAMES = {
    LimitPeriod.HOURLY: "an hour",
    LimitPeriod.DAILY: "a day",
    LimitPeriod.MONTHLY: "a month",
    LimitPeriod.ROLLING_30D: "30 days",
}


class Stage(StrEnum):
    """What is audited, in this order: counters under the limits in force, and what changes of limits recorded."""

    IN_FORCE = "in_force"
    CHANGES = "changes"


@dataclass(frozen=True, slots=True)
class AuditPlace:
    """Where a page of the audit begins: behind this head, and in CHANGES behind this change of it."""

    stage: Stage = Stage.IN_FORCE
    tenant_id: str = ""
    event_type: str = ""
    version: int = 0


@dataclass(frozen=True, slots=True)
class Audited:
    """What a page came to; `next_place` is None once everything is compared."""

    checked: int
    violations: Sequence[Violation]
    next_place: AuditPlace | None


@dataclass(frozen=True, slots=True)
class LimitRecord:
    """A change of a tenant's own limit: of which period it recorded the counter."""

    changed_at: datetime
    period: LimitPeriod
    counter: Decimal


@dataclass(frozen=True, slots=True)
class Binding:
    """A HARD limit as it binds a tenant.

    Attributes:
        since: When it began to.
        counter: Of the period that holds `since`, as it was when it began to; None: nobody recorded it.
    """

    limit_value: Decimal
    period: LimitPeriod
    since: datetime
    counter: Decimal | None


@dataclass(frozen=True, slots=True)
class PeriodUse:
    """The counter of a period of a limit.

    Attributes:
        starts_at: Of the rolling window its first day, which `ends_at`, a midnight, moves.
        read_at: When it had this value, by the clock of whoever read it.
    """

    tenant_id: str
    event_type: str
    starts_at: datetime
    ends_at: datetime
    counter: Decimal
    read_at: datetime


@dataclass(frozen=True, slots=True)
class BoundUse:
    """A counter and the limit that bound it when it was read."""

    binding: Binding
    use: PeriodUse


def bind_default(limit_value: Decimal, period: LimitPeriod, *, set_at: datetime, last: LimitRecord | None) -> Binding:
    """How a default binds a tenant.

    Args:
        last: When the tenant's own limit was deleted; None: it never had one.
    """
    if last is None:
        return Binding(limit_value, period, set_at, None)
    # Where the default was set about then, nobody knows which of the two came first.
    recorded = last.period is period and set_at + TIMES_DIFFER_MAX < last.changed_at
    return Binding(limit_value, period, max(set_at, last.changed_at), last.counter if recorded else None)


def most_admitted(bound: BoundUse) -> Decimal | None:
    """The most that admissions can have taken the counter to; None: that cannot be said.

    While a limit binds a period, each admission leaves its counter at the limit or below, and all else that changes
    it lowers it: settling, corrections, a hold that is given back or consumed. So it is never above both the limit and
    what it was when the limit began to bind it: what was recorded then, or nothing where the period began later.
    """
    binding, use = bound.binding, bound.use
    if binding.period is LimitPeriod.ROLLING_30D:
        return _most_admitted_rolling(binding, use)
    if use.starts_at <= binding.since < use.ends_at:
        return None if binding.counter is None else max(binding.limit_value, binding.counter)
    # Not of a period that had use already, when the limit did not bind it yet.
    return binding.limit_value if use.starts_at > binding.since + TIMES_DIFFER_MAX else None


def _most_admitted_rolling(binding: Binding, use: PeriodUse) -> Decimal | None:
    """As above: the window is one period that never ends, and days that it leaves behind only lower its counter.

    That is so where no replica had moved on to the next window: use on the day that this leaves behind was not bound.
    """
    if not binding.since <= use.read_at < use.ends_at - TIMES_DIFFER_MAX:
        return None
    if binding.counter is not None:
        return max(binding.limit_value, binding.counter)
    return binding.limit_value if use.starts_at > binding.since + _HOLDS_KEPT_MAX else None


def find_violation(bound: BoundUse, *, raised: Decimal, changed: bool) -> Violation | None:
    """The violation where a counter is above all that admissions can have taken it to.

    Args:
        raised: What else may have raised it, in units: a repair or an adjustment is no admission.
        changed: The counter is what the next change of the limit recorded.
    """
    binding, use = bound.binding, bound.use
    most = most_admitted(bound)
    if most is None or use.counter <= CONTEXT.add(most, raised):
        return None
    place: dict[str, str | int] = {"tenant_id": use.tenant_id, "event_type": use.event_type}
    match binding.period:
        case LimitPeriod.HOURLY:
            place["hour"] = format_timestamp(use.starts_at)
        case LimitPeriod.DAILY:
            place["day"] = use.starts_at.date().isoformat()
        case LimitPeriod.MONTHLY | LimitPeriod.ROLLING_30D:
            place["period_start"] = use.starts_at.date().isoformat()
    problem = f"the counter of {_NAMES[binding.period]} went above its HARD limit"
    return Violation(
        "I4",
        f"{problem} before that was changed" if changed else problem,
        f"at most {canonical(CONTEXT.add(most, raised))}, of a limit of {canonical(binding.limit_value)}",
        canonical(use.counter),
        place,
    )
