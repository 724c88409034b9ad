"""Rating: published cases, the design's worked examples, and properties."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from usameter_core.decimals import CONTEXT
from usameter_core.money import format_amount, round_amount
from usameter_proof.pricing import (
    Flat,
    Graduated,
    Package,
    PerUnit,
    Price,
    PriceTerms,
    Tier,
    Volume,
    price_from_terms,
)
from usameter_proof.rating import Bound, due_amount, rate, tax_amount

CASES = json.loads((Path(__file__).parents[2] / "data" / "pricing_cases.json").read_text("utf-8"))

amounts = st.decimals(min_value=0, max_value=10**6, places=12)
quantities = st.decimals(min_value=0, max_value=10**13, places=6)


@st.composite
def tier_lists(draw: st.DrawFn) -> tuple[Tier, ...]:
    steps = draw(st.lists(st.decimals(min_value=1, max_value=10**6, places=6), max_size=4))
    ends = [*accumulate(steps), None]
    return tuple(Tier(end, draw(amounts), draw(amounts)) for end in ends)


@st.composite
def prices(draw: st.DrawFn) -> Price:
    charge = draw(
        st.one_of(
            st.builds(Flat, amounts),
            st.builds(PerUnit, amounts),
            st.builds(Graduated, tier_lists()),
            st.builds(Volume, tier_lists()),
            st.builds(Package, st.decimals(min_value=1, max_value=10**6, places=6), amounts, quantities),
        )
    )
    bounds = sorted(draw(st.lists(amounts, min_size=2, max_size=2)))
    minimum, maximum = draw(st.sampled_from([(None, None), (bounds[0], None), (None, bounds[1]), tuple(bounds)]))
    return Price(draw(st.sampled_from(["USD", "JPY", "KWD"])), charge, minimum, maximum)


def graduated(*tiers: tuple[str | None, str, str]) -> Price:
    made = [Tier(None if end is None else Decimal(end), Decimal(unit), Decimal(flat)) for end, unit, flat in tiers]
    return Price("USD", Graduated(tuple(made)), None, None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_published_case_of_another_billing_system_holds(case: dict[str, Any]) -> None:
    price = price_from_terms(msgspec.convert(case["price"], PriceTerms))
    exact = rate(price, Decimal(case["quantity"])).exact_amount
    if "exact_amount" in case:
        assert exact == Decimal(case["exact_amount"])
    if "amount" in case:
        assert round_amount(exact, price.currency) == Decimal(case["amount"])


def test_the_worked_example_of_the_product() -> None:
    price = graduated(("1000", "0", "0"), (None, "0.02", "0"))
    assert rate(price, Decimal(5247)).exact_amount == Decimal("84.94")


def test_the_published_example_of_three_tiers() -> None:
    price = graduated(("1000", "0.10", "0"), ("10000", "0.08", "0"), (None, "0.05", "0"))
    # 1,000 × 0.10 + 9,000 × 0.08 + 5,000 × 0.05
    assert rate(price, Decimal(15000)).exact_amount == Decimal(1070)


def test_an_end_is_inclusive_and_a_fraction_above_it_is_in_the_next_tier() -> None:
    price = graduated(("10", "1", "0"), (None, "100", "7"))
    assert rate(price, Decimal(10)).exact_amount == 10
    assert rate(price, Decimal("10.000001")).exact_amount == Decimal("17.0001")


@pytest.mark.parametrize(("quantity", "packages"), [("0", 0), ("100", 0), ("100.000001", 1), ("110", 1), ("110.5", 2)])
def test_a_begun_package_is_a_whole_one_beyond_the_free_units(quantity: str, packages: int) -> None:
    price = Price("USD", Package(Decimal(10), Decimal(3), Decimal(100)), None, None)
    rating = rate(price, Decimal(quantity))
    assert rating.exact_amount == 3 * packages
    assert rating.components[0].quantity == packages


def test_no_use_previews_the_first_tiers_flat_amount_and_owes_nothing() -> None:
    price = Price("USD", graduated(("5", "0", "100"), (None, "1", "50")).charge, Decimal(150), None)
    assert rate(price, Decimal(0)).exact_amount == 150
    assert due_amount(price, Decimal(0)) == 0
    assert due_amount(price, Decimal("0.000001")) == 150


def test_no_use_of_a_subscribed_price_owes_the_first_tiers_flat_amount_within_the_bounds() -> None:
    charge = graduated(("5", "1", "100"), (None, "1", "50")).charge
    for minimum, maximum, due in ((None, None, 100), (Decimal(150), None, 150), (None, Decimal(80), 80)):
        price = Price("USD", charge, minimum, maximum)
        assert due_amount(price, Decimal(0), subscribed=True) == due
        assert due_amount(price, Decimal("0.01"), subscribed=True) == due_amount(price, Decimal("0.01"))


def test_a_plain_price_per_unit_owes_nothing_without_use_subscribed_or_not() -> None:
    assert due_amount(Price("USD", PerUnit(Decimal(1)), None, None), Decimal(0), subscribed=True) == 0


@pytest.mark.parametrize(
    ("amount", "rate_", "currency", "tax"),
    [
        ("100", "19", "USD", "19.00"),
        ("0.05", "10", "USD", "0.01"),
        ("0.04", "10", "USD", "0.00"),
        ("-0.05", "10", "USD", "-0.01"),
        ("105", "0.5", "JPY", "1"),
        ("1", "7.7777", "KWD", "0.078"),
        ("0", "100", "USD", "0.00"),
    ],
)
def test_tax_is_rounded_half_away_from_zero_to_the_minor_unit(amount: str, rate_: str, currency: str, tax: str) -> None:
    assert format_amount(tax_amount(Decimal(amount), Decimal(rate_), currency), currency) == tax


def test_a_bound_is_a_component_of_its_own() -> None:
    capped = Price("USD", PerUnit(Decimal(1)), Decimal(5), Decimal(50))
    assert [each.bound for each in rate(capped, Decimal(4)).components] == [None, Bound.MINIMUM]
    assert [each.bound for each in rate(capped, Decimal(5)).components] == [None]
    assert [each.bound for each in rate(capped, Decimal(50)).components] == [None]
    assert rate(capped, Decimal(51)).components[-1].amount == -1


@pytest.mark.parametrize(("currency", "amount"), [("JPY", "3"), ("USD", "2.50"), ("KWD", "2.500"), ("CLF", "2.5000")])
def test_an_amount_is_rounded_to_the_currencys_minor_unit(currency: str, amount: str) -> None:
    assert (
        format_amount(due_amount(Price(currency, PerUnit(Decimal("2.5")), None, None), Decimal(1)), currency) == amount
    )


def test_half_a_minor_unit_goes_away_from_zero() -> None:
    price = Price("USD", PerUnit(Decimal("0.005")), None, None)
    assert due_amount(price, Decimal(1)) == Decimal("0.01")
    assert due_amount(price, Decimal("0.999999")) == 0


def test_the_largest_preview_keeps_every_digit() -> None:
    price = Price("USD", PerUnit(Decimal("999999999999999.999999999999")), None, None)
    quantity = Decimal("99999999999999999999.999999")
    exact = rate(price, quantity).exact_amount
    with localcontext(Context(prec=200)):
        assert exact == quantity * Decimal("999999999999999.999999999999")
    assert format_amount(exact, "USD").endswith("0.00")


@given(tiers=tier_lists(), quantity=quantities, more=quantities)
def test_graduated_never_costs_less_for_more(tiers: tuple[Tier, ...], quantity: Decimal, more: Decimal) -> None:
    price = Price("USD", Graduated(tiers), None, None)
    assert rate(price, quantity).exact_amount <= rate(price, quantity + more).exact_amount


@given(tiers=tier_lists())
def test_graduated_without_flat_amounts_does_not_jump_at_the_end_of_a_tier(tiers: tuple[Tier, ...]) -> None:
    plain = tuple(Tier(tier.up_to, tier.unit_amount, Decimal(0)) for tier in tiers)
    price, step = Price("USD", Graduated(plain), None, None), Decimal("0.000001")
    for tier, next_tier in pairwise(plain):
        end = tier.up_to
        assert end is not None
        below, at_end, above = (rate(price, quantity).exact_amount for quantity in (end - step, end, end + step))
        with localcontext(CONTEXT):
            assert at_end - below == step * tier.unit_amount
            assert above - at_end == step * next_tier.unit_amount


@given(tiers=tier_lists(), quantity=quantities)
def test_the_units_of_graduated_components_add_up_to_the_quantity(tiers: tuple[Tier, ...], quantity: Decimal) -> None:
    components = rate(Price("USD", Graduated(tiers), None, None), quantity).components
    assert sum(component.quantity for component in components) == quantity


@given(price=prices(), quantity=quantities)
def test_components_explain_the_amount_to_the_last_digit(price: Price, quantity: Decimal) -> None:
    rating = rate(price, quantity)
    with localcontext(CONTEXT):
        assert sum((each.amount for each in rating.components), Decimal(0)) == rating.exact_amount
        for each in rating.components:
            assert each.bound or each.quantity * each.unit_amount + each.flat_amount == each.amount
        assert price.minimum_amount is None or rating.exact_amount >= price.minimum_amount
        assert price.maximum_amount is None or rating.exact_amount <= price.maximum_amount


@given(price=prices(), quantity=quantities)
def test_an_amount_is_rounded_once_by_less_than_a_minor_unit(price: Price, quantity: Decimal) -> None:
    exact = rate(price, quantity).exact_amount
    rounded = round_amount(exact, price.currency)
    assert rounded == exact.quantize(
        Decimal(format_amount(Decimal(0), price.currency)), ROUND_HALF_UP, Context(prec=60)
    )
