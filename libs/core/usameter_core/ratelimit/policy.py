"""What is limited: policies of an organization, for all its API keys and for single ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import msgspec


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `requests` (>= 1) in any span of `window`; `name` is what headers call it."""

    name: str
    requests: int
    window: timedelta

    @property
    def window_us(self) -> int:
        """The window in microseconds."""
        return self.window // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class RatePolicy:
    """Requests that one API key may send; None: as many as it likes."""

    requests_per_second: int | None = None
    requests_per_minute: int | None = None
    requests_per_hour: int | None = None

    @property
    def limits(self) -> tuple[RateLimit, ...]:
        """The limits that it sets, shortest window first."""
        windows = (
            ("second", self.requests_per_second, timedelta(seconds=1)),
            ("minute", self.requests_per_minute, timedelta(minutes=1)),
            ("hour", self.requests_per_hour, timedelta(hours=1)),
        )
        return tuple(RateLimit(name, requests, window) for name, requests, window in windows if requests is not None)


@dataclass(frozen=True, slots=True)
class OrganizationPolicies:
    """The default, for each key that has no policy of its own; a key's own replaces the default whole."""

    default: RatePolicy = RatePolicy()
    by_api_key: Mapping[str, RatePolicy] = field(default_factory=dict)

    def limits_of(self, api_key_id: str) -> tuple[RateLimit, ...]:
        """What binds the key; empty: nothing does."""
        return self.by_api_key.get(api_key_id, self.default).limits


_DECODER = msgspec.json.Decoder(OrganizationPolicies)


def encode_policies(policies: OrganizationPolicies) -> bytes:
    """The form in the mirror."""
    return msgspec.json.encode(policies)


def decode_policies(encoded: bytes) -> OrganizationPolicies:
    """What `encode_policies` wrote."""
    return _DECODER.decode(encoded)
