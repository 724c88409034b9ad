"""Sums of money are exact, or there are none."""

from __future__ import annotations

import decimal
from decimal import Decimal

import pytest

from usameter_core.decimals import exact_sum


def test_a_sum_keeps_every_digit_where_python_rounds_to_28() -> None:
    amounts = [Decimal("9" * 28 + ".99"), Decimal("0.01"), Decimal("0.02")]
    assert exact_sum(amounts) == Decimal("1" + "0" * 28 + ".02")
    assert sum(amounts, Decimal(0)) != exact_sum(amounts)


def test_the_sum_of_nothing_is_0() -> None:
    assert exact_sum([]) == Decimal(0)


def test_a_sum_of_60_digits_is_exact_and_one_that_needs_61_raises() -> None:
    assert exact_sum([Decimal("9" * 58), Decimal("0.01")]) == Decimal("9" * 58 + ".01")
    with pytest.raises(decimal.Inexact):
        exact_sum([Decimal("9" * 59), Decimal("0.01")])
