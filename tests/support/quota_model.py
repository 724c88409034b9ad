"""What quota should be, kept in dictionaries: limits, counters, reservations, holds and events of an organization."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import msgspec

from usameter_core.period import Period, hour_start, month_of
from usameter_quota.domain.admission import Outcome, UsageItem
from usameter_quota.domain.holds import HoldTerms
from usameter_quota.domain.limits import EVERY_TENANT, EnforcementMode, LimitPeriod, LimitTerms
from usameter_quota.worker import CLOCK_SKEW_MAX

START = datetime(2026, 1, 30, 22, 30, tzinfo=UTC)
FOREVER = datetime.max.replace(tzinfo=UTC)
ROLLING = datetime.min.replace(tzinfo=UTC)
Said = tuple[str, str, Decimal, Decimal, Decimal, datetime | None]
# Type, tenant, occurred at, limit, period, stored, grace end.
Happened = tuple[str, str, datetime, Decimal, Period, Decimal, datetime | None]


@dataclass(slots=True)
class Reached:
    """What stored use has reached in a period; from the warning line on."""

    ends_at: datetime
    limit: bool = False
    grace_ends_at: datetime | None = None


@dataclass(slots=True)
class Reservation:
    """What a group took. Without a time it was settled before it was made."""

    state: str
    taken: list[UsageItem]
    verdicts: list[list[Said]]
    watched: bool = False
    claims: list[ModelHold] = field(default_factory=list)
    made_at: datetime | None = None


@dataclass(slots=True)
class ModelHold:
    """Without terms it was cancelled before it was made."""

    terms: HoldTerms | None
    state: str = "CANCELLED"
    hour: datetime = START
    expires_at: datetime = START
    # What a claim has taken over; None: there is none.
    credit: Decimal | None = None

    @property
    def rest(self) -> Decimal:
        assert self.terms is not None
        return self.terms.quantity - (self.credit or 0)


@dataclass(slots=True)
class Model:
    """What the service should be. Also its clock."""

    moment: datetime = START
    # The tenant EVERY_TENANT has the default.
    limits: dict[str, tuple[LimitTerms, datetime]] = field(default_factory=dict)
    heads: set[str] = field(default_factory=set)
    use: defaultdict[tuple[str, datetime], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    reservations: dict[UUID, Reservation] = field(default_factory=dict)
    # By tenant and start of the period; the rolling window's is ROLLING.
    reached: dict[tuple[str, datetime], Reached] = field(default_factory=dict)
    events: list[Happened] = field(default_factory=list)
    holds: dict[str, ModelHold] = field(default_factory=dict)

    def now(self) -> datetime:
        return self.moment

    def hour(self, hours_ago: int) -> datetime:
        return hour_start(self.moment - timedelta(hours=hours_ago))

    def limit(self, tenant: str) -> tuple[LimitTerms, datetime] | None:
        """The limit in force for a tenant."""
        return self.limits.get(tenant) or self.limits.get(EVERY_TENANT)

    def period(self, kind: LimitPeriod, hour: datetime, now: datetime | None = None) -> tuple[Period, datetime]:
        """What is summed, and when it ends."""
        if kind is LimitPeriod.ROLLING_30D:
            today = (now or self.moment).replace(hour=0, minute=0, second=0, microsecond=0)
            return Period(today - timedelta(days=29), FOREVER), today + timedelta(days=1)
        midnight = hour.replace(hour=0)
        spans = {
            LimitPeriod.HOURLY: Period(hour, hour + timedelta(hours=1)),
            LimitPeriod.DAILY: Period(midnight, midnight + timedelta(days=1)),
            LimitPeriod.MONTHLY: month_of(hour),
        }
        return spans[kind], spans[kind].end

    def used(self, tenant: str, period: Period) -> Decimal:
        return sum(
            (q for (t, hour), q in self.use.items() if t == tenant and period.start <= hour < period.end), Decimal(0)
        )

    def open_items(self, tenant: str) -> list[UsageItem]:
        held = [
            UsageItem(tenant, "e", each.hour, each.rest)
            for each in self.holds.values()
            if each.state == "HELD" and each.terms is not None and each.terms.tenant_id == tenant
        ]
        return held + [
            item
            for each in self.reservations.values()
            for item in each.taken
            if each.state == "OPEN" and item.tenant_id == tenant
        ]

    def reserved(self, tenant: str, period: Period) -> Decimal:
        return sum(
            (item.quantity for item in self.open_items(tenant) if period.start <= item.hour < period.end), Decimal(0)
        )

    def stored(self, tenant: str, period: Period) -> Decimal:
        return self.used(tenant, period) - self.reserved(tenant, period)

    def lines(
        self, tenants: Iterable[tuple[str, datetime]]
    ) -> list[tuple[str, LimitTerms, Period, datetime, datetime]]:
        """Each limit in each of its periods that has not ended: tenant, terms, period, end, key; once, in order."""
        found: dict[tuple[str, datetime], tuple[str, LimitTerms, Period, datetime, datetime]] = {}
        for tenant, hour in tenants:
            terms, _ = self.limit(tenant) or (None, None)
            if terms is None or terms.enforcement_mode is EnforcementMode.DISABLED:
                continue
            period, ends_at = self.period(terms.period, hour)
            if ends_at > self.moment and hour >= period.start:
                key = ROLLING if terms.period is LimitPeriod.ROLLING_30D else period.start
                found[tenant, period.start] = (tenant, terms, period, ends_at, key)
        return [found[key] for key in sorted(found)]

    def watch(self) -> None:
        """There is one event type, so every open reservation has it."""
        for each in self.reservations.values():
            each.watched = each.watched or (each.state == "OPEN" and bool(each.taken))

    def record(self, tenants: Iterable[tuple[str, datetime]]) -> None:
        """What the stored use of tenants has reached, in the periods that hold these hours."""
        self.watch()
        for tenant, terms, period, ends_at, key in self.lines(tenants):
            stored, limit = self.stored(tenant, period), terms.limit_value
            if not stored or stored * 100 < limit * terms.soft_limit_percent:
                continue
            happened = []
            if (tenant, key) not in self.reached:
                self.reached[tenant, key] = Reached(ends_at)
                happened.append("SOFT_LIMIT_REACHED")
            reached = self.reached[tenant, key]
            if stored >= limit and not reached.limit:
                reached.limit = True
                happened.append("LIMIT_REACHED")
            if terms.grace_period_hours is not None and stored > limit and reached.grace_ends_at is None:
                grace_ends_at = self.moment + timedelta(hours=terms.grace_period_hours)
                reached.grace_ends_at = grace_ends_at if key == ROLLING else min(grace_ends_at, ends_at)
                happened.append("GRACE_STARTED")
            for kind in happened:
                grace = reached.grace_ends_at if kind == "GRACE_STARTED" else None
                self.events.append((kind, tenant, self.moment, limit, Period(period.start, ends_at), stored, grace))

    def is_reaching(self, tenants: Iterable[tuple[str, datetime]]) -> bool:
        """Whether a counter is at a line that stored use has not been recorded to have reached."""
        return any(
            self.used(tenant, period) >= line
            for tenant, terms, period, _, key in self.lines(tenants)
            if (line := self.next_line(tenant, terms, key)) is not None
        )

    def next_line(self, tenant: str, terms: LimitTerms, key: datetime) -> Decimal | None:
        reached = self.reached.get((tenant, key))
        if reached is None:
            return terms.limit_value * terms.soft_limit_percent / 100
        if not reached.limit or (terms.grace_period_hours is not None and reached.grace_ends_at is None):
            return terms.limit_value
        return None

    def forget(self, tenant: str) -> None:
        """What was reached of the limit of a tenant, or of the default."""
        for key in list(self.reached):
            if key[0] == tenant or (tenant == EVERY_TENANT and key[0] not in self.limits):
                del self.reached[key]
        if tenant != EVERY_TENANT:
            self.record([(tenant, self.hour(0))])

    def end_periods(self) -> None:
        until = self.moment - CLOCK_SKEW_MAX
        due = {key: reached for key, reached in self.reached.items() if reached.ends_at <= until}
        if due:
            self.watch()
        for (tenant, start), reached in sorted(due.items(), key=lambda each: (each[1].ends_at, each[0])):
            limit = self.limit(tenant)
            assert limit is not None, "what was reached is of a limit in force"
            terms, ended_at, was_at_limit = limit[0], reached.ends_at, reached.limit
            period, ends_at = self.period(terms.period, start, until)
            stored = self.stored(tenant, period)
            goes_on = ends_at > until and stored > 0
            reached.limit = was_at_limit and goes_on and stored >= terms.limit_value
            if goes_on and stored * 100 >= terms.limit_value * terms.soft_limit_percent:
                reached.ends_at = ends_at
                reached.grace_ends_at = reached.grace_ends_at if reached.limit else None
            else:
                del self.reached[tenant, start]
            if was_at_limit and not reached.limit:
                span = Period(period.start, ends_at)
                self.events.append(("RESET", tenant, ended_at, terms.limit_value, span, stored, None))

    def judge(self, items: list[UsageItem]) -> list[Said]:
        demands: dict[tuple[str, datetime], tuple[Period, datetime, Decimal]] = {}
        for item in items:
            terms, set_at = self.limit(item.tenant_id) or (None, None)
            if terms is None or set_at is None or terms.enforcement_mode is EnforcementMode.DISABLED:
                continue
            period, ends_at = self.period(terms.period, item.hour)
            if ends_at <= set_at or not period.start <= item.hour < period.end:
                continue
            key = (item.tenant_id, period.start)
            so_far = demands.get(key, (period, ends_at, Decimal(0)))[2]
            demands[key] = (period, ends_at, so_far + item.quantity)
        refusals, warnings = [], []
        for (tenant, _), (period, ends_at, requested) in sorted(demands.items(), key=lambda each: each[0]):
            terms, _ = self.limit(tenant) or (None, None)
            assert terms is not None
            key = ROLLING if terms.period is LimitPeriod.ROLLING_30D else period.start
            limit, current = terms.limit_value, self.used(tenant, period)
            reset_at = ends_at if ends_at > self.moment else None
            if current + requested > limit:
                said = (tenant, limit, current, requested, reset_at)
                if terms.enforcement_mode is EnforcementMode.HARD or self.grace_has_ended(tenant, key, ends_at):
                    refusals.append(("REFUSED", *said))
                else:
                    warnings.append(("QUOTA_EXCEEDED", *said))
            elif (current + requested) * 100 > limit * terms.soft_limit_percent:
                warnings.append(("QUOTA_SOFT_LIMIT", tenant, limit, current, requested, reset_at))
        return refusals or warnings

    def grace_has_ended(self, tenant: str, key: datetime, ends_at: datetime) -> bool:
        reached = self.reached.get((tenant, key))
        grace_ends_at = None if reached is None else reached.grace_ends_at
        return grace_ends_at is not None and grace_ends_at <= self.moment < ends_at

    def hold(self, name: str, terms: HoldTerms) -> str:
        self.heads.add(terms.tenant_id)
        known = self.holds.get(name)
        if known is not None:
            if known.terms not in (None, terms):
                return "IdempotencyConflict"
            return "HELD" if known.state == "HELD" else "FailedPrecondition"
        item = UsageItem(terms.tenant_id, "e", self.hour(0), terms.quantity)
        refused = any(said[0] == "REFUSED" for said in self.judge([item]))
        if not refused:
            self.holds[name] = ModelHold(terms, "HELD", item.hour, self.moment + terms.ttl)
            self.use[item.tenant_id, item.hour] += item.quantity
        if self.is_reaching([(item.tenant_id, item.hour)]):
            self.record([(item.tenant_id, item.hour)])
        return "QuotaExceeded" if refused else "HELD"

    def cancel(self, name: str) -> str:
        hold = self.holds.setdefault(name, ModelHold(None))
        if hold.state == "HELD" and hold.credit is None:
            self.give_back(hold, "CANCELLED")
        return hold.state if hold.state in {"CANCELLED", "EXPIRED"} else "FailedPrecondition"

    def expire_holds(self) -> None:
        for hold in self.holds.values():
            if hold.state == "HELD" and hold.credit is None and hold.expires_at <= self.moment:
                self.give_back(hold, "EXPIRED")

    def give_back(self, hold: ModelHold, state: str) -> None:
        assert hold.terms is not None
        self.use[hold.terms.tenant_id, hold.hour] -= hold.rest
        hold.state = state

    def claim_of(self, hold: ModelHold, item: UsageItem) -> tuple[Decimal, bool]:
        """What a hold brings to an item, and whether it moves to the item's hour."""
        assert hold.terms is not None
        limit = self.limit(item.tenant_id)
        if limit is not None:
            (of_hold, _), (of_item, _) = (self.period(limit[0].period, hour) for hour in (hold.hour, item.hour))
            if of_hold != of_item or (hold.hour >= of_hold.start) != (item.hour >= of_item.start):
                return Decimal(0), False
        return min(hold.terms.quantity, item.quantity), True

    def reserve(
        self, reservation_id: UUID, requests: list[list[UsageItem]], names: list[list[str | None]]
    ) -> list[list[Said]] | str:
        asked = [item for items in requests for item in items]
        named = [name for of_request in names for name in of_request]
        for item, name in zip(asked, named, strict=True):
            hold = self.holds.get(name or "")
            if hold is not None and hold.terms is not None and hold.terms.tenant_id != item.tenant_id:
                return "InvalidArgument"
        self.heads |= {item.tenant_id for item in asked}
        known = self.reservations.get(reservation_id)
        if known is not None:
            return known.verdicts if known.state == "OPEN" else "RESERVATION_CLOSED"
        made = self.reservations[reservation_id] = Reservation("OPEN", [], [], made_at=self.moment)
        # Its own are open, but counted only when all are judged: `used` has them, `taken` not yet.
        taken = []
        offered = {name for name, hold in self.holds.items() if hold.state == "HELD" and hold.credit is None}
        claimed: list[tuple[ModelHold, UsageItem, Decimal, bool]] = []
        for items, of_request in zip(requests, names, strict=True):
            needed, claims = [], []
            for item, name in zip(items, of_request, strict=True):
                credit = Decimal(0)
                if name in offered:
                    offered.discard(name)
                    credit, moves = self.claim_of(self.holds[name], item)
                    claims.append((self.holds[name], item, credit, moves))
                if item.quantity > credit:
                    needed.append(msgspec.structs.replace(item, quantity=item.quantity - credit))
            made.verdicts.append(self.judge(needed))
            if not any(said[0] == "REFUSED" for said in made.verdicts[-1]):
                taken += items
                claimed += claims
                for item in needed:
                    self.use[item.tenant_id, item.hour] += item.quantity
        made.taken = taken
        for hold, item, credit, moves in claimed:
            made.claims.append(hold)
            if moves:
                self.use[item.tenant_id, hold.hour] -= hold.rest
                self.use[item.tenant_id, item.hour] += hold.rest
                hold.hour = item.hour
            hold.credit = credit
        reaching = [(item.tenant_id, item.hour) for item in asked if self.is_reaching([(item.tenant_id, item.hour)])]
        if reaching:
            self.record(reaching)
        return made.verdicts

    def settle(self, outcomes: Mapping[UUID, Outcome]) -> bool:
        """Close them together; whether that contradicts none."""
        reached: list[tuple[str, datetime]] = []
        for reservation_id, outcome in outcomes.items():
            made = self.reservations.setdefault(reservation_id, Reservation(outcome, [], []))
            if made.state != "OPEN":
                continue
            made.state = outcome
            for item in made.taken if outcome is Outcome.ABORTED else ():
                self.use[item.tenant_id, item.hour] -= item.quantity
            for hold in made.claims:
                if outcome is Outcome.COMMITTED:
                    self.give_back(hold, "CONSUMED")
                elif hold.terms is not None:
                    self.use[hold.terms.tenant_id, hold.hour] += hold.credit or 0
                    hold.credit = None
            if outcome is Outcome.COMMITTED and made.watched:
                reached += [(item.tenant_id, item.hour) for item in made.taken]
        if reached:
            self.record(reached)
        return all(self.reservations[each].state == outcome for each, outcome in outcomes.items())
