"""Every priced quantity of tests/data/pricing_cases.json through POST /prices:preview."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.support.stack import RunningStack

CASES = json.loads((Path(__file__).parents[1] / "data" / "pricing_cases.json").read_text())


def test_there_are_all_the_cases() -> None:
    assert len(CASES) == 53 and len({case["id"] for case in CASES}) == 53


@pytest.fixture(scope="module")
def answers(stack: RunningStack) -> dict[str, Any]:
    with stack.client() as client:
        return {
            case["id"]: client.post(
                "/api/v1/prices:preview", json={"price": case["price"], "quantity": case["quantity"]}
            ).json()
            for case in CASES
        }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_previewed_amount_is_the_published_one(answers: dict[str, Any], case: dict[str, Any]) -> None:
    answer = answers[case["id"]]
    assert "exact_amount" in case or "amount" in case
    if "exact_amount" in case:
        assert Decimal(answer["exact_amount"]) == Decimal(case["exact_amount"])
    if "amount" in case:
        assert Decimal(answer["amount"]) == Decimal(case["amount"])


def test_the_worked_example_of_the_product(stack: RunningStack) -> None:
    price = {
        "model": "graduated",
        "currency": "USD",
        "tiers": [{"up_to": "1000", "unit_amount": "0"}, {"up_to": None, "unit_amount": "0.02"}],
    }
    with stack.client() as client:
        answer = client.post("/api/v1/prices:preview", json={"price": price, "quantity": "5247"}).json()
    assert (answer["amount"], answer["exact_amount"]) == ("84.94", "84.94")
    assert [component["amount"] for component in answer["breakdown"]] == ["0", "84.94"]
