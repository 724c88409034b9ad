"""Events as ingest remembers them: in PostgreSQL, and in the cache before it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

from redis.asyncio import Redis
from redis.exceptions import RedisError

from usameter_core.ids import OrgId, ReservationId, new_uuid
from usameter_core.redis.breaker import CircuitBreaker
from usameter_ingest.counters.known import KnownEventCache
from usameter_ingest.domain.event import CorrectionKind, StoredEvent, UsageEvent, new_event
from usameter_ingest.store.entries import EntryStore

NOW = datetime(2026, 3, 10, 12, 0, 0, 123_457, tzinfo=UTC)


@dataclass(slots=True)
class Seconds:
    """A monotonic clock that is set by hand."""

    value: float = 1_000.0

    def __call__(self) -> float:
        return self.value


def event(org_id: OrgId, key: str | None, *, quantity: int = 1, timestamp: datetime | None = None) -> UsageEvent:
    return new_event(
        org_id=org_id,
        tenant_id="acme",
        event_type="call",
        quantity=Decimal(quantity),
        metadata=b"{}",
        idempotency_key=key,
        timestamp=timestamp,
        now=NOW,
    )


def patient_cache(redis: Redis) -> KnownEventCache:
    """A cache that bears a busy machine: what is tested here is not its haste."""
    breaker = CircuitBreaker(dependency="redis", failure_types=(RedisError, OSError), timeout_seconds=30)
    return KnownEventCache(redis, breaker)


async def record(entries: EntryStore, org_id: OrgId, *events: UsageEvent) -> str:
    return await entries.record_events(org_id, ReservationId(new_uuid()), events)


async def correct(entries: EntryStore, org_id: OrgId, event_id: UUID, kind: CorrectionKind) -> None:
    await entries.record_correction(
        org_id,
        None,
        event_id=event_id,
        kind=kind,
        quantity_delta=Decimal("-0.5") if kind is CorrectionKind.AMEND else Decimal(-1),
        reason="r",
        leaf_prefix=b"",
    )


async def cached_ids(redis: Redis, org_id: OrgId) -> set[UUID]:
    """Every event of an organization that is in Redis, in whatever generation."""
    found: set[UUID] = set()
    async for key in redis.scan_iter(f"usameter:known:{{{org_id}}}:*"):
        found |= {UUID(bytes=each) for each in await redis.hkeys(key)}
    return found


def stored(event: UsageEvent, *, voided: bool = False) -> StoredEvent:
    return StoredEvent(event.event_id, event.request_hash, event.occurred_at, event.timestamp_given, voided)
