"""The quota services of one organization on a real PostgreSQL, with short ways to say things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId, ReservationId
from usameter_core.period import hour_start
from usameter_core.postgres.pool import Pool
from usameter_quota.domain.admission import Outcome, UsageItem, Verdict
from usameter_quota.domain.holds import Hold, HoldTerms, hold_id_of
from usameter_quota.domain.limits import EnforcementMode, LimitPeriod, LimitTerms, Quota
from usameter_quota.domain.quota_events import QuotaEvent, QuotaEventFilter
from usameter_quota.service.admission import AdmissionService
from usameter_quota.service.holds import HoldService
from usameter_quota.service.limits import QuotaService
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.store.holds import HoldStore
from usameter_quota.store.limits import LimitStore
from usameter_quota.store.quota_events import QuotaEventStore
from usameter_quota.worker import CLOCK_SKEW_MAX, HoldExpirer, PeriodEnder

NOW = datetime(2026, 1, 15, 10, 30, tzinfo=UTC)
Item = tuple[str, str, str]  # tenant, event type, quantity


@dataclass(slots=True)
class ManualClock:
    """Stands still until it is set."""

    moment: datetime = NOW

    def now(self) -> datetime:
        return self.moment


@dataclass(slots=True)
class Bench:
    """The services of one organization, with short ways to say things."""

    pool: Pool
    clock: ManualClock = field(default_factory=ManualClock)
    caller: Principal = field(default_factory=lambda: Principal(OrgId(uuid4()), "key_test", frozenset()))

    @property
    def quotas(self) -> QuotaService:
        return QuotaService(clock=self.clock, store=LimitStore(self.pool))

    @property
    def admissions(self) -> AdmissionService:
        return AdmissionService(clock=self.clock, store=AdmissionStore(self.pool))

    async def limit(
        self,
        value: str,
        mode: str = "HARD",
        period: str = "MONTHLY",
        *,
        tenant_id: str = "t",
        percent: int = 80,
        grace: int | None = None,
    ) -> Quota:
        terms = LimitTerms(Decimal(value), EnforcementMode(mode), LimitPeriod(period), percent, grace)
        return await self.quotas.set_quota(self.caller, tenant_id, "e", terms)

    async def default(
        self, value: str, mode: str = "HARD", period: str = "MONTHLY", *, grace: int | None = None
    ) -> None:
        terms = LimitTerms(Decimal(value), EnforcementMode(mode), LimitPeriod(period), 80, grace)
        await self.quotas.set_default(self.caller, "e", terms)

    async def reserve(
        self,
        *requests: Sequence[Item],
        at: datetime | None = None,
        reservation_id: ReservationId | None = None,
    ) -> list[Verdict]:
        hour = hour_start(at or self.clock.now())
        return await self.admissions.reserve(
            self.caller.org_id,
            reservation_id or ReservationId(uuid4()),
            [
                [UsageItem(tenant, event, hour, Decimal(quantity)) for tenant, event, quantity in each]
                for each in requests
            ],
        )

    async def use(self, quantity: str, *, at: datetime | None = None) -> Verdict:
        (verdict,) = await self.reserve([("t", "e", quantity)], at=at)
        return verdict

    @property
    def holds(self) -> HoldService:
        return HoldService(clock=self.clock, store=HoldStore(self.pool))

    async def hold(
        self, quantity: str, *, name: str = "h", tenant_id: str = "t", ttl: timedelta = timedelta(hours=1)
    ) -> Hold:
        return await self.holds.reserve(self.caller.org_id, name, HoldTerms(tenant_id, "e", Decimal(quantity), ttl))

    async def expire_holds(self) -> int:
        return await HoldExpirer(clock=self.clock, store=HoldStore(self.pool)).expire()

    async def claim(
        self,
        quantity: str,
        *,
        name: str = "h",
        tenant_id: str = "t",
        at: datetime | None = None,
        reservation_id: ReservationId | None = None,
    ) -> Verdict:
        """What ingest asks for an event that names a hold."""
        (verdict,) = await self.admissions.reserve(
            self.caller.org_id,
            reservation_id or ReservationId(uuid4()),
            [
                [
                    UsageItem(
                        *(tenant_id, "e", hour_start(at or self.clock.now()), Decimal(quantity)),
                        claims=hold_id_of(self.caller.org_id, name),
                    )
                ]
            ],
        )
        return verdict

    async def store(self, quantity: str, *, tenant_id: str = "t", at: datetime | None = None) -> Verdict:
        """Reserve and commit."""
        reservation_id = ReservationId(uuid4())
        (verdict,) = await self.reserve([(tenant_id, "e", quantity)], at=at, reservation_id=reservation_id)
        await self.settle(reservation_id, Outcome.COMMITTED)
        return verdict

    async def settle(self, reservation_id: ReservationId, outcome: Outcome) -> None:
        await self.admissions.settle({self.caller.org_id: {reservation_id: outcome}})

    async def quota(self, tenant_id: str = "t") -> Quota:
        return await self.quotas.get_quota(self.caller.org_id, tenant_id, "e")

    async def current(self) -> Decimal:
        return (await self.quota()).current

    async def events(self) -> list[QuotaEvent]:
        """All there are, oldest first; their positions have no gap."""
        events = await QuotaEventStore(self.pool).list_between(
            self.caller.org_id, QuotaEventFilter(), after=0, through=10_000, limit=10_000
        )
        assert [event.position for event in events] == list(range(1, len(events) + 1))
        return events

    async def happened(self, tenant_id: str = "t") -> list[str]:
        """The types of a tenant's events, oldest first."""
        return [event.type.value for event in await self.events() if event.tenant_id == tenant_id]

    async def end_periods(self) -> None:
        """As the worker does, once it may."""
        self.clock.moment += CLOCK_SKEW_MAX
        await PeriodEnder(clock=self.clock, store=LimitStore(self.pool)).end_periods()
        self.clock.moment -= CLOCK_SKEW_MAX

    async def counted(self) -> list[tuple[str, object]]:
        """Use by tenant and day, which must be the sum of its hours."""
        org_id = self.caller.org_id
        rows = await self.pool.fetch(
            "SELECT tenant_id, quantity FROM quota.usage_day WHERE org_id = $1 ORDER BY tenant_id, day", org_id
        )
        hours = await self.pool.fetchval("SELECT sum(quantity) FROM quota.usage_hour WHERE org_id = $1", org_id)
        assert sum(row["quantity"] for row in rows) == (hours or 0)
        return [(row["tenant_id"], row["quantity"]) for row in rows]


def said(verdict: Verdict) -> str:
    """A verdict in a word."""
    if not verdict.admitted:
        return "DENY"
    return ",".join(each.kind.value for each in verdict.warnings) or "ALLOW"
