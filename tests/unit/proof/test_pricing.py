"""Reading prices: what is one, and the field that is named where it is none."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from usameter_core.errors import InvalidArgument
from usameter_proof.pricing import Graduated, Package, PriceTerms, price_from_terms

CASES = json.loads((Path(__file__).parents[2] / "data" / "pricing_cases.json").read_text("utf-8"))


def terms(model: str, **fields: Any) -> PriceTerms:
    return msgspec.convert({"model": model, "currency": "USD", **fields}, PriceTerms)


def violations(written: PriceTerms) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        price_from_terms(written)
    return {each.field: each.description for each in caught.value.violations}


def tiers(*ends: str | None) -> list[dict[str, str | None]]:
    return [{"up_to": end, "unit_amount": "1"} for end in ends]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_terms_read_back_from_storage_are_the_same(case: dict[str, Any]) -> None:
    written = msgspec.convert(case["price"], PriceTerms)
    stored = msgspec.json.decode(msgspec.json.encode(written), type=PriceTerms)
    assert stored == written
    assert price_from_terms(stored) == price_from_terms(written)


def test_a_tier_without_amounts_is_free() -> None:
    price = price_from_terms(terms("graduated", tiers=[{"up_to": "1000"}, {"up_to": None, "unit_amount": "0.02"}]))
    assert isinstance(price.charge, Graduated)
    assert price.charge.tiers[0].unit_amount == price.charge.tiers[0].flat_amount == 0


def test_a_package_without_free_units_has_none() -> None:
    price = price_from_terms(terms("package", package={"size": "1000", "amount": "0.50"}))
    assert price.charge == Package(Decimal(1000), Decimal("0.50"), Decimal(0))


@pytest.mark.parametrize(
    ("ends", "field"),
    [
        (["10", "10", None], "price.tiers[1].up_to"),
        (["10", "9", None], "price.tiers[1].up_to"),
        (["0", None], "price.tiers[0].up_to"),
        (["10", None, "20"], "price.tiers[1].up_to"),
        (["10", "20"], "price.tiers[1].up_to"),
        (["10"], "price.tiers[0].up_to"),
        ([], "price.tiers"),
    ],
)
@pytest.mark.parametrize("model", ["graduated", "volume"])
def test_tiers_must_ascend_without_overlap_and_end_open(model: str, ends: list[str | None], field: str) -> None:
    assert field in violations(terms(model, tiers=tiers(*ends)))


def test_the_next_tier_may_begin_right_after_the_one_before() -> None:
    assert price_from_terms(terms("graduated", tiers=tiers("10", "10.000001", None)))


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("flat", "price.flat_amount"),
        ("per_unit", "price.unit_amount"),
        ("graduated", "price.tiers"),
        ("volume", "price.tiers"),
        ("package", "price.package"),
    ],
)
def test_a_model_without_its_field_is_refused(model: str, field: str) -> None:
    assert set(violations(terms(model))) == {field}


def test_fields_of_another_model_are_refused() -> None:
    written = terms(
        "per_unit", unit_amount="1", flat_amount="1", tiers=tiers(None), package={"size": "1", "amount": "1"}
    )
    assert set(violations(written)) == {"price.flat_amount", "price.tiers", "price.package"}


@pytest.mark.parametrize(
    ("amount", "description"),
    [
        ("-1", "must not be negative"),
        ("0.1234567890123", "has 13 decimals; at most 12"),
        ("1000000000000000", "has more than 15 digits before the point"),
        ("", 'must be a decimal such as "0.02"'),
        ("1e3", 'must be a decimal such as "0.02"'),
        (".5", 'must be a decimal such as "0.02"'),
        ("01", 'must be a decimal such as "0.02"'),
        ("NaN", 'must be a decimal such as "0.02"'),
        ("١", 'must be a decimal such as "0.02"'),
        ("1\n", 'must be a decimal such as "0.02"'),
    ],
)
def test_an_amount_that_is_none_is_refused_with_the_reason(amount: str, description: str) -> None:
    assert violations(terms("per_unit", unit_amount=amount)) == {"price.unit_amount": description}


@pytest.mark.parametrize("amount", ["0", "0.123456789012", "999999999999999.999999999999"])
def test_an_amount_at_the_edge_is_accepted(amount: str) -> None:
    assert price_from_terms(terms("per_unit", unit_amount=amount))


def test_minimum_may_equal_the_maximum_and_not_exceed_it() -> None:
    assert price_from_terms(terms("flat", flat_amount="1", minimum_amount="5", maximum_amount="5.0"))
    written = terms("flat", flat_amount="1", minimum_amount="5.01", maximum_amount="5")
    assert set(violations(written)) == {"price.minimum_amount"}


def test_a_package_has_a_size() -> None:
    assert set(violations(terms("package", package={"size": "0", "amount": "1"}))) == {"price.package.size"}


def test_every_violation_is_named_not_only_the_first() -> None:
    written = msgspec.structs.replace(
        terms("graduated", tiers=[{"up_to": "x", "unit_amount": "-1"}, {"up_to": None, "flat_amount": "y"}]),
        currency="usd",
    )
    assert set(violations(written)) == {
        "price.currency",
        "price.tiers[0].up_to",
        "price.tiers[0].unit_amount",
        "price.tiers[1].flat_amount",
    }
