"""What happens to quota, told to the service and to the model, which are compared after each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from tests.support.auditing import audit_limits
from tests.support.quota_model import ROLLING, Model, Said
from usameter_core.errors import (
    FailedPrecondition,
    IdempotencyConflict,
    Internal,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
)
from usameter_core.grpc.context import Principal
from usameter_core.ids import OrgId, ReservationId
from usameter_core.period import Period, hour_start
from usameter_core.postgres.pool import Pool
from usameter_ingest.domain.event import new_event
from usameter_ingest.store.entries import EntryStore, ReservationGivenAway
from usameter_ingest.store.outcomes import OutcomeStore
from usameter_ingest.worker import JANITOR_MIN_AGE_SECONDS
from usameter_quota.domain.admission import Adjustment, Finding, Outcome, UsageItem
from usameter_quota.domain.holds import HoldTerms, hold_id_of
from usameter_quota.domain.limits import EVERY_TENANT, LimitPeriod, LimitTerms
from usameter_quota.domain.quota_events import QuotaEventFilter
from usameter_quota.service.admission import AdmissionService
from usameter_quota.service.auditing import LimitAuditingService
from usameter_quota.service.holds import HoldService
from usameter_quota.service.limits import QuotaService
from usameter_quota.store.admission import AdmissionStore
from usameter_quota.store.auditing import AuditStore
from usameter_quota.store.holds import HoldStore
from usameter_quota.store.limits import LimitStore
from usameter_quota.store.quota_events import QuotaEventStore
from usameter_quota.worker import HoldExpirer, PeriodEnder

TENANTS = ("a", "b")
Request = list[tuple[str, int, Decimal, str | None]]  # tenant, hours ago, quantity, hold


@dataclass(slots=True)
class Subject:
    """The service, told the same as the model and compared with it after each step."""

    pool: Pool
    model: Model = field(default_factory=Model)
    caller: Principal = field(default_factory=lambda: Principal(OrgId(uuid4()), "key_test", frozenset()))
    groups: dict[UUID, list[list[UsageItem]]] = field(default_factory=dict)
    # Which hold each item names.
    names: dict[UUID, list[list[str | None]]] = field(default_factory=dict)

    @property
    def org_id(self) -> OrgId:
        return self.caller.org_id

    @property
    def quotas(self) -> QuotaService:
        return QuotaService(clock=self.model, store=LimitStore(self.pool))

    @property
    def admissions(self) -> AdmissionService:
        return AdmissionService(clock=self.model, store=AdmissionStore(self.pool))

    @property
    def holds(self) -> HoldService:
        return HoldService(clock=self.model, store=HoldStore(self.pool))

    @property
    def auditing(self) -> LimitAuditingService:
        """In pages as small as they can be."""
        return LimitAuditingService(clock=self.model, store=AuditStore(self.pool), heads_max=1, changes_max=1)

    async def take(self, action: str, *arguments: Any) -> None:
        await getattr(self, f"_{action}")(*arguments)

    async def _set(self, tenant: str, wanted: LimitTerms) -> None:
        self.model.heads.add(tenant)
        if self.model.limits.get(tenant, (None,))[0] != wanted:
            self.model.limits[tenant] = (wanted, self.model.moment)
            self.model.forget(tenant)
        if tenant == EVERY_TENANT:
            await self.quotas.set_default(self.caller, "e", wanted)
        else:
            await self.quotas.set_quota(self.caller, tenant, "e", wanted)

    async def _delete(self, tenant: str) -> None:
        self.model.heads.add(tenant)
        try:
            if tenant == EVERY_TENANT:
                await self.quotas.delete_default(self.caller, "e")
            else:
                await self.quotas.delete_quota(self.caller, tenant, "e")
        except NotFound:
            assert tenant not in self.model.limits
        if self.model.limits.pop(tenant, None):
            self.model.forget(tenant)

    async def _reserve(self, requests: list[Request]) -> UUID:
        reservation_id = self.group(requests)
        await self._send(reservation_id)
        return reservation_id

    def group(self, requests: list[Request]) -> UUID:
        """The id of a group of requests that is to be sent."""
        group = [
            [
                UsageItem(
                    *(tenant, "e", self.model.hour(ago), quantity),
                    claims=None if name is None else hold_id_of(self.org_id, name),
                )
                for tenant, ago, quantity, name in items
            ]
            for items in requests
        ]
        reservation_id = uuid4()
        self.groups[reservation_id] = group
        self.names[reservation_id] = [[name for *_, name in items] for items in requests]
        return reservation_id

    async def _claim(self, index: int, ago: int, quantity: Decimal, times: int) -> None:
        """One of the holds that there are or were, by its own tenant; sometimes by two requests of a group."""
        made = [(name, hold.terms.tenant_id) for name, hold in self.model.holds.items() if hold.terms is not None]
        if made:
            name, tenant = made[index % len(made)]
            await self._reserve([[(tenant, ago, quantity, name)]] * times)

    async def _hold(self, name: str, tenant: str, quantity: Decimal, ttl: timedelta) -> None:
        wanted = HoldTerms(tenant, "e", quantity, ttl)
        expected = self.model.hold(name, wanted)
        try:
            got: str = (await self.holds.reserve(self.org_id, name, wanted)).state
        except (QuotaExceeded, IdempotencyConflict, FailedPrecondition) as error:
            got = type(error).__name__
        assert got == expected

    async def _cancel(self, name: str) -> None:
        expected = self.model.cancel(name)
        try:
            got: str = (await self.holds.cancel(self.org_id, name)).state
        except FailedPrecondition as error:
            got = type(error).__name__
        assert got == expected

    async def _expire_holds(self) -> None:
        self.model.expire_holds()
        await HoldExpirer(clock=self.model, store=HoldStore(self.pool)).expire()

    async def _repeat(self, index: int) -> None:
        if self.groups:
            await self._send(list(self.groups)[index % len(self.groups)])

    async def _send(self, reservation_id: UUID) -> None:
        expected = self.model.reserve(reservation_id, self.groups[reservation_id], self.names[reservation_id])
        got: list[list[Said]] | str
        try:
            verdicts = await self.admissions.reserve(
                self.org_id, ReservationId(reservation_id), self.groups[reservation_id]
            )
            got = [said_by([*verdict.violations, *verdict.warnings]) for verdict in verdicts]
        except FailedPrecondition as error:
            got = error.condition
        except InvalidArgument:
            got = "InvalidArgument"
        assert got == expected

    async def _settle(self, index: int, outcome: Outcome) -> None:
        # One more than there are: sometimes the id is unknown.
        known = list(self.groups)
        await self.settle({known[index % len(known)] if index % (len(known) + 1) else uuid4(): outcome})

    async def settle(self, outcomes: Mapping[UUID, Outcome]) -> None:
        """Close reservations, all in one call."""
        agrees = self.model.settle(outcomes)
        try:
            await self.admissions.settle({self.org_id: {ReservationId(each): outcomes[each] for each in outcomes}})
        except FailedPrecondition as error:
            assert error.condition == "RESERVATION_CONTRADICTED" and not agrees
        else:
            assert agrees

    async def _adjust(self, tenant: str, ago: int, quantity: Decimal) -> None:
        hour = self.model.hour(ago)
        # Only entries are corrected. One number holds entries and reservations, so more could be
        # taken than there are entries, and a later abort would fail; ingest never asks for that.
        reserved = self.model.reserved(tenant, Period(hour, hour + timedelta(hours=1)))
        if 0 <= self.model.use[tenant, hour] + quantity < reserved:
            return
        adjustment = Adjustment(uuid4(), tenant, "e", hour, quantity)
        for _ in range(2):
            try:
                await self.admissions.adjust({self.org_id: [adjustment]})
            except Internal:
                assert self.model.use[tenant, hour] + quantity < 0
        if self.model.use[tenant, hour] + quantity >= 0:
            self.model.use[tenant, hour] += quantity
        self.model.heads.add(tenant)
        self.model.record([(tenant, hour)])

    async def _advance(self, span: timedelta) -> None:
        self.model.moment += span

    async def _end_periods(self) -> None:
        self.model.end_periods()
        await PeriodEnder(clock=self.model, store=LimitStore(self.pool)).end_periods()

    async def compare(self) -> None:
        """I4: counters are entries and open reservations, status and events follow; no HARD limit was exceeded."""
        assert (await audit_limits(self.auditing, self.org_id))[1] == []
        rows = await self.pool.fetch(
            "SELECT tenant_id, hour, quantity FROM quota.usage_hour WHERE org_id = $1 AND quantity > 0", self.org_id
        )
        stored = {(row["tenant_id"], row["hour"]): row["quantity"] for row in rows}
        assert stored == {key: quantity for key, quantity in self.model.use.items() if quantity}
        rows = await self.pool.fetch(
            "SELECT public_id, state FROM quota.reservation WHERE org_id = $1 AND public_id IS NOT NULL", self.org_id
        )
        states = {row["public_id"]: "HELD" if row["state"] == "OPEN" else row["state"] for row in rows}
        assert states == {name: hold.state for name, hold in self.model.holds.items()}
        quotas = await self.quotas.list_quotas(self.org_id, tenant_id=None, after=("", ""), limit=10)
        expected = []
        for tenant in sorted(self.model.heads - {EVERY_TENANT}):
            wanted, set_at = self.model.limit(tenant) or (None, None)
            if wanted is None:
                continue
            period, ends_at = self.model.period(wanted.period, hour_start(self.model.moment))
            key = ROLLING if wanted.period is LimitPeriod.ROLLING_30D else period.start
            reached = self.model.reached.get((tenant, key))
            expected.append(
                (
                    *(tenant, wanted, tenant not in self.model.limits, self.model.used(tenant, period)),
                    *(self.model.reserved(tenant, period), ends_at, reached and reached.grace_ends_at, set_at),
                )
            )
        assert [
            (q.tenant_id, q.terms, q.from_default, q.current, q.reserved, q.reset_at, q.grace_ends_at, q.updated_at)
            for q in quotas
        ] == expected
        for tenant in TENANTS:
            found = await LimitStore(self.pool).check_quantity(
                self.org_id, tenant, "e", Decimal(1), now=self.model.moment
            )
            assert said_by(found) == self.model.judge([UsageItem(tenant, "e", self.model.hour(0), Decimal(1))])
        events = await QuotaEventStore(self.pool).list_between(
            self.org_id, QuotaEventFilter(), after=0, through=1_000, limit=1_000
        )
        assert [
            (
                e.type,
                e.tenant_id,
                e.occurred_at,
                e.limit_value,
                Period(e.period_start, e.period_end),
                e.stored,
                e.grace_ends_at,
            )
            for e in events
        ] == self.model.events
        assert [e.position for e in events] == list(range(1, len(events) + 1))


@dataclass(slots=True, kw_only=True)
class Recorder(Subject):
    """Quota with the side that stores entries, which may die between any two of its steps."""

    ledger: Pool
    # Whose quota is taken, and whose entries may still come to be stored, however late.
    in_flight: list[UUID] = field(default_factory=list)
    # What is to be told to quota: the queue of a process, which dies with it.
    queue: dict[UUID, Outcome] = field(default_factory=dict)
    # What the ledger says of reservations: whoever is first decides.
    outcomes: dict[UUID, Outcome] = field(default_factory=dict)

    async def _reserve(self, requests: list[Request]) -> UUID:
        reservation_id = await Subject._reserve(self, requests)
        made = self.model.reservations.get(reservation_id)
        if made is not None and made.taken:
            self.in_flight.append(reservation_id)
        else:
            self.queue[reservation_id] = Outcome.ABORTED
        return reservation_id

    async def _lose(self, requests: list[Request], arrives: bool) -> None:
        """No answer comes to a reserve, which arrives, or does not, or later: nothing will come of it."""
        reservation_id = self.group(requests)
        if arrives:
            await self._send(reservation_id)
        self.queue[reservation_id] = Outcome.ABORTED

    async def _persist(self, index: int) -> None:
        """Commit the entries of a reservation, unless it was given away."""
        if not self.in_flight:
            return
        reservation_id = self.in_flight.pop(index % len(self.in_flight))
        expected = self.outcomes.setdefault(reservation_id, Outcome.COMMITTED)
        events = [
            new_event(
                org_id=self.org_id,
                tenant_id=item.tenant_id,
                event_type=item.event_type,
                quantity=item.quantity,
                metadata=b"{}",
                idempotency_key=None,
                timestamp=item.hour,
                now=self.model.moment,
            )
            for item in self.model.reservations[reservation_id].taken
        ]
        try:
            await EntryStore(self.ledger, slot=0).record_events(self.org_id, ReservationId(reservation_id), events)
        except ReservationGivenAway:
            assert expected is Outcome.ABORTED
        else:
            assert expected is Outcome.COMMITTED
        self.queue[reservation_id] = expected

    async def _give_up(self, index: int) -> None:
        """Store nothing, as where somebody else has stored one of the events."""
        if self.in_flight:
            self.queue[self.in_flight.pop(index % len(self.in_flight))] = Outcome.ABORTED

    async def _deliver(self) -> None:
        await self.settle(self.queue)
        self.queue.clear()

    async def _die(self) -> None:
        self.queue.clear()

    async def _janitor(self, after: timedelta) -> None:
        """As `usameter_ingest.worker.Janitor`, for this organization alone."""
        self.model.moment += after
        min_age = timedelta(seconds=JANITOR_MIN_AGE_SECONDS)
        # Of all organizations, those of earlier histories among them.
        listed = await self.admissions.list_open_reservations(min_age=min_age, limit=1_000_000)
        left = {each.reservation_id for each in listed if each.org_id == self.org_id}
        assert left == {
            each
            for each, made in self.model.reservations.items()
            if made.state == "OPEN" and made.made_at is not None and made.made_at <= self.model.moment - min_age
        }
        store = OutcomeStore(self.ledger)
        for each in left:
            expected = self.outcomes.setdefault(each, Outcome.ABORTED)
            assert (await store.decide(self.org_id, each)).value == expected.value
        await self.settle({each: self.outcomes[each] for each in left})

    async def recover(self) -> None:
        """I4: whatever died, once the janitor has run the counters are what the ledger has, and what is held."""
        await self._die()
        await self._janitor(timedelta(seconds=JANITOR_MIN_AGE_SECONDS))
        await self.compare()
        expected: defaultdict[tuple[str, datetime], Decimal] = defaultdict(Decimal)
        for row in await self.ledger.fetch(
            "SELECT tenant_id, hour, quantity FROM ingest.usage_hour WHERE org_id = $1", self.org_id
        ):
            expected[row["tenant_id"], row["hour"]] += row["quantity"]
        for hold in self.model.holds.values():
            if hold.state == "HELD" and hold.terms is not None:
                expected[hold.terms.tenant_id, hold.hour] += hold.terms.quantity
        assert dict(expected) == {key: quantity for key, quantity in self.model.use.items() if quantity}


def said_by(findings: Iterable[Finding]) -> list[Said]:
    """Findings as the model says them."""
    return [
        (each.kind.value, each.tenant_id, each.limit, each.current, each.requested, each.reset_at) for each in findings
    ]
