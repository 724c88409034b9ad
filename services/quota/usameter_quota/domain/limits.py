"""Limits, and how much of them is used."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

SOFT_LIMIT_PERCENT_DEFAULT = 80
# In place of a tenant's id: the default, of whoever has no limit of its own. No tenant has an empty id.
EVERY_TENANT = ""


class EnforcementMode(StrEnum):
    """What happens to a request that does not fit."""

    HARD = "HARD"
    SOFT = "SOFT"
    DISABLED = "DISABLED"


class LimitPeriod(StrEnum):
    """What a limit is per; `quota.period_of` alone says where each begins and ends."""

    HOURLY = "HOURLY"
    DAILY = "DAILY"
    MONTHLY = "MONTHLY"
    ROLLING_30D = "ROLLING_30D"


@dataclass(frozen=True, slots=True)
class LimitTerms:
    """What is asked for when a limit is set.

    Attributes:
        limit_value: Units a period, >= 0, at most 6 decimals.
        soft_limit_percent: 1 to 100; warnings start above this share of the limit.
        grace_period_hours: SOFT only: how long more than the limit is let through, from when stored
            use first exceeds it in a period; None: always.
    """

    limit_value: Decimal
    enforcement_mode: EnforcementMode
    period: LimitPeriod
    soft_limit_percent: int
    grace_period_hours: int | None


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit in force for a tenant and the use of its current period.

    Attributes:
        from_default: The tenant has no limit of its own; this is its organization's default.
        current: Entries and unconsumed reservations, in units; above the limit where the mode let
            it through, or where the limit was lowered since.
        reserved: The unconsumed reservations in `current`.
        reset_at: End of the current period; of the rolling window the next UTC midnight.
        grace_ends_at: None while no grace has started in the current period; from this moment on
            nothing above the limit is admitted.
        updated_at: When the limit last changed; it binds the periods that end after that.
    """

    tenant_id: str
    event_type: str
    terms: LimitTerms
    from_default: bool
    current: Decimal
    reserved: Decimal
    reset_at: datetime
    grace_ends_at: datetime | None
    updated_at: datetime

    @property
    def remaining(self) -> Decimal:
        """What still fits, not below 0."""
        return max(self.terms.limit_value - self.current, Decimal(0))


@dataclass(frozen=True, slots=True)
class QuotaDefault:
    """What applies to tenants without a limit of their own; `updated_at` as in `Quota`."""

    event_type: str
    terms: LimitTerms
    updated_at: datetime
