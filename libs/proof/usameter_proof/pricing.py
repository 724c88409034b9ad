"""Prices: how a quantity of an event type becomes money.

`PriceTerms` is a price as somebody wrote it (the `price` of the REST contract, all decimals text);
`Price` is one that was checked. Terms are what is stored, so a price keeps its scale for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

import msgspec

from usameter_core.decimals import canonical
from usameter_core.errors import FieldViolation, InvalidArgument

# With them quantity × amount keeps below the 60 digits of `usameter_core.decimals.CONTEXT`:
# a preview has 20 + 6 digits, an amount 15 + 12.
INTEGER_DIGITS_MAX = 15
DECIMALS_MAX = 12

_DECIMAL = re.compile(r"-?(?P<integer>0|[1-9][0-9]*)(?:\.(?P<decimals>[0-9]+))?", re.ASCII)
_CURRENCY = re.compile(r"[A-Z]{3}", re.ASCII)


class PriceModel(StrEnum):
    """The names are those of usameter/billing/v1/price.proto."""

    FLAT = "flat"
    PER_UNIT = "per_unit"
    GRADUATED = "graduated"
    VOLUME = "volume"
    PACKAGE = "package"


class TierTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """A tier as written; `up_to` is None in the last one."""

    up_to: str | None = None
    unit_amount: str | None = None
    flat_amount: str | None = None


class PackageTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """A package as written."""

    size: str = ""
    amount: str = ""
    free_units: str | None = None


class PriceTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """A price as written; which fields belong together is for `price_from_terms` to say."""

    model: PriceModel
    currency: str
    flat_amount: str | None = None
    unit_amount: str | None = None
    tiers: tuple[TierTerms, ...] = ()
    package: PackageTerms | None = None
    minimum_amount: str | None = None
    maximum_amount: str | None = None


@dataclass(frozen=True, slots=True)
class Flat:
    """`amount`, whatever the use."""

    amount: Decimal


@dataclass(frozen=True, slots=True)
class PerUnit:
    """Every unit at `unit_amount`."""

    unit_amount: Decimal


@dataclass(frozen=True, slots=True)
class Tier:
    """Quantities up to and including `up_to`; None: without end."""

    up_to: Decimal | None
    unit_amount: Decimal
    flat_amount: Decimal


@dataclass(frozen=True, slots=True)
class Graduated:
    """Each unit at the rate of the tier it falls in; a tier's flat amount once it is reached."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Volume:
    """Every unit at the rate of the one tier that the whole quantity falls in, and its flat amount."""

    tiers: tuple[Tier, ...]


@dataclass(frozen=True, slots=True)
class Package:
    """`amount` for each begun package of `size` units beyond the free ones."""

    size: Decimal
    amount: Decimal
    free_units: Decimal


Charge = Flat | PerUnit | Graduated | Volume | Package


@dataclass(frozen=True, slots=True)
class Price:
    """A price that holds together. The bounds are on the whole amount, in the price's currency."""

    currency: str
    charge: Charge
    minimum_amount: Decimal | None
    maximum_amount: Decimal | None


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """A price from a moment on, for one tenant or (`tenant_id` None) for all; never edited.

    That of a plan (`plan_id`) is in force for whoever is on the plan, whenever that is.
    """

    price_id: UUID
    event_type: str
    tenant_id: str | None
    effective_from: datetime
    terms: PriceTerms
    price: Price
    created_at: datetime
    plan_id: UUID | None = None


def price_from_terms(terms: PriceTerms, *, path: str = "price") -> Price:
    """The price that the terms describe.

    Args:
        terms: As written.
        path: Where they stand in the request; violations begin with it: "price.tiers[1].up_to".

    Raises:
        InvalidArgument: They describe none. Every violation is named, not only the first.
    """
    reader = _Reader(path)
    if not _CURRENCY.fullmatch(terms.currency):
        reader.refuse("currency", 'must be three capital letters (ISO 4217), such as "USD"')
    reader.refuse_foreign_fields(terms)
    charge = reader.read_charge(terms)
    minimum, maximum = reader.read_bounds(terms)
    if reader.violations:
        raise InvalidArgument(reader.violations)
    return Price(terms.currency, charge, minimum, maximum)


def amount_violation(text: str) -> str | None:
    """What is wrong with a written amount or bound; None where it is one: >= 0, within the digits above."""
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return 'must be a decimal such as "0.02"'
    if text.startswith("-"):
        return "must not be negative"
    if len(match["decimals"] or "") > DECIMALS_MAX:
        return f"has {len(match['decimals'])} decimals; at most {DECIMALS_MAX}"
    if len(match["integer"]) > INTEGER_DIGITS_MAX:
        return f"has more than {INTEGER_DIGITS_MAX} digits before the point"
    return None


class _Reader:
    """Reads terms and collects what is wrong with them; a wrong decimal reads as 0 meanwhile."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.violations: list[FieldViolation] = []

    def refuse(self, field: str, description: str) -> None:
        self.violations.append(FieldViolation(f"{self._path}.{field}", description))

    def refuse_foreign_fields(self, terms: PriceTerms) -> None:
        present = {
            "flat_amount": terms.flat_amount is not None,
            "unit_amount": terms.unit_amount is not None,
            "tiers": bool(terms.tiers),
            "package": terms.package is not None,
        }
        own = _FIELDS[terms.model]
        for field, is_present in present.items():
            if is_present and field != own:
                self.refuse(field, f"does not belong to the model {terms.model}, which has {own}")

    def read_charge(self, terms: PriceTerms) -> Charge:
        match terms.model:
            case PriceModel.FLAT:
                return Flat(self.read_required("flat_amount", terms.flat_amount))
            case PriceModel.PER_UNIT:
                return PerUnit(self.read_required("unit_amount", terms.unit_amount))
            case PriceModel.GRADUATED:
                return Graduated(tuple(self.read_tiers(terms.tiers)))
            case PriceModel.VOLUME:
                return Volume(tuple(self.read_tiers(terms.tiers)))
            case PriceModel.PACKAGE:
                return self.read_package(terms.package)

    def read_tiers(self, tiers: tuple[TierTerms, ...]) -> Iterator[Tier]:
        if not tiers:
            self.refuse("tiers", "is missing; the last tier has up_to null")
        end_before: Decimal | None = None
        for index, tier in enumerate(tiers):
            field = f"tiers[{index}]"
            up_to = self.read_tier_end(tier, field, is_last=index == len(tiers) - 1, end_before=end_before)
            yield Tier(
                up_to,
                self.read_optional(f"{field}.unit_amount", tier.unit_amount) or Decimal(0),
                self.read_optional(f"{field}.flat_amount", tier.flat_amount) or Decimal(0),
            )
            end_before = up_to if up_to is not None else end_before

    def read_tier_end(
        self, tier: TierTerms, field: str, *, is_last: bool, end_before: Decimal | None
    ) -> Decimal | None:
        field = f"{field}.up_to"
        if tier.up_to is None:
            if not is_last:
                self.refuse(field, "is missing; only the last tier is open, so that none is out of reach")
            return None
        if is_last:
            self.refuse(field, "must be null in the last tier, so that every quantity has a price")
        up_to = self.read_decimal(field, tier.up_to)
        floor = Decimal(0) if end_before is None else end_before
        if up_to is not None and up_to <= floor:
            what = "greater than 0" if end_before is None else f"above {canonical(floor)}, where the tier before ends"
            self.refuse(field, f"must be {what}")
        return up_to

    def read_package(self, package: PackageTerms | None) -> Package:
        if package is None:
            self.refuse("package", "is missing; the model package needs it")
            return Package(Decimal(1), Decimal(0), Decimal(0))
        size = self.read_decimal("package.size", package.size)
        if size is not None and size <= 0:
            self.refuse("package.size", "must be greater than 0")
        amount = self.read_decimal("package.amount", package.amount)
        free_units = self.read_optional("package.free_units", package.free_units)
        return Package(size or Decimal(1), amount or Decimal(0), free_units or Decimal(0))

    def read_bounds(self, terms: PriceTerms) -> tuple[Decimal | None, Decimal | None]:
        minimum = self.read_optional("minimum_amount", terms.minimum_amount)
        maximum = self.read_optional("maximum_amount", terms.maximum_amount)
        if minimum is not None and maximum is not None and minimum > maximum:
            self.refuse("minimum_amount", f"must not exceed the maximum_amount {canonical(maximum)}")
        return minimum, maximum

    def read_required(self, field: str, text: str | None) -> Decimal:
        if text is None:
            self.refuse(field, "is missing; the model needs it")
            return Decimal(0)
        return self.read_decimal(field, text) or Decimal(0)

    def read_optional(self, field: str, text: str | None) -> Decimal | None:
        return None if text is None else self.read_decimal(field, text)

    def read_decimal(self, field: str, text: str) -> Decimal | None:
        violation = amount_violation(text)
        if violation is None:
            return Decimal(text)
        self.refuse(field, violation)
        return None


_FIELDS = {
    PriceModel.FLAT: "flat_amount",
    PriceModel.PER_UNIT: "unit_amount",
    PriceModel.GRADUATED: "tiers",
    PriceModel.VOLUME: "tiers",
    PriceModel.PACKAGE: "package",
}
