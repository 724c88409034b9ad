"""A company's books in memory: what was used, at which prices and plans, and what is owed for it.

The rules of rating, of periods and of base fees are written down here once more, as simply as can be, so that
what the services say has something to be compared with.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

from usameter.billing.v1 import price_pb2
from usameter_core.period import Period, add_months

START = datetime(2025, 2, 1, tzinfo=UTC)
TYPES = ("api_request", "egress_mb", "image")
DAY = timedelta(days=1)
_CENT = Decimal("0.01")


@dataclass(frozen=True)
class Plan:
    """A base fee, and the price of one event type."""

    fee: Decimal
    months: int
    event_type: str
    unit_amount: str
    minimum: str


PLANS = {
    "Small": Plan(Decimal("29"), 1, TYPES[0], "0.5", "0"),
    "Large": Plan(Decimal("99.99"), 1, TYPES[1], "0.25", "7.5"),
    "Year": Plan(Decimal("365.1"), 12, TYPES[0], "0.1", "0"),
}


@dataclass
class Books:
    """What was acknowledged, and what it costs by rules that are written down here once more."""

    # By (tenant, event type, day).
    used: dict[tuple[str, str, datetime], Decimal] = field(default_factory=lambda: defaultdict(Decimal))
    # By (event type, tenant or "" for all): (effective from, terms).
    prices: dict[tuple[str, str], list[tuple[datetime, dict[str, Any]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    # By tenant: when each plan began, the first with the subscription; and when that ended.
    plans: dict[str, list[tuple[datetime, str]]] = field(default_factory=dict)
    ended: dict[str, datetime] = field(default_factory=dict)

    def due(self, tenant_id: str, end: datetime) -> dict[tuple[str, datetime], Decimal]:
        """What a tenant owes by (event type, period's start) up to a moment; base fees under "", by their start."""
        owed: dict[tuple[str, datetime], Decimal] = {}
        for period in self._periods(tenant_id, end):
            days = [period.start + number * DAY for number in range((period.end - period.start).days)]
            for event_type in TYPES:
                quantity = sum((self.used.get((tenant_id, event_type, day), Decimal(0)) for day in days), Decimal(0))
                owed[event_type, period.start] = self._price(tenant_id, event_type, period.start, quantity)
        for (name, first), (charged, whole) in self._fee_days(tenant_id, end).items():
            fee = Fraction(PLANS[name].fee) * charged / whole
            owed["", first] = owed.get(("", first), Decimal(0)) + Decimal(int(fee * 100 + Fraction(1, 2))) / 100
        return owed

    def _plan(self, tenant_id: str, day: datetime) -> str | None:
        begun = [name for start, name in self.plans.get(tenant_id, ()) if start <= day]
        return begun[-1] if begun and day < self.ended[tenant_id] else None

    def _periods(self, tenant_id: str, end: datetime) -> list[Period]:
        """Day by day: months of the calendar, or of the subscription; a change begins one."""
        cuts = {start for start, _ in self.plans.get(tenant_id, ())} | {self.ended.get(tenant_id, START)}
        periods, first = [], START
        for number in range(1, (end - START).days + 1):
            day = START + number * DAY
            if self._plan(tenant_id, day) is None:
                begins = day.day == 1
            else:
                anchor = self.plans[tenant_id][0][0]
                begins = _months_passed(anchor, day) != _months_passed(anchor, day - DAY)
            if begins or day in cuts or day == end:
                periods.append(Period(first, day))
                first = day
        return periods

    def _price(self, tenant_id: str, event_type: str, start: datetime, quantity: Decimal) -> Decimal:
        name = self._plan(tenant_id, start)
        if name is not None and PLANS[name].event_type == event_type:
            amount = max(quantity * Decimal(PLANS[name].unit_amount), Decimal(PLANS[name].minimum))
            return amount.quantize(_CENT, ROUND_HALF_UP)
        for owner in (tenant_id, ""):
            versions = [each for each in self.prices[event_type, owner] if each[0] <= start]
            if versions and quantity > 0:
                terms = max(versions, key=lambda version: version[0])[1]
                return _rated(terms, quantity).quantize(_CENT, ROUND_HALF_UP)
        return Decimal(0)

    def _fee_days(self, tenant_id: str, end: datetime) -> dict[tuple[str, datetime], tuple[int, int]]:
        """By plan and the start of an interval of its fee: days on the plan, and days of the interval."""
        charged: dict[tuple[str, datetime], tuple[int, int]] = {}
        for number in range((end - START).days):
            day = START + number * DAY
            name = self._plan(tenant_id, day)
            if name is not None:
                anchor, months = self.plans[tenant_id][0][0], PLANS[name].months
                interval = _months_passed(anchor, day) // months
                first, last = (add_months(anchor, each * months) for each in (interval, interval + 1))
                days, _ = charged.get((name, first), (0, 0))
                charged[name, first] = (days + 1, (last - first).days)
        return charged


def _months_passed(anchor: datetime, day: datetime) -> int:
    """Whole months from the anchor: one is whole on the anchor's day, or on the last day of a month without it."""
    months = (day.year - anchor.year) * 12 + day.month - anchor.month
    return months if day.day >= anchor.day or (day + DAY).day == 1 else months - 1


def _rated(terms: dict[str, Any], quantity: Decimal) -> Decimal:
    """The design's section on money, in as few words as possible; quantity above 0."""
    match terms["model"]:
        case price_pb2.flat:
            return Decimal(terms["flat_amount"])
        case price_pb2.per_unit:
            amount = quantity * Decimal(terms["unit_amount"])
        case price_pb2.package:
            packages = (quantity - Decimal(terms["free"])) / Decimal(terms["size"])
            amount = max(packages.to_integral_value(ROUND_CEILING), Decimal(0)) * Decimal(terms["amount"])
        case model:
            amount, below = Decimal(0), Decimal(0)
            for up_to, unit_amount, flat_amount in terms["tiers"]:
                reached = quantity > below
                top = quantity if up_to is None else min(quantity, Decimal(up_to))
                last = up_to is None or quantity <= Decimal(up_to)
                if model == price_pb2.graduated and reached:
                    amount += (top - below) * Decimal(unit_amount) + Decimal(flat_amount)
                elif model == price_pb2.volume and reached and last:
                    amount = quantity * Decimal(unit_amount) + Decimal(flat_amount)
                below = Decimal(up_to or 0)
    return min(max(amount, Decimal(terms.get("minimum", 0))), Decimal(terms.get("maximum", "1e12")))
