"""What happened to quotas."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from usameter_quota.domain.limits import EnforcementMode, LimitPeriod


class QuotaEventType(StrEnum):
    """What stored use has come to in a period; each once for a limit and period."""

    SOFT_LIMIT_REACHED = "SOFT_LIMIT_REACHED"
    LIMIT_REACHED = "LIMIT_REACHED"
    GRACE_STARTED = "GRACE_STARTED"
    RESET = "RESET"


@dataclass(frozen=True, slots=True)
class QuotaEvent:
    """An entry of an organization's log of quota events.

    Attributes:
        position: 1, 2, … without gap, in the order in which they became visible.
        occurred_at: Of a reset the end of the period, though it is written a little later.
        limit_value: The limit as it was then; so are mode, period and percent.
        stored: Units stored between `period_start` and `period_end`, without open reservations.
        grace_ends_at: Of GRACE_STARTED, else None.
    """

    position: int
    type: QuotaEventType
    tenant_id: str
    event_type: str
    occurred_at: datetime
    limit_value: Decimal
    enforcement_mode: EnforcementMode
    period: LimitPeriod
    soft_limit_percent: int
    period_start: datetime
    period_end: datetime
    stored: Decimal
    grace_ends_at: datetime | None


@dataclass(frozen=True, slots=True)
class QuotaEventFilter:
    """Which events are meant; None: any."""

    tenant_id: str | None = None
    event_type: str | None = None
    type: QuotaEventType | None = None
