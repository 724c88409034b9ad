"""Plans: a base fee for an interval, and prices that go before all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

from usameter_core.errors import FieldViolation, InvalidArgument
from usameter_proof.pricing import (
    Price,
    PriceModel,
    PriceTerms,
    PriceVersion,
    TierTerms,
    amount_violation,
    price_from_terms,
)


class PlanInterval(StrEnum):
    """How long a base fee lasts. The names are those of usameter/billing/v1/plan.proto."""

    MONTHLY = "MONTHLY"
    YEARLY = "YEARLY"

    @property
    def months(self) -> int:
        """Its length."""
        return 1 if self is PlanInterval.MONTHLY else 12


@dataclass(frozen=True, slots=True)
class PlanTerms:
    """A plan as written; `prices` are by event type, in the order in which they were written."""

    name: str
    base_fee: str
    currency: str
    interval: PlanInterval
    prices: tuple[tuple[str, PriceTerms], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan, never edited. Its prices are in its currency, one an event type, by event type."""

    plan_id: UUID
    name: str
    base_fee: Decimal
    currency: str
    interval: PlanInterval
    prices: tuple[PriceVersion, ...]
    created_at: datetime


def plan_prices_from_terms(terms: PlanTerms) -> list[Price]:
    """The prices of the plan that the terms describe, in their order.

    Raises:
        InvalidArgument: They describe no plan. Every violation is named, not only the first.
    """
    violations = []
    if fault := amount_violation(terms.base_fee):
        violations.append(FieldViolation("base_fee", fault))
    prices, event_types = [], set()
    for index, (event_type, written) in enumerate(terms.prices):
        path = f"prices[{index}]"
        if event_type in event_types:
            violations.append(FieldViolation(f"{path}.event_type", f"{event_type} has a price in this plan already"))
        event_types.add(event_type)
        if written.currency != terms.currency:
            violations.append(FieldViolation(f"{path}.price.currency", f"must be the plan's, {terms.currency}"))
        try:
            prices.append(price_from_terms(written, path=f"{path}.price"))
        except InvalidArgument as error:
            violations += error.violations
    if violations:
        raise InvalidArgument(violations)
    return prices


def _seeded(name: str, base_fee: str, included: str, unit_amount: str) -> PlanTerms:
    tiers = (TierTerms(up_to=included, unit_amount="0"), TierTerms(unit_amount=unit_amount))
    price = PriceTerms(PriceModel.GRADUATED, "USD", tiers=tiers)
    return PlanTerms(name, base_fee, "USD", PlanInterval.MONTHLY, (("api_request", price),))


# The published plans; overage is pro rata per event: $0.50 per 1,000 is $0.0005 each.
SEEDED_PLANS: Sequence[PlanTerms] = (
    _seeded("Starter", "29", "100000", "0.0005"),
    _seeded("Growth", "99", "500000", "0.0003"),
    _seeded("Enterprise", "499", "5000000", "0.0001"),
)
