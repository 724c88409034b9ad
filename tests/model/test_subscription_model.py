"""Random histories of a subscribed tenant, billed by the service, against days that are counted one by one.

The seed is printed, and USAMETER_MODEL_SEED repeats it as the first.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.auditing import audit_billing
from tests.support.billing import Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import invoice_pb2, plan_pb2, price_pb2, subscription_pb2
from usameter.common.v1 import error_pb2
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_core.period import Period

DAY = timedelta(days=1)
FIRST = datetime(2024, 1, 1, tzinfo=UTC)
TENANT = "acme"
SEED = int(os.environ.get("USAMETER_MODEL_SEED", str(random.randrange(10**6))))
# Refusals that belong to a history: the moment was invoiced, ended, or nothing was to do.
EXPECTED = {"FAILED_PRECONDITION", "ALREADY_EXISTS", "NOT_FOUND"}


@dataclass(frozen=True)
class Terms:
    """What the model knows of a plan: its fee, the months it lasts, and the price of a call."""

    fee: Decimal
    months: int
    unit_amount: Decimal
    minimum: Decimal


WITHOUT_PLAN = Terms(Decimal(0), 1, Decimal("0.013"), Decimal(0))
TERMS = {
    "Small": Terms(Decimal("29"), 1, Decimal("0.5"), Decimal(0)),
    "Large": Terms(Decimal("99.99"), 1, Decimal("0.25"), Decimal("7.5")),
    "Year": Terms(Decimal("365.1"), 12, Decimal("0.1"), Decimal(0)),
}


@dataclass
class History:
    """What was done, and what the API says of it in the end."""

    org: Organization
    world: World
    random: random.Random
    plan_ids: dict[str, str]
    use: dict[datetime, Decimal] = field(default_factory=dict)
    subscriptions: list[subscription_pb2.Subscription] = field(default_factory=list)
    invoice_ids: list[str] = field(default_factory=list)

    @property
    def now(self) -> datetime:
        return self.world.clock.now()

    def midnight(self, days: int) -> datetime:
        return self.now.replace(hour=0) + days * DAY

    def seal(self) -> None:
        """Use of some days, mostly recent ones."""
        for _ in range(self.random.randint(1, 4)):
            day = max(FIRST, self.midnight(-self.random.choice([0, 1, 2, 5, 20, 45, 90])))
            quantity = Decimal(self.random.randint(1, 40_000)) / 1000
            self.use[day] = self.use.get(day, Decimal(0)) + quantity
            self.org.seal((TENANT, "call", day.date().isoformat(), str(quantity)))

    async def subscribe(self) -> None:
        plan_id = self.random.choice(list(self.plan_ids.values()))
        start = max(FIRST, self.midnight(self.random.choice([-40, -10, -1, 0, 1, 20])))
        made = await self.org.subscribe(TENANT, plan_id, start)
        self.subscriptions = [each for each in self.subscriptions if each.id != made.id] + [made]

    async def change(self) -> None:
        if self.subscriptions:
            plan_id, moment = self.random.choice(list(self.plan_ids.values())), self.moment()
            self.subscriptions[-1] = await self.org.change_plan(self.subscriptions[-1].id, plan_id, **moment)

    async def cancel(self) -> None:
        if self.subscriptions:
            self.subscriptions[-1] = await self.org.cancel(self.subscriptions[-1].id, **self.moment())

    def moment(self) -> dict[str, Any]:
        chosen = self.random.randrange(4)
        if chosen > 1:
            start = datetime_in(self.subscriptions[-1], "start_at")
            assert start is not None
            return {"at": max(start, self.midnight(self.random.choice([-20, -3, 0, 3, 25])))}
        return {"at_once": True} if chosen else {}

    async def bill(self) -> None:
        """Invoice the period of some day that has ended."""
        period = await self.period_of(self.midnight(-self.random.choice([1, 10, 31, 60])))
        if period.end <= self.now:
            invoice = await self.org.bill(TENANT, period)
            self.invoice_ids.append(invoice.id)

    async def void(self) -> None:
        if self.invoice_ids:
            await self.org.void(self.random.choice(self.invoice_ids[-3:]))

    async def period_of(self, moment: datetime) -> Period:
        """What the service says when it is asked for wrong bounds."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.org.draft(TENANT, Period(moment, moment))
        (violation, *_) = details_of(caught.value, error_pb2.ViolationDetails()).violations
        bounds = re.findall(r"\d{4}-\d\d-\d\dT[0-9:]*Z", violation.description)
        start, end = (datetime.fromisoformat(each) for each in bounds)
        return Period(start, end)


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database, page_snapshots=None) as world:
        yield world


@pytest.mark.parametrize("attempt", range(4))
async def test_whatever_the_history_fees_and_use_add_up_to_what_the_days_cost(world: World, attempt: int) -> None:
    """I5, I6 and I7 over subscriptions, changes, cancellations, late use, invoices and voids."""
    seed = SEED + attempt
    print(f"USAMETER_MODEL_SEED={seed}")  # noqa: T201 - so that a failure can be repeated
    world.clock.set(FIRST + 10 * DAY + timedelta(hours=9))
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", str(WITHOUT_PLAN.unit_amount), effective_from=FIRST)
        plan_ids = {name: (await set_plan(org, name, terms)).id for name, terms in TERMS.items()}
        history = History(org, world, random.Random(seed), plan_ids)
        often = [*[history.bill] * 4, *[history.change] * 3]
        steps = [history.subscribe, history.subscribe, history.cancel, history.void, *often]
        for _ in range(60):
            world.clock.advance(history.random.choice([0, 1, 1, 2, 5, 10, 17]) * DAY)
            history.seal()
            try:
                await history.random.choice(steps)()
            except grpc.aio.AioRpcError as error:
                assert reason_of(error) in EXPECTED, error
            assert await audit_billing(org.channel, org.metadata) == [], "no false alarm"
        await settle(history)
        await check(history)


async def set_plan(org: Organization, name: str, terms: Terms) -> plan_pb2.Plan:
    price = price_pb2.Price(
        model=price_pb2.per_unit,
        currency="USD",
        unit_amount=str(terms.unit_amount),
        minimum_amount=str(terms.minimum) if terms.minimum else None,
    )
    interval = plan_pb2.MONTHLY if terms.months == 1 else plan_pb2.YEARLY
    return await org.set_plan(name, str(terms.fee), interval=interval, prices={"call": price})


async def settle(history: History) -> None:
    """Let all time pass, end what is open, and invoice whatever is left."""
    history.world.clock.advance(130 * DAY)
    if history.subscriptions and not history.subscriptions[-1].HasField("end_at"):
        history.subscriptions[-1] = await history.org.cancel(history.subscriptions[-1].id, at_once=True)
    history.world.clock.advance(400 * DAY)
    try:
        await history.org.bill(TENANT, await history.period_of(history.midnight(-35)))
    except grpc.aio.AioRpcError as error:
        assert details_of(error, error_pb2.PreconditionDetails()).condition == "NOTHING_DUE"


async def check(history: History) -> None:
    plan_names = {plan_id: name for name, plan_id in history.plan_ids.items()}
    plan_of: dict[datetime, tuple[int, str]] = {}
    for number, subscription in enumerate(history.subscriptions):
        start, end = datetime_in(subscription, "start_at"), datetime_in(subscription, "end_at")
        assert start is not None and end is not None
        for offset in range((end - start).days):
            day = start + offset * DAY
            begun = [phase for phase in subscription.phases if starts(phase) <= day]
            plan_of[day] = (number, plan_names[begun[-1].plan_id])
    cuts = {starts(phase) for each in history.subscriptions for phase in each.phases}
    cuts |= {end for each in history.subscriptions if (end := datetime_in(each, "end_at"))}
    anchors = {number: starts(each.phases[0]) for number, each in enumerate(history.subscriptions)}

    use_due, fee_due = Decimal(0), Decimal(0)
    period: list[datetime] = []
    seconds: dict[tuple[int, str, int], list[int]] = {}
    for offset in range((history.midnight(0) - FIRST).days):
        day = FIRST + offset * DAY
        on_plan = plan_of.get(day)
        begins = day.day == 1 if on_plan is None else is_boundary(anchors[on_plan[0]], day)
        if (begins or day in cuts) and period:
            use_due += rated(period, plan_of.get(period[0]), history.use)
            period = []
        period.append(day)
        if on_plan is not None:
            number, name = on_plan
            interval = months_passed(anchors[number], day) // TERMS[name].months
            of_interval = seconds.setdefault((number, name, interval), [0])
            of_interval[0] += 1
    use_due += rated(period, plan_of.get(period[0]), history.use)
    for (number, name, interval), (days,) in seconds.items():
        terms, anchor = TERMS[name], anchors[number]
        length = sum(
            1
            for offset in range(370 * (interval + 1))
            if months_passed(anchor, anchor + offset * DAY) // terms.months == interval
        )
        fee_due += rounded(Fraction(terms.fee) * days / length)

    lines = [line for invoice in await billed(history) for line in invoice.lines]
    assert sum(Decimal(line.amount) for line in lines if not line.HasField("base_fee")) == use_due
    assert sum(Decimal(line.amount) for line in lines if line.HasField("base_fee")) == fee_due
    admin = history.world.admin
    assert await admin.fetchval("SELECT count(*) FROM billing.pending_use") == 0
    assert await admin.fetchval("SELECT count(*) FROM billing.snapshot") == await admin.fetchval(
        "SELECT count(*) FROM billing.snapshot_cover"
    )
    # Whatever was ever invoiced, and is not void, is a period of the history as it is now.
    for line in lines:
        if not line.HasField("base_fee"):
            start = datetime_in(line, "period_start")
            assert start is not None
            assert timestamp_from_datetime((await history.period_of(start)).end) == line.period_end


async def billed(history: History) -> list[invoice_pb2.Invoice]:
    found = [await history.org.get(each.id) for each in await history.org.list()]
    for invoice in found:
        assert Decimal(invoice.total) == sum(Decimal(line.amount) for line in invoice.lines)
        assert invoice.status != invoice_pb2.draft or not invoice.number
    return [invoice for invoice in found if invoice.status not in (invoice_pb2.draft, invoice_pb2.void)]


def rated(period: list[datetime], on_plan: tuple[int, str] | None, use: dict[datetime, Decimal]) -> Decimal:
    terms = WITHOUT_PLAN if on_plan is None else TERMS[on_plan[1]]
    quantity = sum((use.get(day, Decimal(0)) for day in period), Decimal(0))
    return max((quantity * terms.unit_amount), terms.minimum).quantize(Decimal("0.01"), ROUND_HALF_UP)


def rounded(amount: Fraction) -> Decimal:
    return Decimal(int(amount * 100 + Fraction(1, 2))) / 100


def is_boundary(anchor: datetime, day: datetime) -> bool:
    return months_passed(anchor, day) != months_passed(anchor, day - DAY)


def months_passed(anchor: datetime, day: datetime) -> int:
    """Whole months from the anchor: one is whole on the anchor's day, or on the last day of a month without it."""
    months = (day.year - anchor.year) * 12 + day.month - anchor.month
    is_last = (day + DAY).day == 1
    return months if day.day >= anchor.day or is_last else months - 1


def starts(phase: subscription_pb2.SubscriptionPhase) -> datetime:
    start = datetime_in(phase, "start_at")
    assert start is not None
    return start
