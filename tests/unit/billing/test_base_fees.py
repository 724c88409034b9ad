"""Base fees: in advance, by seconds, and exact however a subscription is cut."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from usameter_billing.domain.base_fees import BilledFee, due_fee_lines
from usameter_billing.domain.invoice import BilledLine, DueLine, FeeCharge, LineKind
from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.domain.subscription import Phase, Subscription
from usameter_core.period import anchored_period
from usameter_proof.rating import prorated_fee

DAY = timedelta(days=1)
NO_TAX = Decimal(0)


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def plan(base_fee: str | Decimal, interval: PlanInterval = PlanInterval.MONTHLY, *, currency: str = "USD") -> Plan:
    return Plan(uuid4(), "Plan", Decimal(base_fee), currency, interval, (), day("2025-01-01"))


def on(first: Plan, start: str) -> Subscription:
    return Subscription(uuid4(), "acme", day(start), None, (Phase(day(start), first),), day(start))


def due(subscription: Subscription, until: str, *billed: BilledFee) -> list[DueLine]:
    return due_fee_lines([subscription], billed, until=day(until), tax_rate=NO_TAX)


def billed_by(lines: list[DueLine], before: list[BilledFee] | None = None) -> list[BilledFee]:
    """What is billed once the lines are finalized, on top of what was."""
    known = {fee.subject: fee for fee in before or []}
    for line in lines:
        assert isinstance(line.charge, FeeCharge)
        fee = BilledFee(
            line.charge.subscription_id,
            line.charge.plan,
            line.period,
            (BilledLine(uuid4(), uuid4(), line.amount),),
            line.tax_rate,
        )
        first = known.get(fee.subject)
        known[fee.subject] = replace(first, lines=first.lines + fee.lines) if first else fee
    return list(known.values())


def said(lines: list[DueLine]) -> list[tuple[str, str, str]]:
    return [(line.kind.value, f"{line.period.start:%m-%d}", str(line.amount)) for line in lines]


def test_the_fee_of_an_interval_stands_on_the_invoice_of_the_period_that_ends_where_it_begins() -> None:
    monthly = on(plan("29"), "2026-01-15")
    assert said(due(monthly, "2026-01-14")) == []
    assert said(due(monthly, "2026-01-15")) == [("BASE_FEE", "01-15", "29.00")]


def test_fees_that_nobody_has_invoiced_ride_on_the_next_invoice() -> None:
    assert said(due(on(plan("29"), "2026-01-15"), "2026-03-15")) == [
        ("BASE_FEE", "01-15", "29.00"),
        ("BASE_FEE", "02-15", "29.00"),
        ("BASE_FEE", "03-15", "29.00"),
    ]


def test_what_is_billed_makes_no_line_again() -> None:
    monthly = on(plan("29"), "2026-01-15")
    assert due(monthly, "2026-01-15", *billed_by(due(monthly, "2026-01-15"))) == []


def test_a_cancelled_year_gives_back_its_unused_seconds() -> None:
    yearly = on(plan("365", PlanInterval.YEARLY), "2026-01-31")
    billed = billed_by(due(yearly, "2026-01-31"))
    assert said(due(yearly, "2026-12-31", *billed)) == []
    (line,) = due(yearly.ended(day("2026-02-10")), "2026-02-10", *billed)
    assert (line.kind, line.rated_amount, line.amount) == (LineKind.TRUE_UP, 10, -355)
    assert isinstance(line.charge, FeeCharge)
    assert (line.charge.seconds, line.period.seconds) == (10 * 86_400, 365 * 86_400)


def test_a_change_within_the_month_charges_both_plans_their_part() -> None:
    starter, growth = plan("31"), plan("62")
    subscription = on(starter, "2026-01-15")
    billed = billed_by(due(subscription, "2026-01-15"))
    changed = subscription.changed(growth, day("2026-01-20"))
    assert said(due(changed, "2026-01-15", *billed)) == [("TRUE_UP", "01-15", "-26.00")]
    # The part of the new plan begins with it.
    assert said(due(changed, "2026-01-20", *billed)) == [("TRUE_UP", "01-15", "-26.00"), ("BASE_FEE", "01-15", "52.00")]


def test_whoever_plans_to_come_back_within_the_month_is_charged_both_parts_at_once() -> None:
    own, other = plan("31"), plan("0")
    away = on(own, "2026-01-15").changed(other, day("2026-01-20")).changed(own, day("2026-01-25"))
    lines = due(away, "2026-01-20")
    assert said(lines) == [("BASE_FEE", "01-15", "26.00")]
    # So what is billed later never takes back a part of it on an invoice of an earlier period.
    assert said(due(away, "2026-01-15", *billed_by(due(away, "2026-01-25")))) == []


def test_a_year_is_counted_from_the_start_also_for_who_changes_to_it_later() -> None:
    changed = on(plan("0"), "2026-01-15").changed(plan("365", PlanInterval.YEARLY), day("2026-02-15"))
    (line,) = due(changed, "2026-02-15")
    assert (line.amount, line.period.start, line.period.end) == (334, day("2026-01-15"), day("2027-01-15"))


def test_a_fee_whose_plan_was_changed_from_its_beginning_is_given_back_whole() -> None:
    subscription = on(plan("29"), "2026-01-15")
    billed = billed_by(due(subscription, "2026-01-15"))
    changed = subscription.changed(plan("99"), day("2026-01-15"))
    assert said(due(changed, "2026-01-15", *billed)) in (
        [("TRUE_UP", "01-15", "-29.00"), ("BASE_FEE", "01-15", "99.00")],
        [("BASE_FEE", "01-15", "99.00"), ("TRUE_UP", "01-15", "-29.00")],
    )
    assert said(due(subscription.ended(day("2026-01-15")), "2026-01-15", *billed)) == [("TRUE_UP", "01-15", "-29.00")]


def test_a_true_up_keeps_the_tax_rate_of_its_first_line() -> None:
    yearly = on(plan("365", PlanInterval.YEARLY), "2026-01-31")
    (first,) = due_fee_lines([yearly], [], until=day("2026-01-31"), tax_rate=Decimal(19))
    ended = yearly.ended(day("2026-02-10"))
    (back,) = due_fee_lines([ended], billed_by([first]), until=day("2026-02-10"), tax_rate=Decimal(20))
    assert (first.tax_rate, back.tax_rate) == (19, 19)


def test_a_plan_without_a_fee_makes_no_line() -> None:
    assert due(on(plan("0"), "2026-01-15"), "2026-06-15") == []


def test_a_part_is_rounded_once_half_away_from_zero_in_the_currencys_unit() -> None:
    def part(fee: str, currency: str, seconds: int, of: int) -> str:
        return str(prorated_fee(Decimal(fee), currency, seconds=seconds, interval_seconds=of))

    assert part("29", "USD", 5, 31) == "4.68"
    assert part("0.01", "USD", 1, 2) == "0.01"
    assert part("0.01", "USD", 49, 100) == "0.00"
    assert part("100", "JPY", 1, 3) == "33"
    assert part("100", "JPY", 1, 200) == "1"
    assert part("1", "KWD", 1, 3) == "0.333"
    assert part("999999999999999.999999999999", "USD", 1, 1) == "1000000000000000.00"


intervals = st.sampled_from(list(PlanInterval))
fees = st.decimals(min_value=0, max_value=10_000, places=3)


@given(
    fee=fees,
    interval=intervals,
    currency=st.sampled_from(["USD", "JPY", "KWD"]),
    start=st.integers(0, 1000),
    steps=st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.booleans()), max_size=10),
)
def test_a_fee_that_is_cut_and_invoiced_in_any_way_sums_to_the_whole_to_the_cent(
    fee: Decimal, interval: PlanInterval, currency: str, start: int, steps: list[tuple[int, bool, bool]]
) -> None:
    """Leaving a plan and coming back, with invoices in between, charges its seconds of each interval once."""
    own, other = plan(fee, interval, currency=currency), plan("17", currency=currency)
    begin = day("2024-01-01") + start * DAY
    subscription = Subscription(uuid4(), "acme", begin, None, (Phase(begin, own),), begin)
    first = anchored_period(begin, begin, months=interval.months)
    billed: list[BilledFee] = []
    moment, away = begin, timedelta(0)
    for days, is_away, is_invoiced in [*steps, (0, False, True)]:
        subscription = subscription.changed(other if is_away else own, moment)
        after = min(moment + days * DAY, first.end)
        away += after - moment if is_away else timedelta(0)
        moment = after
        if is_invoiced:
            billed = billed_by(due_fee_lines([subscription], billed, until=moment, tax_rate=NO_TAX), billed)
    subscription = subscription.changed(own, moment)
    billed = billed_by(due_fee_lines([subscription], billed, until=first.end - DAY, tax_rate=NO_TAX), billed)
    of_own = [each for each in billed if each.plan == own and each.interval == first]
    total = sum((line.amount for each in of_own for line in each.lines), Decimal(0))
    seconds = first.seconds - away.days * 86_400
    assert total == prorated_fee(fee, currency, seconds=seconds, interval_seconds=first.seconds)
    if not away:
        assert total == prorated_fee(fee, currency, seconds=1, interval_seconds=1)


@given(
    fee=fees,
    interval=intervals,
    end=st.integers(0, 800),
    invoices=st.lists(st.integers(0, 900), max_size=6),
)
def test_however_late_a_cancellation_is_heard_of_the_rest_is_given_back(
    fee: Decimal, interval: PlanInterval, end: int, invoices: list[int]
) -> None:
    """Invoices may be made in any order, and of periods long past."""
    begin = day("2026-01-31")
    subscription = Subscription(uuid4(), "acme", begin, None, (Phase(begin, plan(fee, interval)),), begin)
    billed: list[BilledFee] = []
    for days in invoices:
        billed = billed_by(due_fee_lines([subscription], billed, until=begin + days * DAY, tax_rate=NO_TAX), billed)
    ended = subscription.ended(begin + end * DAY)
    billed = billed_by(due_fee_lines([ended], billed, until=begin + 1000 * DAY, tax_rate=NO_TAX), billed)
    afresh = due_fee_lines([ended], [], until=begin + 1000 * DAY, tax_rate=NO_TAX)
    total = sum((line.amount for each in billed for line in each.lines), Decimal(0))
    assert total == sum((line.amount for line in afresh), Decimal(0))
