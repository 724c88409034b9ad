"""Rate limits as an organization sets them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from usameter_core.ratelimit.policy import RatePolicy


@dataclass(frozen=True, slots=True)
class SetRatePolicy:
    """A policy in force; `api_key_id` is empty for the organization's default."""

    api_key_id: str
    policy: RatePolicy
    updated_at: datetime
