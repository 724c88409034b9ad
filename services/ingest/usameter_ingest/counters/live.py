"""Live usage in Redis: what was recorded in each minute of the last hour. For looking at, never for deciding.

    usameter:live:{<organization>}:<unix seconds of the minute>           hash: `events`, and each writer's last batch
    usameter:live:{<organization>}:<unix seconds of the minute>:tenants   sorted set: events by tenant

The braces put all keys of an organization into one slot of a Redis Cluster, so a script touches one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from redis.asyncio import Redis

from usameter_core.clock import Clock
from usameter_core.ids import OrgId, new_uuid
from usameter_core.period import minute_start
from usameter_core.redis.breaker import CircuitBreaker, CircuitOpen
from usameter_ingest.metrics import LIVE_EVENTS_DROPPED

_MINUTES = 60
_BUSIEST_TENANTS = 10
# Twice what is read: the clocks of the writers need not agree.
_KEPT_SECONDS = 2 * 60 * 60
# Of a minute. Bounds what one script does: reading 60 such minutes takes Redis some 15 ms.
_TENANTS_KEPT = 1_000
# Counts by organization, minute and tenant that wait for Redis: some 15 MB.
_WAITING_MAX = 100_000

# A batch is numbered, and counts once however often it is sent: after a time-out nobody knows whether it was.
_WRITE = """
local writer, batch = ARGV[1], tonumber(ARGV[2])
if batch <= tonumber(redis.call('HGET', KEYS[1], writer) or '0') then
    return
end
redis.call('HSET', KEYS[1], writer, batch)
redis.call('HINCRBY', KEYS[1], 'events', ARGV[3])
for i = 6, #ARGV, 2 do
    redis.call('ZINCRBY', KEYS[2], ARGV[i + 1], ARGV[i])
end
redis.call('ZREMRANGEBYRANK', KEYS[2], 0, -1 - tonumber(ARGV[5]))
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
"""

# KEYS: the minutes, then their tenants. Answers the events of each minute, then the busiest tenants and their events.
_READ = """
local minutes = #KEYS / 2
local events, union = {}, {'ZUNION', minutes}
for i = 1, minutes do
    events[i] = redis.call('HGET', KEYS[i], 'events') or '0'
    union[2 + i] = KEYS[minutes + i]
end
union[3 + minutes] = 'WITHSCORES'
local ascending, busiest = redis.call(unpack(union)), {}
for i = #ascending - 1, math.max(1, #ascending + 1 - 2 * ARGV[1]), -2 do
    busiest[#busiest + 1] = {ascending[i], ascending[i + 1]}
end
return {events, busiest}
"""


@dataclass(frozen=True, slots=True)
class LiveUsage:
    """The last hour of an organization, as Redis knows it: all replicas of ingest together."""

    # By the minute's beginning, 60 of them, oldest first.
    minutes: Sequence[tuple[datetime, int]]
    # By tenant, at most 10, busiest first.
    busiest_tenants: Sequence[tuple[str, int]]


@dataclass(slots=True)
class _Minute:
    """Events of one organization and minute, by tenant, that Redis is not known to have."""

    waiting: Counter[str] = field(default_factory=Counter)
    # Sent before, and perhaps counted; it is sent again as it was.
    sent: Counter[str] = field(default_factory=Counter)
    batch: int = 0


class LiveCounters:
    """Counts in memory what is recorded, writes it to Redis now and then, and reads it back.

    While Redis is away counts wait for it: for an hour, or until `_WAITING_MAX` of them wait;
    what comes then is dropped and counted.
    """

    def __init__(self, redis: Redis, breaker: CircuitBreaker, *, clock: Clock) -> None:
        self._write_script = redis.register_script(_WRITE)
        self._read_script = redis.register_script(_READ)
        self._breaker = breaker
        self._clock = clock
        self._writer = new_uuid().hex
        self._batches = itertools.count(1)
        self._minutes: dict[tuple[OrgId, datetime], _Minute] = {}
        # At least as many counts as wait; exact after each flush.
        self._waiting = 0

    def add(self, org_id: OrgId, events_by_tenant: Mapping[str, int]) -> None:
        """Count events that were recorded now. Waits for nothing and never fails."""
        if self._waiting >= _WAITING_MAX:
            LIVE_EVENTS_DROPPED.inc(sum(events_by_tenant.values()))
            return
        minute = self._minutes.setdefault((org_id, minute_start(self._clock.now())), _Minute())
        minute.waiting.update(events_by_tenant)
        self._waiting += len(events_by_tenant)

    async def flush(self) -> int:
        """Write what waits, in one script an organization and minute; not to be called twice at once.

        What cannot be written waits on, until it is an hour old. Returns how many counts wait now.
        """
        oldest = minute_start(self._clock.now()) - timedelta(minutes=_MINUTES - 1)
        for (org_id, start), minute in list(self._minutes.items()):
            if start < oldest:
                LIVE_EVENTS_DROPPED.inc(minute.waiting.total() + minute.sent.total())
                del self._minutes[org_id, start]
                continue
            try:
                await self._breaker.call(partial(self._write, org_id, start, minute))
            except CircuitOpen:
                continue
            minute.sent = Counter()
            if not minute.waiting:
                del self._minutes[org_id, start]
        self._waiting = sum(len(minute.waiting) + len(minute.sent) for minute in self._minutes.values())
        return self._waiting

    async def _write(self, org_id: OrgId, start: datetime, minute: _Minute) -> None:
        if not minute.sent:
            minute.sent, minute.waiting, minute.batch = minute.waiting, Counter(), next(self._batches)
        arguments: list[str | int] = [self._writer, minute.batch, minute.sent.total(), _KEPT_SECONDS, _TENANTS_KEPT]
        for tenant_id, events in minute.sent.most_common(_TENANTS_KEPT):
            arguments += (tenant_id, events)
        key = _key(org_id, start)
        await self._write_script(keys=[key, _tenants_key(key)], args=arguments)

    async def read(self, org_id: OrgId) -> LiveUsage | None:
        """The last 60 minutes up to the one that runs; None where Redis cannot be read."""
        last = minute_start(self._clock.now())
        starts = [last - timedelta(minutes=back) for back in reversed(range(_MINUTES))]
        keys = [_key(org_id, start) for start in starts]
        keys += [_tenants_key(key) for key in keys]
        try:
            events, busiest = await self._breaker.call(partial(self._read_script, keys=keys, args=[_BUSIEST_TENANTS]))
        except CircuitOpen:
            return None
        return LiveUsage(
            minutes=[(start, int(count)) for start, count in zip(starts, events, strict=True)],
            # A score is a double, exact up to 2^53, and may be printed with an exponent.
            busiest_tenants=[(tenant_id.decode(), int(float(count))) for tenant_id, count in busiest],
        )


def _key(org_id: OrgId, start: datetime) -> str:
    return f"usameter:live:{{{org_id}}}:{int(start.timestamp())}"


def _tenants_key(key: str) -> str:
    return f"{key}:tenants"
