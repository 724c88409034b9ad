"""Rating: the exact amount that a quantity costs, and how it came about.

Nothing here rounds (`usameter_core.decimals.CONTEXT` raises where a digit would be lost), but for
`due_amount` and `prorated_fee`, which are what an invoice line charges, and `tax_amount`.
"""

from __future__ import annotations

import decimal
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from math import floor

from usameter_core.decimals import CONTEXT
from usameter_core.money import minor_unit_decimals, round_amount
from usameter_proof.pricing import Flat, Graduated, Package, PerUnit, Price, Tier, Volume

_ZERO = Decimal(0)


class Bound(StrEnum):
    """Which bound of the price made a component."""

    MINIMUM = "minimum"
    MAXIMUM = "maximum"


@dataclass(frozen=True, slots=True)
class Component:
    """One part of an amount; `amount` is quantity × unit_amount + flat_amount, unless a bound made it.

    `quantity` counts units, and packages for the model package. A bound's amount is what it added,
    so that of a maximum is negative.
    """

    up_to: Decimal | None
    quantity: Decimal
    unit_amount: Decimal
    flat_amount: Decimal
    amount: Decimal
    bound: Bound | None = None


@dataclass(frozen=True, slots=True)
class Rating:
    """`exact_amount` is the sum of the components, in major units, unrounded."""

    exact_amount: Decimal
    components: tuple[Component, ...]


def rate(price: Price, quantity: Decimal) -> Rating:
    """What `quantity` costs if it is charged at all: 0 units cost the first tier's flat amount.

    Whether zero use is charged is for the caller to know; see `due_amount`.

    Args:
        price: Checked.
        quantity: >= 0, at most 6 decimals and 20 digits before the point.
    """
    with decimal.localcontext(CONTEXT):
        components = _charge(price, quantity)
        amount = sum((component.amount for component in components), _ZERO)
        bound = _bound(price, amount)
        if bound is not None:
            components.append(bound)
            amount += bound.amount
        return Rating(amount, tuple(components))


def due_amount(price: Price, quantity: Decimal, *, subscribed: bool = False) -> Decimal:
    """What a tenant owes for a period's use, rounded to the minor unit.

    No use is due nothing, whatever minimum or flat amount the price has; but for a `subscribed` price,
    that of the plan the tenant is on, which is due what `rate` says of 0 units.
    """
    units = max(quantity, _ZERO)
    exact = rate(price, units).exact_amount if units or subscribed else _ZERO
    return round_amount(exact, price.currency)


def prorated_fee(fee: Decimal, currency: str, *, seconds: int, interval_seconds: int) -> Decimal:
    """The part of an interval's fee that `seconds` of it are, rounded once to the minor unit.

    A fraction, since a thirty-first of most fees has no end as a decimal: rounding looks at the exact value.

    Args:
        fee: Of the whole interval, >= 0.
        currency: Whose minor unit is rounded to.
        seconds: 0 to `interval_seconds`.
        interval_seconds: > 0.
    """
    decimals = minor_unit_decimals(currency)
    exact = Fraction(fee) * seconds / interval_seconds * 10**decimals
    return Decimal(floor(exact + Fraction(1, 2))).scaleb(-decimals, CONTEXT)


def tax_amount(amount: Decimal, tax_rate: Decimal, currency: str) -> Decimal:
    """The tax on all lines of one rate together, rounded once to the minor unit.

    Args:
        amount: The sum of the lines; negative gives tax back.
        tax_rate: Percent.
        currency: Of the lines.
    """
    return round_amount(CONTEXT.multiply(amount, tax_rate).scaleb(-2, CONTEXT), currency)


def _charge(price: Price, quantity: Decimal) -> list[Component]:
    match price.charge:
        case Flat(amount):
            return [_component(quantity, flat_amount=amount)]
        case PerUnit(unit_amount):
            return [_component(quantity, unit_amount=unit_amount)]
        case Graduated(tiers):
            return _rate_graduated(tiers, quantity)
        case Volume(tiers):
            tier = next(tier for tier in tiers if tier.up_to is None or quantity <= tier.up_to)
            return [_tier_component(tier, quantity)]
        case Package(size, amount, free_units):
            return [_component(_packages(quantity - free_units, size), unit_amount=amount)]


def _rate_graduated(tiers: Sequence[Tier], quantity: Decimal) -> list[Component]:
    components: list[Component] = []
    start = _ZERO
    for tier in tiers:
        # The first tier is reached by nothing at all, a later one by anything above its start.
        if components and quantity <= start:
            break
        end = quantity if tier.up_to is None else min(quantity, tier.up_to)
        components.append(_tier_component(tier, end - start))
        start = end
    return components


def _packages(units: Decimal, size: Decimal) -> Decimal:
    if units <= 0:
        return _ZERO
    full, begun = divmod(units, size)
    return full + (1 if begun else 0)


def _tier_component(tier: Tier, quantity: Decimal) -> Component:
    return _component(quantity, up_to=tier.up_to, unit_amount=tier.unit_amount, flat_amount=tier.flat_amount)


def _component(
    quantity: Decimal,
    *,
    up_to: Decimal | None = None,
    unit_amount: Decimal = _ZERO,
    flat_amount: Decimal = _ZERO,
) -> Component:
    return Component(up_to, quantity, unit_amount, flat_amount, quantity * unit_amount + flat_amount)


def _bound(price: Price, amount: Decimal) -> Component | None:
    if price.minimum_amount is not None and amount < price.minimum_amount:
        return Component(None, _ZERO, _ZERO, _ZERO, price.minimum_amount - amount, Bound.MINIMUM)
    if price.maximum_amount is not None and amount > price.maximum_amount:
        return Component(None, _ZERO, _ZERO, _ZERO, price.maximum_amount - amount, Bound.MAXIMUM)
    return None
