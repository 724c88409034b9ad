"""Known events in Redis: what tells a duplicate from a conflict without asking PostgreSQL.

    usameter:known:{<organization>}:<generation>       hash: event id → request hash, time, flags
    usameter:known:{<organization>}:<generation>:old   the same, of what came before

An entry is true for ever under its generation (`ingest.cache_generation`): what could make it untrue changes the
generation. So entries are never updated or deleted one by one; a hash that is full becomes the old one, and the old
one goes. Ids and entries are sent as one string: as arguments of their own, a thousand ids take ingest a millisecond
more to pack.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

from redis.asyncio import Redis

from usameter_core.ids import OrgId
from usameter_core.redis.breaker import CircuitBreaker, CircuitOpen
from usameter_ingest.domain.event import StoredEvent, UsageEvent
from usameter_ingest.metrics import KNOWN_EVENTS_DROPPED
from usameter_proof.ledger_format import microseconds

# Of each of the two hashes of an organization: some 25 MB.
_EVENTS_MAX = 250_000
# After the last write.
_KEPT_SECONDS = 60 * 60
# Events that wait to be written: 10 MB.
_WAITING_MAX = 100_000
# One script holds up whoever else uses Redis for a millisecond or two.
_EVENTS_A_SCRIPT = 1_000

_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)
# Request hash, microseconds since 1970, whether the timestamp was given, whether the event is voided.
_ENTRY = struct.Struct(">32sq??")

# ARGV: ids and entries, one after the other; how long an entry is; how many a hash may have; for how long.
_WRITE = """
local text, fields = ARGV[1], {}
for first = 1, #text, 16 + ARGV[2] do
    fields[#fields + 1] = text:sub(first, first + 15)
    fields[#fields + 1] = text:sub(first + 16, first + 15 + ARGV[2])
end
if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then
    redis.call('UNLINK', KEYS[2])
    redis.call('RENAME', KEYS[1], KEYS[2])
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('EXPIRE', KEYS[1], ARGV[4])
"""

# ARGV: ids, one after the other. Answers the entry of each, or nil. Lua unpacks fewer than 8,000 at once.
_READ = """
local text, entries = ARGV[1], {}
for start = 1, #text, 16 * 1000 do
    local ids = {}
    for first = start, math.min(start + 16 * 1000, #text) - 1, 16 do
        ids[#ids + 1] = text:sub(first, first + 15)
    end
    local new, old = redis.call('HMGET', KEYS[1], unpack(ids)), redis.call('HMGET', KEYS[2], unpack(ids))
    for i = 1, #ids do
        entries[#entries + 1] = new[i] or old[i]
    end
end
return entries
"""


class KnownEventCache:
    """Reads what is known of events, and writes in the background what was committed or found in PostgreSQL.

    What cannot be written, or comes while `_WAITING_MAX` events wait, is dropped and counted.
    """

    def __init__(self, redis: Redis, breaker: CircuitBreaker) -> None:
        self._write_script = redis.register_script(_WRITE)
        self._read_script = redis.register_script(_READ)
        self._breaker = breaker
        # Ids with their entries, by organization and generation.
        self._waiting: dict[tuple[OrgId, str], list[bytes]] = {}
        self._waiting_events = 0

    async def read(self, org_id: OrgId, generation: str, event_ids: Sequence[UUID]) -> dict[UUID, StoredEvent]:
        """Those of the events that the cache knows in this generation; none where Redis cannot be read."""
        ids = b"".join([event_id.bytes for event_id in event_ids])
        try:
            entries = await self._breaker.call(partial(self._read_script, keys=_keys(org_id, generation), args=[ids]))
        except CircuitOpen:
            return {}
        return {
            event_id: _unpack(event_id, entry)
            for event_id, entry in zip(event_ids, entries, strict=True)
            # One of another length is of another version of this service.
            if entry is not None and len(entry) == _ENTRY.size
        }

    def add(self, org_id: OrgId, generation: str, events: Collection[StoredEvent | UsageEvent]) -> None:
        """Have events written soon that are committed in this generation. Waits for nothing and never fails."""
        if self._waiting_events + len(events) > _WAITING_MAX:
            KNOWN_EVENTS_DROPPED.inc(len(events))
            return
        waiting = self._waiting.setdefault((org_id, generation), [])
        waiting.extend(event.event_id.bytes + _pack(event) for event in events)
        self._waiting_events += len(events)

    async def flush(self) -> None:
        """Write what waits."""
        waiting, self._waiting, self._waiting_events = self._waiting, {}, 0
        for (org_id, generation), entries in waiting.items():
            keys = _keys(org_id, generation)
            for first in range(0, len(entries), _EVENTS_A_SCRIPT):
                chunk = entries[first : first + _EVENTS_A_SCRIPT]
                arguments: list[bytes | int] = [b"".join(chunk), _ENTRY.size, _EVENTS_MAX, _KEPT_SECONDS]
                try:
                    await self._breaker.call(partial(self._write_script, keys=keys, args=arguments))
                except CircuitOpen:
                    KNOWN_EVENTS_DROPPED.inc(len(chunk))


def _pack(event: StoredEvent | UsageEvent) -> bytes:
    return _ENTRY.pack(
        event.request_hash,
        microseconds(event.occurred_at),
        event.timestamp_given,
        isinstance(event, StoredEvent) and event.voided,
    )


def _unpack(event_id: UUID, entry: bytes) -> StoredEvent:
    request_hash, occurred_at, timestamp_given, voided = _ENTRY.unpack(entry)
    return StoredEvent(
        event_id, request_hash, _EPOCH_START + timedelta(microseconds=occurred_at), timestamp_given, voided
    )


def _keys(org_id: OrgId, generation: str) -> list[str]:
    key = f"usameter:known:{{{org_id}}}:{generation}"
    return [key, f"{key}:old"]
