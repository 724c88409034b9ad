"""Subscriptions: which plan a tenant is on, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from usameter_billing.domain.plan import Plan
from usameter_core.period import anchored_period


@dataclass(frozen=True, slots=True)
class Phase:
    """A plan from a UTC midnight on, until the next phase or the end of the subscription."""

    start: datetime
    plan: Plan


@dataclass(frozen=True, slots=True)
class Span:
    """A phase with its end; None: open."""

    plan: Plan
    start: datetime
    end: datetime | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A tenant on plans from `start` until `end`; None: until it is cancelled.

    Attributes:
        start: A UTC midnight; months and years are counted from it.
        end: A UTC midnight; `start` itself where it never began.
        phases: Ascending; the first starts at `start`, none at or after `end` but that one.
    """

    subscription_id: UUID
    tenant_id: str
    start: datetime
    end: datetime | None
    phases: tuple[Phase, ...]
    created_at: datetime

    def spans(self) -> Iterator[Span]:
        """Its phases with their ends: they tile its time."""
        ends = [*(phase.start for phase in self.phases[1:]), self.end]
        for phase, end in zip(self.phases, ends, strict=True):
            yield Span(phase.plan, phase.start, end)

    def holds(self, moment: datetime) -> bool:
        """Whether the tenant is subscribed at the moment."""
        return self.start <= moment and (self.end is None or moment < self.end)

    def plan_at(self, moment: datetime) -> Plan:
        """The plan at a moment; before the start it is the first, after the end the last."""
        begun = [phase.plan for phase in self.phases if phase.start <= moment]
        return begun[-1] if begun else self.phases[0].plan

    def interval_end(self, moment: datetime) -> datetime:
        """Where the interval ends for which the base fee was charged last; the start where there is none yet."""
        if moment < self.start:
            return self.start
        return anchored_period(self.start, moment, months=self.plan_at(moment).interval.months).end

    def ended(self, at: datetime) -> Subscription:
        """The same until `at`, which is not before the start; an earlier end stays."""
        end = at if self.end is None else min(at, self.end)
        kept = (self.phases[0], *(phase for phase in self.phases[1:] if phase.start < end))
        return replace(self, end=end, phases=kept)

    def changed(self, plan: Plan, at: datetime) -> Subscription:
        """The same with `plan` from `at` on, which is not before the start and before the end.

        A phase that begins at `at` keeps its beginning, also where nothing changes there any more: the
        billing period that ends there may be invoiced.
        """
        kept = tuple(phase for phase in self.phases if phase.start < at)
        begins = any(phase.start == at for phase in self.phases)
        if kept and kept[-1].plan.plan_id == plan.plan_id and not begins:
            return replace(self, phases=kept)
        return replace(self, phases=(*kept, Phase(at, plan)))


def subscribed_plan(subscriptions: Sequence[Subscription], moment: datetime) -> Plan | None:
    """The plan that the tenant with these subscriptions is on; None: it is on none."""
    return next((each.plan_at(moment) for each in subscriptions if each.holds(moment)), None)
