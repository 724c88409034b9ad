"""What is due: pure computation, replayed over arbitrary histories."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, auto
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.proof.test_rating import prices as any_prices
from usameter_billing.domain.invoice import BilledLine, DueLine, FeeCharge, LineKind, UseCharge
from usameter_billing.domain.invoicing import (
    Assessment,
    PeriodUse,
    PriceBook,
    Standing,
    compute_invoices,
    standing_uses,
)
from usameter_billing.domain.plan import Plan, PlanInterval
from usameter_billing.domain.subscription import Phase, Subscription
from usameter_core.period import Period, month_of
from usameter_proof.pricing import Graduated, PerUnit, Price, PriceModel, PriceTerms, PriceVersion, Tier
from usameter_proof.rating import due_amount

JANUARY = month_of(datetime(2026, 1, 5, tzinfo=UTC))
FEBRUARY = month_of(datetime(2026, 2, 5, tzinfo=UTC))


def version(
    unit_amount: str = "1",
    *,
    event_type: str = "call",
    tenant_id: str | None = None,
    currency: str = "USD",
    effective_from: datetime = datetime(2025, 1, 1, tzinfo=UTC),
    price: Price | None = None,
) -> PriceVersion:
    return PriceVersion(
        price_id=uuid4(),
        event_type=event_type,
        tenant_id=tenant_id,
        effective_from=effective_from,
        terms=PriceTerms(PriceModel.PER_UNIT, currency, unit_amount=unit_amount),
        price=price or Price(currency, PerUnit(Decimal(unit_amount)), None, None),
        created_at=effective_from,
    )


def use(quantity: str | Decimal, *, event_type: str = "call", period: Period = JANUARY) -> PeriodUse:
    return PeriodUse(event_type, period, Decimal(quantity), (uuid4(),))


def billed(amount: str | Decimal) -> BilledLine:
    return BilledLine(uuid4(), uuid4(), Decimal(amount))


def compute(
    uses: Iterable[PeriodUse],
    *versions: PriceVersion,
    period: Period = JANUARY,
    standing: Standing = Standing(),  # noqa: B008 - a frozen value
) -> Assessment:
    return compute_invoices("acme", list(uses), period=period, prices=PriceBook(versions), standing=standing)


def price_of(line: DueLine) -> PriceVersion:
    assert isinstance(line.charge, UseCharge)
    return line.charge.price


def event_type_of(line: DueLine) -> str | None:
    return line.charge.event_type if isinstance(line.charge, UseCharge) else None


def plan(price: Price, *, event_type: str = "call", base_fee: str = "0") -> Plan:
    """A monthly plan with one price."""
    plan_id = uuid4()
    of_plan = replace(version(event_type=event_type, price=price), plan_id=plan_id)
    return Plan(plan_id, "Plan", Decimal(base_fee), "USD", PlanInterval.MONTHLY, (of_plan,), of_plan.created_at)


def on(plan: Plan, *, start: datetime = JANUARY.start, end: datetime | None = None) -> Subscription:
    return Subscription(uuid4(), "acme", start, end, (Phase(start, plan),), start)


def test_first_use_of_the_period_is_a_usage_line() -> None:
    (invoice,) = compute([use("3")], version("0.5")).invoices
    (line,) = invoice.lines
    assert (line.kind, line.amount, line.rated_amount) == (LineKind.USAGE, Decimal("1.50"), Decimal("1.50"))


def test_a_late_arrival_is_a_true_up_of_exactly_the_difference() -> None:
    price = version("0.5")
    late = replace(use("5"), billed=(billed("1.50"),), pinned_price_id=price.price_id)
    (line,) = compute([late], price).invoices[0].lines
    assert (line.kind, line.amount, line.rated_amount) == (LineKind.TRUE_UP, Decimal("1.00"), Decimal("2.50"))


def test_use_of_an_earlier_period_rides_along_after_the_periods_own() -> None:
    (invoice,) = compute([use("1"), use("2", period=FEBRUARY)], version(), period=FEBRUARY).invoices
    assert [(line.kind, line.period) for line in invoice.lines] == [
        (LineKind.USAGE, FEBRUARY),
        (LineKind.TRUE_UP, JANUARY),
    ]


def test_snapshots_that_change_no_amount_still_get_a_line_to_be_covered_by() -> None:
    price = version()
    late = replace(use("3"), billed=(billed("3"),), pinned_price_id=price.price_id)
    (line,) = compute([late], price).invoices[0].lines
    assert line.amount == 0
    assert line.snapshot_ids == late.snapshot_ids


def test_use_that_is_all_covered_and_billed_makes_no_line() -> None:
    price = version()
    covered = replace(use("3"), snapshot_ids=(), billed=(billed("3"),), pinned_price_id=price.price_id)
    assert compute([covered], price).invoices == ()


def test_a_corrected_away_period_gives_back_all_that_was_billed() -> None:
    price = version(price=Price("USD", PerUnit(Decimal(1)), Decimal(50), None))
    gone = replace(use("0"), billed=(billed("50"),), pinned_price_id=price.price_id)
    assert compute([gone], price).invoices[0].subtotal == -50


def test_the_tenants_own_price_goes_before_the_default() -> None:
    own = version("2", tenant_id="acme")
    assert price_of(compute([use("1")], version("1"), own).invoices[0].lines[0]) == own
    others = version("2", tenant_id="somebody else")
    assert compute([use("1")], version("1"), others).invoices[0].subtotal == 1


def test_the_price_in_force_is_that_of_the_periods_start() -> None:
    at_start = version("2", effective_from=JANUARY.start)
    within = version("3", effective_from=JANUARY.start.replace(microsecond=1))
    assert price_of(compute([use("1")], version("1"), within, at_start).invoices[0].lines[0]) == at_start


def test_a_pinned_price_stays_whatever_was_added_since() -> None:
    first = version("1")
    better = version("2", tenant_id="acme", effective_from=JANUARY.start)
    late = replace(use("2"), billed=(billed("1"),), pinned_price_id=first.price_id)
    (line,) = compute([late], first, better).invoices[0].lines
    assert (price_of(line), line.amount) == (first, 1)


def test_use_without_a_price_makes_no_line_and_is_reported() -> None:
    assessment = compute([use("1"), use("9", event_type="image")], version())
    assert [event_type_of(line) for line in assessment.invoices[0].lines] == ["call"]
    assert assessment.invoices[0].unpriced_event_types == ("image",)
    assert [each.event_type for each in assessment.unpriced] == ["image"]


def test_each_currency_has_an_invoice_of_its_own_by_code() -> None:
    uses = [use("1"), use("2", event_type="image"), use("3", event_type="seat")]
    prices = [version(currency="USD"), version(event_type="image", currency="EUR"), version(event_type="seat")]
    assert [(each.currency, each.subtotal) for each in compute(uses, *prices).invoices] == [("EUR", 2), ("USD", 4)]


class Step(Enum):
    """What is done once some use has been sealed."""

    WAIT = auto()
    INVOICE = auto()
    VOID_OLDEST = auto()
    VOID_NEWEST = auto()


@given(
    price=any_prices(),
    is_subscribed=st.booleans(),
    steps=st.lists(
        st.tuples(st.decimals(min_value=0, max_value=10**6, places=6), st.sampled_from(Step)), min_size=1, max_size=10
    ),
)
def test_however_use_arrives_and_is_invoiced_and_voided_the_lines_add_up_to_the_rating(
    price: Price, is_subscribed: bool, steps: list[tuple[Decimal, Step]]
) -> None:
    """I6: splitting a period's use over late arrivals, invoices and voids changes nothing, to the minor unit."""
    of_plan = plan(price)
    version_in_force = of_plan.prices[0] if is_subscribed else version(price=price)
    standing = Standing((on(of_plan),) if is_subscribed else (), tax_rate=Decimal(19))
    total = Decimal(0)
    finalized: list[tuple[BilledLine, tuple[UUID, ...]]] = []
    uncovered: list[UUID] = []
    for quantity, step in [*steps, (Decimal(0), Step.INVOICE)]:
        total += quantity
        uncovered.append(uuid4())
        if step is Step.INVOICE:
            lines = tuple(line for line, _ in finalized)
            pinned = version_in_force.price_id if lines else None
            due = PeriodUse("call", JANUARY, total, tuple(uncovered), lines, pinned)
            (invoice,) = compute([due], version_in_force, standing=standing).invoices
            assert invoice.total == sum(line.amount for line in invoice.lines) + invoice.tax
            finalized += [(BilledLine(uuid4(), uuid4(), line.amount), line.snapshot_ids) for line in invoice.lines]
            uncovered = []
        elif step is not Step.WAIT and finalized:
            _, snapshot_ids = finalized.pop(0 if step is Step.VOID_OLDEST else -1)
            uncovered += snapshot_ids
    assert sum(line.amount for line, _ in finalized) == due_amount(price, total, subscribed=is_subscribed)
    covered = [snapshot_id for _, snapshot_ids in finalized for snapshot_id in snapshot_ids]
    assert len(covered) == len(set(covered)) == len(steps) + 1


def test_the_price_of_the_plan_goes_before_the_tenants_own_while_subscribed() -> None:
    of_plan = plan(Price("USD", PerUnit(Decimal(5)), None, None))
    prices = [version("1"), version("2", tenant_id="acme"), *of_plan.prices]
    standing = Standing((on(of_plan, end=FEBRUARY.start),))
    uses = [use("1"), use("1", period=FEBRUARY), use("1", event_type="image")]
    (invoice,) = compute(uses, *prices, version("3", event_type="image"), period=FEBRUARY, standing=standing).invoices
    assert [(event_type_of(line), line.period, line.amount) for line in invoice.lines] == [
        ("call", FEBRUARY, 2),
        ("call", JANUARY, 5),
        ("image", JANUARY, 3),
    ]


def test_a_plans_flat_amount_and_minimum_are_charged_without_use_and_others_are_not() -> None:
    flat = plan(Price("USD", Graduated((Tier(None, Decimal(1), Decimal(7)),)), None, None))
    minimum = plan(Price("USD", PerUnit(Decimal(1)), Decimal(9), None))
    free = plan(Price("USD", PerUnit(Decimal(1)), None, Decimal(9)))
    for of_plan, amounts in ((flat, [7]), (minimum, [9]), (free, [])):
        subscription = on(of_plan)
        assert len(list(standing_uses([subscription], through=JANUARY))) == len(amounts)
        unused = [PeriodUse("call", JANUARY, Decimal(0), ())]
        invoices = compute(unused, *of_plan.prices, standing=Standing((subscription,))).invoices
        assert [line.amount for invoice in invoices for line in invoice.lines] == amounts


def test_standing_uses_are_those_of_each_period_on_the_plan() -> None:
    of_plan = plan(Price("USD", PerUnit(Decimal(1)), Decimal(9), None))
    start, end = datetime(2026, 1, 31, tzinfo=UTC), datetime(2026, 3, 10, tzinfo=UTC)
    subscription = on(of_plan, start=start, end=end)
    periods = [
        period for _, period in standing_uses([subscription], through=month_of(datetime(2026, 6, 1, tzinfo=UTC)))
    ]
    assert [(each.start.day, each.end.day) for each in periods] == [(31, 28), (28, 10)]
    assert list(standing_uses([subscription], through=JANUARY)) == []


def test_a_base_fee_goes_before_use_and_counts_in_the_total() -> None:
    of_plan = plan(Price("USD", PerUnit(Decimal(1)), None, None), base_fee="29")
    standing = Standing((on(of_plan, start=FEBRUARY.start),), tax_rate=Decimal("7.7"))
    (invoice,) = compute([use("3")], version(), standing=standing).invoices
    fee, used = invoice.lines
    assert isinstance(fee.charge, FeeCharge)
    assert (fee.kind, fee.period, fee.amount, used.amount) == (LineKind.BASE_FEE, FEBRUARY, 29, 3)
    assert (invoice.subtotal, invoice.tax, invoice.total) == (32, Decimal("2.46"), Decimal("34.46"))


def test_a_true_up_is_taxed_at_the_rate_of_its_period_and_each_rate_is_rounded_once() -> None:
    price = version("0.01")
    late = replace(use("5"), pinned_tax_rate=Decimal(19))
    (invoice,) = compute(
        [late, use("10", period=FEBRUARY)], price, period=FEBRUARY, standing=Standing(tax_rate=Decimal(20))
    ).invoices
    assert [(line.tax_rate, line.amount) for line in invoice.lines] == [(20, Decimal("0.10")), (19, Decimal("0.05"))]
    # 0.02 and 0.0095: half a cent and less of it would be lost, or doubled, in a sum that is rounded once.
    assert (invoice.tax, invoice.total) == (Decimal("0.03"), Decimal("0.18"))


def test_a_rate_that_was_no_tax_stays_none() -> None:
    exempt = replace(use("5"), pinned_tax_rate=Decimal(0))
    (invoice,) = compute([exempt], version(), standing=Standing(tax_rate=Decimal(20))).invoices
    assert invoice.tax == 0


def test_tax_on_a_credit_is_given_back() -> None:
    price = version()
    gone = replace(use("0"), billed=(billed("50"),), pinned_price_id=price.price_id, pinned_tax_rate=Decimal("0.01"))
    (invoice,) = compute([gone], price).invoices
    assert (invoice.subtotal, invoice.tax, invoice.total) == (-50, Decimal("-0.01"), Decimal("-50.01"))
