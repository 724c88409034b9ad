"""Exact decimals: how they are read, and the one way they are written.

Quantities have at most 6 decimals and stay below 10^14 (design, REST contract). Sums of them
and products with prices stay exact in `CONTEXT`; nothing here rounds. Python's operators and `sum`
round silently to the 28 digits of its default context, so money is added by `exact_sum`, by the
operations of `CONTEXT`, or inside `localcontext(CONTEXT)`.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal

QUANTITY_DECIMALS = 6
QUANTITY_LIMIT = Decimal(10) ** 14
DOUBLE_DIGITS = 15

# 60 digits hold the largest sum (10^24 units) times the finest price (12 decimals) exactly;
# Inexact is trapped, so that an operation that would lose a digit raises instead.
CONTEXT = decimal.Context(
    prec=60,
    rounding=decimal.ROUND_HALF_UP,
    traps=[decimal.Inexact, decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)


def exact_sum(amounts: Iterable[Decimal]) -> Decimal:
    """The exact sum; of none it is 0.

    Raises:
        decimal.Inexact: It has more digits than `CONTEXT`.
    """
    result = Decimal(0)
    for amount in amounts:
        result = CONTEXT.add(result, amount)
    return result


def canonical(value: Decimal) -> str:
    """The value without exponent, trailing zeros or a sign on zero: the only form we print."""
    if not value:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def decimal_from_double(value: float) -> Decimal:
    """The decimal that a double stands for: its shortest form that reads back the same."""
    return Decimal(repr(value))


def decimals_of(value: Decimal) -> int:
    """How many digits stand behind the point, trailing zeros not counted."""
    text = canonical(value)
    return len(text.partition(".")[2])


def significant_digits_of(value: Decimal) -> int:
    """How many digits the value has, leading and trailing zeros not counted."""
    return len(canonical(value).lstrip("-").replace(".", "").strip("0"))
