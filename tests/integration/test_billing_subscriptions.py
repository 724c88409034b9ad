"""Subscriptions: what they cut, what they charge, and what they refuse to touch; over gRPC on a real database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc.aio
import pytest

from tests.conftest import Database
from tests.support.billing import FEBRUARY, JANUARY, Organization, World, open_world
from tests.support.services import details_of, reason_of
from usameter.billing.v1 import invoice_pb2, plan_pb2, price_pb2, subscription_pb2
from usameter.common.v1 import error_pb2, job_pb2
from usameter_core.grpc.timestamps import datetime_in, timestamp_from_datetime
from usameter_core.period import Period

USAGE, TRUE_UP, BASE_FEE = invoice_pb2.USAGE, invoice_pb2.TRUE_UP, invoice_pb2.BASE_FEE
UNUSED = price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount="1", minimum_amount="5")


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def span(start: str, end: str) -> Period:
    return Period(day(start), day(end))


def per_unit(amount: str) -> price_pb2.Price:
    return price_pb2.Price(model=price_pb2.per_unit, currency="USD", unit_amount=amount)


def said(invoice: invoice_pb2.Invoice) -> list[tuple[str, str, str, str]]:
    """Kind, what for, first day and amount of each line."""
    return [
        (
            invoice_pb2.LineKind.Name(line.kind),
            line.event_type or line.base_fee.plan_name,
            line.period_start.ToJsonString()[5:10],
            line.amount,
        )
        for line in invoice.lines
    ]


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    async with open_world(database) as world:
        world.clock.set(datetime(2026, 1, 10, 15, 30, tzinfo=UTC))
        yield world


@pytest.fixture
async def org(world: World) -> AsyncIterator[Organization]:
    async with world.open_service() as channel:
        org = world.organization(channel)
        await org.set_price("call", "0.02")
        yield org


async def refused(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def condition_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "FAILED_PRECONDITION"
    return str(details_of(error, error_pb2.PreconditionDetails()).condition)


async def field_of(call: Any) -> str:
    error = await refused(call)
    assert reason_of(error) == "INVALID_ARGUMENT"
    (violation,) = details_of(error, error_pb2.ViolationDetails()).violations
    return str(violation.field)


async def periods_of(world: World) -> Sequence[tuple[str, str]]:
    rows = await world.admin.fetch("SELECT period_start, period_end FROM billing.billing_period ORDER BY period_start")
    return [(f"{row['period_start']:%m-%d}", f"{row['period_end']:%m-%d}") for row in rows]


async def test_a_subscription_starts_today_unless_another_midnight_is_named(org: Organization) -> None:
    plan = await org.set_plan()
    made = await org.subscribe("acme", plan.id)
    assert (datetime_in(made, "start_at"), made.HasField("end_at")) == (day("2026-01-10"), False)
    assert [(phase.plan_id, datetime_in(phase, "start_at")) for phase in made.phases] == [(plan.id, day("2026-01-10"))]
    request = subscription_pb2.GetSubscriptionRequest(subscription_id=made.id)
    assert await org.subscriptions.GetSubscription(request, metadata=org.metadata) == made
    other = await org.subscribe("other", plan.id, day("2026-03-31"))
    assert (datetime_in(other, "start_at"), other.plan_id) == (day("2026-03-31"), plan.id)
    assert await field_of(org.subscribe("third", plan.id, datetime(2026, 1, 1, 12, tzinfo=UTC))) == "start_at"
    assert await field_of(org.subscribe("third", plan.id, day("9998-12-31"))) == "start_at"


async def test_creating_again_answers_with_the_same_and_anything_else_exists_already(org: Organization) -> None:
    basic, pro = await org.set_plan("Basic"), await org.set_plan("Pro")
    made = await org.subscribe("acme", basic.id, day("2026-01-05"))
    assert await org.subscribe("acme", basic.id, day("2026-01-05")) == made
    assert await org.subscribe("acme", basic.id) == made
    for again in (
        org.subscribe("acme", pro.id, day("2026-01-05")),
        org.subscribe("acme", basic.id, day("2026-01-06")),
        org.subscribe("acme", basic.id, day("2026-01-04")),
    ):
        error = await refused(again)
        assert reason_of(error) == "ALREADY_EXISTS"
        assert details_of(error, error_pb2.ResourceDetails()).id == made.id
    ended = await org.cancel(made.id, at=day("2026-02-05"))
    assert await org.subscribe("acme", basic.id, day("2026-01-05")) == ended
    after = await org.subscribe("acme", basic.id, day("2026-02-05"))
    assert after.id != made.id
    answer = await org.subscriptions.ListSubscriptions(
        subscription_pb2.ListSubscriptionsRequest(tenant_id="acme"), metadata=org.metadata
    )
    assert list(answer.subscriptions) == [after, ended]


async def test_of_sixteen_that_start_at_once_one_is_made(world: World, org: Organization) -> None:
    plan = await org.set_plan()
    made = await asyncio.gather(*(org.subscribe("acme", plan.id) for _ in range(16)))
    assert len({each.id for each in made}) == 1
    assert await world.admin.fetchval("SELECT count(*) FROM billing.subscription") == 1


async def test_unknown_plans_and_subscriptions_are_not_found(world: World, org: Organization) -> None:
    plan = await org.set_plan()
    made = await org.subscribe("acme", plan.id)
    unknown_plan, unknown = f"pln_{'0' * 32}", f"sub_{'0' * 32}"
    assert reason_of(await refused(org.subscribe("other", unknown_plan))) == "NOT_FOUND"
    assert reason_of(await refused(org.cancel(unknown))) == "NOT_FOUND"
    assert reason_of(await refused(org.change_plan(made.id, unknown_plan))) == "NOT_FOUND"
    assert await field_of(org.cancel("sub_1")) == "subscription_id"
    stranger = world.organization(org.channel)
    assert reason_of(await refused(stranger.cancel(made.id))) == "NOT_FOUND"
    assert reason_of(await refused(stranger.subscribe("acme", plan.id))) == "NOT_FOUND"


async def test_months_are_anchored_to_the_day_and_the_plans_price_is_in_force(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "31", prices={"call": per_unit("1")})
    org.seal(
        ("acme", "call", "2026-01-30", "100"),
        ("acme", "call", "2026-01-31", "1"),
        ("acme", "call", "2026-02-27", "2"),
        ("acme", "call", "2026-02-28", "4"),
        ("acme", "image", "2026-02-01", "1"),
    )
    await org.set_price("image", "7")
    await org.subscribe("acme", plan.id, day("2026-01-31"))
    world.clock.set(day("2026-04-01"))
    january = await org.bill("acme", span("2026-01-01", "2026-01-31"))
    assert said(january) == [("BASE_FEE", "Basic", "01-31", "31.00"), ("USAGE", "call", "01-01", "2.00")]
    february = await org.bill("acme", span("2026-01-31", "2026-02-28"))
    assert said(february) == [
        ("BASE_FEE", "Basic", "02-28", "31.00"),
        ("USAGE", "call", "01-31", "3.00"),
        ("USAGE", "image", "01-31", "7.00"),
    ]
    assert february.lines[1].price.plan_id == plan.id
    march = await org.bill("acme", span("2026-02-28", "2026-03-31"))
    assert said(march) == [("BASE_FEE", "Basic", "03-31", "31.00"), ("USAGE", "call", "02-28", "4.00")]
    assert await periods_of(world) == [("01-01", "01-31"), ("01-31", "02-28"), ("02-28", "03-31")]


async def test_a_line_of_a_base_fee_states_all_that_checking_it_needs(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "29")
    made = await org.subscribe("acme", plan.id, day("2026-01-15"))
    await org.cancel(made.id, at=day("2026-01-20"))
    world.clock.set(day("2026-02-01"))
    invoice = await org.bill("acme", span("2026-01-15", "2026-01-20"))
    (line,) = invoice.lines
    assert (line.kind, line.rated_amount, line.amount, line.tax_rate) == (BASE_FEE, "4.68", "4.68", "0")
    assert (line.event_type, line.quantity, line.HasField("price")) == ("", "", False)
    assert (line.period_start.ToJsonString(), line.period_end.ToJsonString()) == (
        "2026-01-15T00:00:00Z",
        "2026-02-15T00:00:00Z",
    )
    fee = line.base_fee
    assert (fee.subscription_id, fee.plan_id, fee.plan_name) == (made.id, plan.id, "Basic")
    assert (fee.interval, fee.amount) == (plan_pb2.MONTHLY, "29")
    assert (fee.seconds, fee.interval_seconds) == (5 * 86_400, 31 * 86_400)
    assert await org.get(invoice.id) == invoice


async def test_bounds_that_are_no_period_of_the_subscription_are_refused_with_the_right_ones(
    world: World, org: Organization
) -> None:
    plan = await org.set_plan()
    await org.subscribe("acme", plan.id, day("2026-01-15"))
    world.clock.set(day("2026-04-01"))
    for asked, right in (
        (JANUARY, "[2026-01-01T00:00:00Z, 2026-01-15T00:00:00Z)"),
        (FEBRUARY, "[2026-01-15T00:00:00Z, 2026-02-15T00:00:00Z)"),
    ):
        error = await refused(org.draft("acme", asked))
        assert reason_of(error) == "INVALID_ARGUMENT"
        assert right in details_of(error, error_pb2.ViolationDetails()).violations[0].description


async def test_a_minimum_is_charged_without_use_and_counts_towards_later_use(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "0", prices={"call": UNUSED})
    await org.subscribe("acme", plan.id, day("2026-01-01"))
    world.clock.set(day("2026-03-01"))
    first = await org.bill("acme", JANUARY)
    (line,) = first.lines
    assert (line.kind, line.quantity, line.rated_amount, list(line.snapshots)) == (USAGE, "0", "5.00", [])
    assert [(part.bound, part.amount) for part in line.breakdown] == [("", "0"), ("minimum", "5")]
    assert await org.draft("acme", JANUARY) == first
    org.seal(("acme", "call", "2026-01-10", "4"))
    within = await org.bill("acme", JANUARY)
    assert said(within) == [("TRUE_UP", "call", "01-01", "0.00")]
    org.seal(("acme", "call", "2026-01-10", "4"))
    february = await org.bill("acme", FEBRUARY)
    assert said(february) == [("USAGE", "call", "02-01", "5.00"), ("TRUE_UP", "call", "01-01", "3.00")]


async def test_a_change_at_once_bills_both_plans_for_their_days(world: World, org: Organization) -> None:
    basic = await org.set_plan("Basic", "31", prices={"call": per_unit("1")})
    pro = await org.set_plan("Pro", "62", prices={"call": per_unit("0.5")})
    made = await org.subscribe("acme", basic.id, day("2026-01-15"))
    world.clock.set(datetime(2026, 1, 19, 8, tzinfo=UTC))
    await org.bill("acme", span("2026-01-01", "2026-01-15"))
    org.seal(("acme", "call", "2026-01-19", "10"), ("acme", "call", "2026-01-20", "10"))
    draft = await org.draft("acme", span("2026-01-15", "2026-02-15"))
    changed = await org.change_plan(made.id, pro.id, at_once=True)
    assert await org.change_plan(made.id, pro.id, at_once=True) == changed
    assert [(phase.plan_id, datetime_in(phase, "start_at")) for phase in changed.phases] == [
        (basic.id, day("2026-01-15")),
        (pro.id, day("2026-01-20")),
    ]
    # Its period is no more.
    assert reason_of(await refused(org.get(draft.id))) == "NOT_FOUND"
    assert await periods_of(world) == [("01-15", "01-20"), ("01-20", "02-15")]
    world.clock.set(day("2026-02-20"))
    stub = await org.bill("acme", span("2026-01-15", "2026-01-20"))
    assert said(stub) == [
        ("TRUE_UP", "Basic", "01-15", "-26.00"),
        ("BASE_FEE", "Pro", "01-15", "52.00"),
        ("USAGE", "call", "01-15", "10.00"),
    ]
    rest = await org.bill("acme", span("2026-01-20", "2026-02-15"))
    assert said(rest) == [("BASE_FEE", "Pro", "02-15", "62.00"), ("USAGE", "call", "01-20", "5.00")]


async def test_a_change_at_the_boundary_makes_no_stub(world: World, org: Organization) -> None:
    basic, pro = await org.set_plan("Basic", "31"), await org.set_plan("Pro", "62")
    made = await org.subscribe("acme", basic.id, day("2026-01-15"))
    world.clock.set(datetime(2026, 1, 19, 8, tzinfo=UTC))
    changed = await org.change_plan(made.id, pro.id)
    assert (changed.plan_id, datetime_in(changed.phases[1], "start_at")) == (basic.id, day("2026-02-15"))
    world.clock.set(day("2026-02-15"))
    invoice = await org.bill("acme", span("2026-01-15", "2026-02-15"))
    assert said(invoice) == [("BASE_FEE", "Basic", "01-15", "31.00"), ("BASE_FEE", "Pro", "02-15", "62.00")]
    # A retry that comes after the boundary changes nothing; taking the change back is a change.
    again = await org.change_plan(made.id, pro.id)
    assert (again.plan_id, list(again.phases)) == (pro.id, list(changed.phases))


async def test_a_planned_change_is_replaced_by_another_and_taken_back(org: Organization) -> None:
    basic, pro, max_ = [await org.set_plan(name) for name in ("Basic", "Pro", "Max")]
    made = await org.subscribe("acme", basic.id)
    await org.change_plan(made.id, pro.id)
    other = await org.change_plan(made.id, max_.id)
    assert [phase.plan_id for phase in other.phases] == [basic.id, max_.id]
    assert await field_of(org.change_plan(made.id, pro.id, at=day("2026-02-01"), at_once=True)) == "at"
    assert await field_of(org.change_plan(made.id, pro.id, at=day("2026-01-09"))) == "at"
    back = await org.change_plan(made.id, basic.id, at_once=True)
    assert list(back.phases) == list(made.phases)


async def test_a_cancellation_lets_the_paid_interval_run_out_and_a_year_at_once_gives_the_rest_back(
    world: World, org: Organization
) -> None:
    yearly = await org.set_plan("Year", "365", interval=plan_pb2.YEARLY)
    made = await org.subscribe("acme", yearly.id, day("2026-01-15"))
    world.clock.set(datetime(2026, 3, 1, 12, tzinfo=UTC))
    first = await org.bill("acme", span("2026-01-15", "2026-02-15"))
    assert said(first) == [("BASE_FEE", "Year", "01-15", "365.00")]
    at_the_end = await org.cancel(made.id)
    assert datetime_in(at_the_end, "end_at") == day("2027-01-15")
    at_once = await org.cancel(made.id, at_once=True)
    assert datetime_in(at_once, "end_at") == day("2026-03-02")
    # An end is never moved later, by a retry or otherwise.
    world.clock.advance(timedelta(days=3))
    assert await org.cancel(made.id, at_once=True) == at_once
    assert await org.cancel(made.id) == at_once
    assert await condition_of(org.cancel(made.id, at=day("2026-03-03"))) == "SUBSCRIPTION_ENDED"
    assert await condition_of(org.change_plan(made.id, yearly.id, at=day("2026-03-02"))) == "SUBSCRIPTION_ENDED"
    credit = await org.bill("acme", span("2026-02-15", "2026-03-02"))
    assert said(credit) == [("TRUE_UP", "Year", "01-15", "-319.00")]
    assert (credit.total, credit.amount_due) == ("-319.00", "0.00")
    # The calendar goes on where it ended.
    org.seal(("acme", "call", "2026-03-02", "100"))
    drafted = await org.draft("acme", span("2026-03-02", "2026-04-01"))
    assert said(drafted) == [("USAGE", "call", "03-02", "2.00")]


async def test_one_that_is_cancelled_before_it_starts_never_began(world: World, org: Organization) -> None:
    plan = await org.set_plan()
    made = await org.subscribe("acme", plan.id, day("2026-02-01"))
    ended = await org.cancel(made.id)
    assert datetime_in(ended, "end_at") == day("2026-02-01")
    world.clock.set(day("2026-04-01"))
    assert await condition_of(org.draft("acme", FEBRUARY)) == "NOTHING_DUE"
    assert (await org.subscribe("acme", plan.id, day("2026-01-20"))).id != made.id


async def test_what_is_invoiced_is_never_cut_again(world: World, org: Organization) -> None:
    plan, other = await org.set_plan("Basic"), await org.set_plan("Other")
    org.seal(("acme", "call", "2026-01-20", "100"))
    world.clock.set(day("2026-02-03"))
    invoice = await org.bill("acme", JANUARY)
    for start in ("2025-12-01", "2026-01-01", "2026-01-31"):
        assert await condition_of(org.subscribe("acme", plan.id, day(start))) == "PERIOD_INVOICED"
    assert await periods_of(world) == [("01-01", "02-01")]
    made = await org.subscribe("acme", plan.id, day("2026-02-01"))
    await org.cancel(made.id, at=day("2026-02-03"))
    await org.bill("acme", span("2026-02-01", "2026-02-03"))
    assert await condition_of(org.cancel(made.id, at=day("2026-02-02"))) == "PERIOD_INVOICED"
    assert await condition_of(org.change_plan(made.id, other.id, at=day("2026-02-01"))) == "PERIOD_INVOICED"
    # What is void binds no more.
    await org.void(invoice.id)
    assert await condition_of(org.cancel(made.id, at=day("2026-02-02"))) == "PERIOD_INVOICED"


async def test_a_subscription_dated_back_cuts_what_is_not_invoiced_anew(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "31", prices={"call": per_unit("1")})
    org.seal(
        ("acme", "call", "2026-01-09", "1"), ("acme", "call", "2026-01-12", "2"), ("acme", "call", "2026-02-12", "4")
    )
    world.clock.set(day("2026-04-01"))
    drafts = [await org.draft("acme", JANUARY), await org.draft("acme", FEBRUARY)]
    await org.subscribe("acme", plan.id, day("2026-01-10"))
    for draft in drafts:
        assert reason_of(await refused(org.get(draft.id))) == "NOT_FOUND"
    assert await periods_of(world) == [("01-01", "01-10"), ("01-10", "02-10"), ("02-10", "03-10")]
    assert [
        (await org.bill("acme", each)).subtotal
        for each in (
            span("2026-01-01", "2026-01-10"),
            span("2026-01-10", "2026-02-10"),
            span("2026-02-10", "2026-03-10"),
        )
    ] == ["31.02", "33.00", "35.00"]
    assert await world.admin.fetchval("SELECT count(*) FROM billing.pending_use") == 0


async def test_drafts_of_periods_that_stay_as_they_are_stay(world: World, org: Organization) -> None:
    plan = await org.set_plan()
    org.seal(("acme", "call", "2026-01-09", "100"), ("acme", "call", "2026-02-09", "100"))
    world.clock.set(day("2026-03-01"))
    january, february = await org.draft("acme", JANUARY), await org.draft("acme", FEBRUARY)
    await org.subscribe("acme", plan.id, day("2026-02-15"))
    assert await org.get(january.id) == january
    assert reason_of(await refused(org.get(february.id))) == "NOT_FOUND"


async def test_a_bulk_run_of_a_month_bills_each_tenant_the_period_that_ends_in_it(
    world: World, org: Organization
) -> None:
    plan = await org.set_plan("Basic", "31")
    await org.subscribe("anchored", plan.id, day("2026-01-15"))
    await org.subscribe("first", plan.id, day("2026-01-01"))
    await org.subscribe("later", plan.id, day("2026-03-02"))
    org.seal(
        ("anchored", "call", "2026-01-14", "100"),
        ("anchored", "call", "2026-01-15", "100"),
        ("plain", "call", "2026-01-15", "50"),
    )
    world.clock.set(day("2026-03-01"))

    async def run(period: Period) -> list[tuple[str, str]]:
        known = {invoice.id for invoice in await org.list()}
        job = await org.wait_for(await org.start_bulk(finalize=True, period=period))
        assert (job.state, list(job.problems)) == (job_pb2.succeeded, [])
        return sorted((each.tenant_id, each.total) for each in await org.list() if each.id not in known)

    assert await run(JANUARY) == [("anchored", "33.00"), ("first", "62.00"), ("plain", "1.00")]
    assert await run(JANUARY) == []
    assert await run(FEBRUARY) == [("anchored", "33.00"), ("first", "31.00")]
    assert await run(FEBRUARY) == []
    for month, tenants in ((JANUARY, ["anchored", "first", "plain"]), (FEBRUARY, ["anchored", "first"])):
        ends_in_it = await org.list(
            period_ends_after=timestamp_from_datetime(month.start), period_ends_by=timestamp_from_datetime(month.end)
        )
        assert sorted(each.tenant_id for each in ends_in_it) == tenants


async def test_a_pull_and_a_change_at_once_leave_every_use_in_the_period_it_belongs_to(
    world: World, org: Organization
) -> None:
    """I6: use that arrives while time is cut anew is pending in a period that exists."""
    plan = await org.set_plan("Basic", "0")
    world.clock.set(day("2026-03-01"))
    made = await org.subscribe("acme", plan.id, day("2026-01-15"))
    other = await org.set_plan("Other", "0")

    async def change() -> None:
        for moment in range(16, 26):
            await org.change_plan(made.id, (other, plan)[moment % 2].id, at=day(f"2026-01-{moment}"))

    async def pull() -> None:
        for number in range(1, 11):
            org.seal(*(("acme", "call", f"2026-01-{each:02}", "1") for each in range(number, number + 20)))
            try:
                await org.draft("acme", span("2026-01-01", "2026-01-15"))
            except grpc.aio.AioRpcError as error:
                assert reason_of(error) == "FAILED_PRECONDITION"

    await asyncio.gather(change(), pull())
    wrong = await world.admin.fetchval(
        """
        SELECT count(*) FROM billing.pending_use AS pending LEFT JOIN billing.billing_period AS period
            USING (org_id, tenant_id, period_start, period_end) WHERE period.org_id IS NULL
        """
    )
    assert wrong == 0
    lost = await world.admin.fetchval(
        """
        SELECT count(*) FROM billing.snapshot AS snapshot WHERE NOT EXISTS (
            SELECT FROM billing.pending_use AS pending
            WHERE pending.org_id = snapshot.org_id AND pending.tenant_id = snapshot.tenant_id
              AND pending.event_type = snapshot.event_type AND pending.epoch = snapshot.epoch
              AND snapshot.day >= pending.period_start AND snapshot.day < pending.period_end)
        """
    )
    assert lost == 0
    everything = await org.draft("acme", span("2026-01-25", "2026-02-15"))
    assert everything.subtotal == "4.00"


async def test_a_fee_of_another_currency_is_an_invoice_of_its_own(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "100", currency="JPY")
    await org.subscribe("acme", plan.id, day("2026-01-01"))
    org.seal(("acme", "call", "2026-01-10", "100"))
    world.clock.set(day("2026-02-01"))
    await org.draft("acme", JANUARY)
    drafts = await org.list(tenant_id="acme")
    assert {(draft.currency, draft.total) for draft in drafts} == {("JPY", "200"), ("USD", "2.00")}


async def test_a_void_invoice_gives_its_fees_to_the_next(world: World, org: Organization) -> None:
    plan = await org.set_plan("Basic", "31", prices={"call": UNUSED})
    await org.subscribe("acme", plan.id, day("2026-01-01"))
    world.clock.set(day("2026-02-01"))
    first = await org.bill("acme", JANUARY)
    assert (first.total, len(first.lines)) == ("67.00", 3)
    await org.void(first.id)
    again = await org.bill("acme", JANUARY)
    assert said(again) == said(first)
    assert (again.number, again.total) == (2, "67.00")
